"""A page in a real headless Chromium: what it shows, and what it complains about.

    with browser.opened(path_or_url, width=390, dark=True) as page:
        assert page.faults == [] and page.requests == [path_or_url]
        page.screenshot(path="phone.png")

The browser is $CHROMIUM, the one that `scripts/setup.sh test` noted in .venv/chromium-path, or one on PATH.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ON_PATH = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Page:
    """playwright's page, and what happened on it. faults: console errors, exceptions and requests that failed."""

    def __init__(self, page: Any) -> None:
        self._page = page
        self.faults: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", lambda request: self.faults.append(f"failed: {request.url}"))

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"console {message.type}: {message.text}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._page, name)

    def overflow(self) -> int:
        """CSS pixels by which the page is wider than its window."""
        return self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def executable() -> str:
    """The browser's path; fails with what to do where there is none."""
    noted = Path(sys.prefix) / "chromium-path"
    named = os.environ.get("CHROMIUM")
    if named:
        assert Path(named).is_file(), f"CHROMIUM={named}: no such file; name a Chromium or Chrome executable"
        return named
    for note in (noted, ROOT / ".venv" / "chromium-path"):
        if note.is_file() and Path(note.read_text().strip()).is_file():
            return note.read_text().strip()
    found = next(filter(None, map(shutil.which, ON_PATH)), None)
    assert found, (
        "no Chromium: run scripts/setup.sh test, which installs one, or set CHROMIUM=/path/to/chrome"
    )
    return found


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """playwright's browser; `opened(..., browser=...)` opens further pages in it (a start costs half a second)."""
    from playwright.sync_api import sync_playwright

    # Chromium's sandbox does not start as root, which is who runs tests in a container.
    flags = ["--no-sandbox", "--disable-dev-shm-usage"] if os.geteuid() == 0 else ["--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), headless=True, args=flags)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(
    place: Path | str, width: int = 1280, height: int = 800, dark: bool = False, browser: Any = None
) -> Iterator[Page]:
    """The page at a file or a URL, loaded, in a window of this size."""
    with contextlib.nullcontext(browser) if browser else started() as chromium:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        try:
            page = Page(context.new_page())
            page.goto(address(place), wait_until="load")
            yield page
        finally:
            context.close()


def address(place: Path | str) -> str:
    """file:// of a path; a URL as it is."""
    return place.absolute().as_uri() if isinstance(place, Path) else place
