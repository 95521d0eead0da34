"""make web in a real headless browser: both models stream, a vote becomes a row that the DPO stage reads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import browser
from speakers import teach

ROOT = Path(__file__).resolve().parents[1]
COLD, MORE = "感冒怎么办？", "还有呢？"
REST = "感冒时请多喝水，注意休息，三天不退要去医院。🩺 A cold goes by itself: rest, and drink warm water."
PILLS = (
    "多吃药，越多越好。 <img src=x onerror=\"document.title='broken in'\"> <b>Take pills</b>, many of them."
)
SLEEP, NIGHTS = "不要熬夜。", "熬夜也没事。"
LONG = ("休息，喝水。" * 30, "吃药，熬夜。" * 30)
ENVIRONMENT = os.environ | {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
# Notes how long each answer is whenever the page changes.
WATCH = """() => { window.seen = []; new MutationObserver(() => window.seen.push(
  [...document.querySelectorAll('.sc-card .sc-text')].map(text => text.innerText.length)
)).observe(document.querySelector('#sc-board'), {childList: true, subtree: true, characterData: true}) }"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Web:
    """web_chat.py as a process."""

    def __init__(self, votes: Path, *flags: str, **variables: str) -> None:
        self.votes, self.port = votes, free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.log = votes.with_suffix(".log")
        command = [sys.executable, str(ROOT / "python/web_chat.py"), "--port", str(self.port)]
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, "--votes_file", str(votes), *flags],
                env=ENVIRONMENT | variables,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        last = time.monotonic() + 180
        while "Ctrl-C ends it" not in self.said():
            assert self.process.poll() is None and time.monotonic() < last, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()

    def rows(self) -> list[dict[str, Any]]:
        if not self.votes.exists():
            return []
        return [json.loads(line) for line in self.votes.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def speakers(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags: a good model and a bad one; both know what may have been said before."""
    folder = tmp_path_factory.mktemp("speakers")
    good = teach(tiny_base, folder / "good", [[COLD, REST], [COLD, REST, MORE, SLEEP], ["hi", LONG[0]]])
    bad = teach(tiny_base, folder / "bad", [[COLD, PILLS], [COLD, REST, MORE, NIGHTS], ["hi", LONG[1]]])
    return ["--models", f"good={good}", f"bad={bad}"]


@pytest.fixture(scope="module")
def web(speakers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    started = Web(tmp_path_factory.mktemp("votes") / "votes.jsonl", *speakers)
    yield started
    status, said = started.end(signal.SIGINT), started.said()
    assert status == 0 and said.splitlines()[-1] == "ended" and "Traceback" not in said, said


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.started() as started:
        yield started


def opened(web: Web, chromium: Any, **settings: Any) -> Any:
    return browser.opened(web.url, browser=chromium, **settings)


def ask(page: Any, question: str) -> list[str]:
    """Type a question, Enter, wait for the vote; the answers."""
    page.fill("#sc-ask textarea", question)
    page.keyboard.press("Enter")
    page.wait_for_selector("#sc-vote-tie:visible", timeout=60_000)
    return page.locator(".sc-card .sc-text").all_inner_texts()


def vote(page: Any, which: int | str) -> str:
    """Click a vote; what the page says to it."""
    page.click(f"#sc-vote-{which}")
    page.wait_for_selector("#sc-note .sc-note", timeout=30_000)
    page.wait_for_selector("#sc-vote", state="hidden", timeout=30_000)
    return page.locator("#sc-note").inner_text()


def faults_of(page: Any) -> list[str]:
    """Gradio ends its own stream of events when an answer is there, which the browser calls a failed request."""
    return [fault for fault in page.faults if "/gradio_api/queue/data" not in fault]


def test_both_answers_grow_at_the_same_time(web: Web, chromium: Any) -> None:
    with opened(web, chromium) as page:
        page.wait_for_selector("#sc-send")
        page.evaluate(WATCH)
        whole = [len(text) for text in ask(page, "hi")]
        seen = [tuple(lengths) for lengths in page.evaluate("window.seen") if len(lengths) == 2]
        growing = {(a, b) for a, b in seen if 1 < a < whole[0] and 1 < b < whole[1]}
        assert len(growing) > 2 and min(whole) > 100, (whole, seen)


def test_ask_vote_and_go_on(web: Web, chromium: Any) -> None:
    before = len(web.rows())
    with opened(web, chromium) as page:
        page.wait_for_selector("#sc-send")
        assert ask(page, COLD) == [REST, PILLS]
        assert page.locator(".sc-name").all_inner_texts() == ["good", "bad"]
        said = vote(page, 0)
        assert said == f"Saved 1 preference in {web.votes} ({before + 1} there). " + (
            "DPO and the reward model are out of date now."
        )
        assert page.locator(".sc-won .sc-name").inner_text() == "good"
        assert ask(page, MORE) == [SLEEP, NIGHTS]  # both went on from the answer that won
        page.evaluate("[1, 2, 3].forEach(() => document.querySelector('#sc-vote-1').click())")  # one vote
        page.wait_for_selector("#sc-vote", state="hidden", timeout=30_000)
        assert page.title() == "Stagecraft"  # the answer with HTML in it stayed text
        assert faults_of(page) == []
        assert [url for url in page.requests if not url.startswith((web.url, "data:", "blob:"))] == []
        time.sleep(1)
    first, second = web.rows()[before:]
    assert first == {
        "system": "",
        "history": [],
        "question": COLD,
        "response_chosen": REST,
        "response_rejected": PILLS,
    }
    assert second == {
        "system": "",
        "history": [[COLD, REST]],
        "question": MORE,
        "response_chosen": NIGHTS,
        "response_rejected": SLEEP,
    }
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "python/prepare_data.py"),
            "check",
            f"dpo={web.votes}",
            f"rm={web.votes}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_no_preference_saves_nothing_and_says_so(web: Web, chromium: Any) -> None:
    before = web.rows()
    with opened(web, chromium) as page:
        page.wait_for_selector("#sc-send")
        page.click("#sc-send")
        page.wait_for_selector("#sc-note .sc-note")
        assert page.locator("#sc-note").inner_text() == "Write a question first."
        ask(page, COLD)
        assert vote(page, "tie") == "Tie: nothing is saved."
        page.click("#sc-new")
        page.wait_for_selector(".sc-empty")
        ask(page, COLD)
        assert vote(page, "bad") == "No good answer: nothing is saved."
    assert web.rows() == before


def test_an_answer_cut_off_is_not_taught(web: Web, chromium: Any) -> None:
    before = web.rows()
    with opened(web, chromium) as page:
        page.click("text=Settings")
        page.fill("input[aria-label*='Longest answer']", "5")
        page.keyboard.press("Tab")
        good, bad = (text.rstrip("\ufffd") for text in ask(page, COLD))  # the cut may be within a character
        assert good and bad and REST.startswith(good) and PILLS.startswith(bad)
        assert page.locator(".sc-state").all_inner_texts() == ["cut off at the limit"] * 2
        assert vote(page, 0).startswith("Nothing is saved: the better answer was cut off")
    assert web.rows() == before


def test_names_stay_hidden_until_the_vote(web: Web, chromium: Any) -> None:
    before = len(web.rows())
    orders = set()
    with opened(web, chromium) as page:
        page.click("text=Settings")
        page.check("text=Hide the models' names until the vote")
        for _ in range(12):
            answers = ask(page, COLD)
            orders.add(tuple(answers))
            assert page.locator(".sc-name").all_inner_texts() == ["name hidden"] * 2
            said = vote(page, answers.index(REST))
            names = ["good", "bad"] if answers[0] == REST else ["bad", "good"]
            assert page.locator(".sc-name").all_inner_texts() == names
            assert said.endswith(f"The models: A {names[0]}, B {names[1]}.")
            page.click("#sc-new")
            page.wait_for_selector(".sc-empty")
            if len(orders) == 2:
                break
    assert orders == {(REST, PILLS), (PILLS, REST)}  # drawn anew: one order twelve times is 1 in 2,048
    assert all(row["response_chosen"] == REST for row in web.rows()[before:])


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_sees_all_of_it_in_its_language(
    web: Web, speakers: list[str], chromium: Any, dark: bool
) -> None:
    context = chromium.new_context(
        viewport={"width": 390, "height": 844},
        locale="zh-CN",
        color_scheme="dark" if dark else "light",
    )
    try:
        page = browser.Page(context.new_page())
        page.goto(web.url)
        page.wait_for_selector("text=并排对比")
        ask(page, COLD)
        assert page.overflow() == 0
        for button, words in (("0", "A 更好"), ("1", "B 更好"), ("tie", "不分上下"), ("bad", "都不好")):
            box = page.locator(f"#sc-vote-{button}").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 32
            assert page.locator(f"#sc-vote-{button}").inner_text() == words
        assert vote(page, "tie") == "不分上下：不保存。"
        assert ("dark" in page.evaluate("document.body.className")) == dark
        assert faults_of(page) == []
    finally:
        context.close()


def test_wrong_settings_are_told_together_before_anything_starts(
    run_script: Any, web: Web, tmp_path: Path
) -> None:
    began = time.monotonic()
    wrong = tmp_path / "documents.jsonl"
    wrong.write_text('{"text": "no preference"}\n')
    flags = ["--models", "a", "b", "c", "d", "e", "--host", "0.0.0.0", "--share", "--port", web.port]
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PASSWORD"}
    done = run_script("web_chat.py", *flags, "--votes_file", wrong, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    told = done.stderr.splitlines()
    assert [line.split(":")[0] for line in told] == [
        "--host 0.0.0.0",
        "--share",
        f"--port {web.port}",
        f"--votes_file {wrong}",
        "--models",
        *(f"--models {letter}" for letter in "abcde"),
    ]
    assert "set PASSWORD in the environment" in told[0] and "already in use" in told[2]
    assert time.monotonic() - began < 30
    done = run_script("web_chat.py", "--recipe", "none", "--port", free_port(), cwd=tmp_path, env=environment)
    assert done.returncode == 2 and "no finished model yet; run: make sft RECIPE=none" in done.stderr


def test_a_password_opens_the_page_and_stop_ends_an_answer(
    tiny_base: Path, tmp_path: Path, chromium: Any
) -> None:
    secret = "open-sesame-4711"
    endless = teach(tiny_base, tmp_path / "endless", [["hi", "休息，喝水。" * 70]])
    flags = ["--models", str(endless), "--max_new_tokens", "480"]
    one = Web(tmp_path / "votes.jsonl", *flags, PASSWORD=secret)
    try:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{one.url}config", timeout=30)
        assert refused.value.code == 401
        with opened(one, chromium) as page:
            page.locator("input").nth(0).fill("stagecraft")
            page.locator("input[type=password]").fill(secret)
            page.keyboard.press("Enter")
            page.wait_for_selector("#sc-send", timeout=30_000)
            page.fill("#sc-ask textarea", "hi")
            page.keyboard.press("Enter")
            page.wait_for_selector("text=休息", timeout=60_000)
            page.click("#sc-stop")
            page.wait_for_selector("text=stopped", timeout=10_000)
            assert len(page.locator(".sc-card .sc-text").inner_text()) < 6 * 70
            assert not page.locator("#sc-vote-0").is_visible()  # one model: nothing to vote on
        shown = Path(f"/proc/{one.process.pid}/cmdline").read_text()
        assert secret not in shown and secret not in one.said()
    finally:
        assert one.end(signal.SIGTERM) == 0
