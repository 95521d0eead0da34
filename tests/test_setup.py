"""scripts/fetch_chromium.sh: the browser of the tests, found on PATH or said to be missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Fetch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fetch(root: Path, tmp_path: Path) -> Fetch:
    """fetch(VARIABLE=value) -> the script run in a folder with a .venv of its own, nothing but its tools on PATH."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(root / "scripts" / "fetch_chromium.sh", tmp_path / "scripts")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "mv", "cat", "mktemp", "rm", "uname", "env"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tmp_path / "scripts" / "fetch_chromium.sh"],
            env={"PATH": str(tools), "HOME": os.environ["HOME"]} | variables,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def program(path: Path, body: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_browser_on_the_path_is_taken_and_one_that_does_not_run_is_passed_by(fetch: Fetch, tmp_path: Path):
    program(tmp_path / "tools" / "chromium-browser", "echo this is a snap >&2; exit 1")
    chrome = program(tmp_path / "tools" / "google-chrome", "echo 'Google Chrome 153'")
    done = fetch()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".venv" / "chromium-path").read_text() == f"{chrome}\n"
    assert not (tmp_path / ".venv" / "chromium").exists()


def test_a_browser_of_your_own_comes_first_and_must_run(fetch: Fetch, tmp_path: Path):
    program(tmp_path / "tools" / "chromium", "echo Chromium")
    mine = program(tmp_path / "mine", "echo Chromium")
    assert fetch(CHROMIUM=str(mine)).returncode == 0
    assert (tmp_path / ".venv" / "chromium-path").read_text() == f"{mine}\n"
    shutil.rmtree(tmp_path / ".venv")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "tools" / "chromium").unlink()
    gone = fetch(CHROMIUM="/nowhere/chromium")
    assert (gone.returncode, gone.stderr) == (2, "chromium: CHROMIUM=/nowhere/chromium: does not run\n")
    assert not (tmp_path / ".venv" / "chromium-path").exists()


def test_a_machine_for_which_there_is_none_gets_a_line(fetch: Fetch, tmp_path: Path):
    (tmp_path / "tools" / "uname").unlink()
    program(tmp_path / "tools" / "uname", "echo Linux riscv64")
    done = fetch()
    assert done.returncode == 2
    assert done.stderr.startswith("chromium: no chromium, chromium-browser or google-chrome on PATH")
    assert done.stderr.count("\n") == 1
