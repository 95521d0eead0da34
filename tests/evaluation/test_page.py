"""report.html in a real headless Chromium: it is whole, asks nothing of the network, and what a model says stays text."""

import re

import pytest

import browser
import outcomes
from stagecraft.evaluation import page, report

# Contrast (WCAG 2) of every text that is seen against what is behind it: [ratio, text] below 4.5.
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = text => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
                         return canvas.getImageData(0, 0, 1, 1).data; };
  const light = c => { const [r, g, b] = [0, 1, 2].map(i => c[i] / 255)
      .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
      if (c[3] === 255) return c; } return [255, 255, 255]; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || !e.checkVisibility() || e.closest('.unseen')) continue;
    const style = getComputedStyle(e), ink = rgba(e.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) found.push([Math.round(ratio * 100) / 100, text.slice(0, 30)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def chromium():
    with browser.started() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ordinary report of four models with their logs, and a hard one."""
    folder = tmp_path_factory.mktemp("report")
    outcome = outcomes.every_metric(["base", "pt", "sft", "dpo"])
    keys = {"pt": ("loss",), "sft": ("loss",), "dpo": ("loss", "rewards/accuracies", "rewards/margins")}
    for i, subject in enumerate(outcome.subjects):
        place = folder / f"outputs-{subject.name}"
        if subject.name in keys:
            outcomes.log(place, steps=5000, keys=keys[subject.name])
        outcome.subjects[i] = type(subject)(subject.name, str(place / "model"), "folder", subject.template)
    outcome.questions = [
        (
            "失眠怎么办？",
            {"base": "", "pt": "睡前放下手机。", "sft": "睡前请放下手机。", "dpo": "睡前请放下手机。"},
        ),
        (
            "What helps?",
            {"base": "x", "pt": "Rest at home.", "sft": "Rest in bed at home.", "dpo": "See 医生."},
        ),
    ]
    report.write(folder / "ordinary", outcome)
    report.write(folder / "hard", outcomes.hard())
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
@pytest.mark.parametrize("name", ["ordinary", "hard"])
def test_no_error_no_request_and_no_sideways_scrolling(folder, chromium, name, width, dark):
    file = folder / name / "report.html"
    with browser.opened(file, width=width, dark=dark, browser=chromium) as opened:
        assert opened.faults == []
        assert opened.requests == [browser.address(file)]
        assert opened.overflow() == 0
        for closed in opened.query_selector_all("details:not([open])"):
            closed.evaluate("e => e.open = true")
        assert opened.overflow() == 0


def test_without_its_rules_the_page_would_scroll_sideways(folder, chromium, tmp_path):
    """Control of the test above."""
    text = (folder / "hard" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "wide.html").write_text(text.replace("overflow-wrap: anywhere", ""), encoding="utf-8")
    with browser.opened(tmp_path / "wide.html", width=390, browser=chromium) as opened:
        assert opened.overflow() > 100


def test_the_table_the_curves_and_the_answers_are_there(folder, chromium):
    with browser.opened(folder / "ordinary" / "report.html", browser=chromium) as opened:
        heads = opened.locator("table.numbers thead th").all_inner_texts()
        assert heads == ["metric", "base", "pt", "sft", "dpo"]
        assert opened.locator("table.numbers tbody tr").count() == 17
        assert opened.locator("table.numbers tbody td .value").count() == 4 * 17
        row = opened.locator("table.numbers tbody tr").nth(2)
        assert row.locator("summary").inner_text() == "answers: right"
        marks = row.locator(".sign").all_inner_texts()
        assert len(marks) == 2 and sum("best" in m for m in marks) == sum("worst" in m for m in marks) == 1

        charts = opened.locator("figure.chart")
        names = [text.split("\n")[0] for text in charts.locator("figcaption").all_inner_texts()]
        assert len(names) == 5 and "dpo" in names[-1]
        paths = charts.locator("path").evaluate_all(
            "all => all.map(p => [p.getTotalLength(), p.getAttribute('d')])"
        )
        for length, drawn in paths:
            assert length > 50 and 10 < drawn.count("L") < 300
        assert charts.locator("text").count() > 5 * 6
        assert opened.locator("figure.spreads .bars").count() == 2 * 4

        assert opened.locator(".question").count() == 2 and opened.locator(".reply").count() == 8
        assert opened.locator(".reply .nothing").all_inner_texts() == ["(nothing)"]
        assert opened.locator(".stage").count() == 3 and opened.locator(".card").count() == 3


def test_a_metric_says_what_it_means_where_it_is_tapped(folder, chromium):
    with browser.opened(folder / "ordinary" / "report.html", width=390, browser=chromium) as opened:
        meaning = opened.locator("table.numbers tbody tr").nth(2).locator("details p")
        assert not meaning.is_visible()
        opened.locator("table.numbers tbody tr").nth(2).locator("summary").click()
        assert meaning.is_visible() and "right key phrase" in meaning.inner_text()


def test_what_changed_is_marked_and_can_be_switched_off(folder, chromium):
    with browser.opened(folder / "ordinary" / "report.html", browser=chromium) as opened:
        answers = opened.locator(".reply .text")
        assert answers.locator("ins").all_inner_texts() == ["请", "in bed "]
        remarks = opened.locator(".remark").all_inner_texts()
        assert remarks == ["1 change", "as sft", "quite different", "1 change", "quite different"]
        opened.evaluate(
            "document.querySelector('.reply .text').insertAdjacentHTML('beforeend', '<del>old</del>')"
        )
        gone = answers.locator("del").first
        assert gone.is_visible()
        opened.locator("#marks").click()
        assert not gone.is_visible() and answers.locator("ins").first.is_visible()
        style = "e => getComputedStyle(e).textDecorationLine"
        assert answers.locator("ins").first.evaluate(style) == "none"


def test_what_a_model_says_stays_text(folder, chromium, tmp_path):
    text = (folder / "hard" / "report.html").read_text(encoding="utf-8")
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert len(policy.findall(text)) == 1 and "\x1b" not in text and "\x00" not in text

    def title(html):
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        with browser.opened(tmp_path / "page.html", browser=chromium) as opened:
            opened.wait_for_timeout(100)
            said = opened.locator(".reply .text").first.inner_text()
            return opened.title(), opened.locator("script, img").count(), said, opened.faults

    # Each of the two walls alone: escaping without the policy, the policy without escaping.
    name, foreign, said, faults = title(policy.sub("", text))
    assert "it ran" not in name and foreign == 0 and faults == []
    assert said == outcomes.EVIL[0]
    escaped = page.html.escape(outcomes.SCRIPT)
    assert escaped in text
    raw = text.replace(escaped, outcomes.SCRIPT)
    name, foreign, _, faults = title(raw)
    assert (
        "it ran" not in name and foreign > 0 and any("Content Security Policy" in fault for fault in faults)
    )
    # Control: with neither, it runs.
    assert title(policy.sub("", raw))[0] == "it ran"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read(folder, chromium, dark):
    with browser.opened(folder / "ordinary" / "report.html", dark=dark, browser=chromium) as opened:
        assert opened.evaluate(CONTRAST) == []
        paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(21, 24, 28)") is dark
        # Control: grey on it is found.
        opened.evaluate("document.querySelector('h2').style.color = '#888'")
        assert len(opened.evaluate(CONTRAST)) == (0 if dark else 1)
        opened.evaluate("document.querySelector('h2').style.color = '#777'")
        assert len(opened.evaluate(CONTRAST)) == 1


def test_six_models_stay_under_a_megabyte(tmp_path):
    outcome = outcomes.every_metric([f"model-{i}" for i in range(6)])
    for name in ("implicit_margin", "reply_tokens"):
        outcome.distributions[name] = outcome.distributions["rouge_l"]
    reply = "为了少受高血压困扰，日常请做菜少放盐和酱油。" * 20
    outcome.questions = [(f"q{i}", {s.name: f"{i} {reply}" for s in outcome.subjects}) for i in range(20)]
    report.write(tmp_path, outcome)
    assert (tmp_path / "report.html").stat().st_size < 1e6


def test_on_paper_nothing_is_folded_away_or_cut(folder, chromium):
    with browser.opened(folder / "hard" / "report.html", width=700, browser=chromium) as opened:
        cell = opened.locator(".pairs td.verdict").first
        long = opened.locator(".text.long").first
        assert not cell.is_visible()
        assert long.evaluate("e => e.scrollHeight > e.clientHeight + 10")
        opened.emulate_media(media="print")
        assert cell.is_visible() and opened.overflow() == 0
        # Seventeen models don't fit beside one another: no number may be cut or broken into two lines.
        tall = "all => all.filter(e => e.offsetHeight > 30 || e.getBoundingClientRect().right > innerWidth).length"
        assert opened.locator("table.numbers .value").evaluate_all(tall) == 0
        assert not long.evaluate("e => e.scrollHeight > e.clientHeight + 10")


def test_without_a_browser_the_test_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(browser, "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="scripts/setup.sh test"):
        browser.executable()
    chrome = tmp_path / "chromium"
    chrome.write_text("#!/bin/sh\n")
    chrome.chmod(0o755)
    assert browser.executable() == str(chrome)
    noted = tmp_path / "noted"
    noted.write_text("")
    (tmp_path / "chromium-path").write_text(f"{noted}\n")
    assert browser.executable() == str(noted)
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "gone"))
    with pytest.raises(AssertionError, match="CHROMIUM=.*no such file"):
        browser.executable()
