"""report.html: one file that holds all of the evaluation, runs no script and asks the network for nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from stagecraft.evaluation import curves, differences, drawing
from stagecraft.evaluation.markdown import ADVICE, NOTHING, difference, flat, visible
from stagecraft.evaluation.results import Comparison, Metric, Outcome
from stagecraft.evaluation.verdicts import (
    CAUTION,
    MARKS,
    Stage,
    by_row,
    chance_of,
    columns,
    measure,
    number,
    signed,
    stages,
    title,
)

STYLE = Path(__file__).with_name("page.css")
# What the browser is told: no script, no address, whatever a reply holds. Escaping it is the first wall.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
WORDS = {
    "better": "Worth it: better, and worse in nothing.",
    "worse": "Not worth it: worse, and better in nothing.",
    "mixed": "Gains and losses: weigh them.",
    "unclear": "Not shown to be worth it: not clearly better or worse.",
}
OPEN_STAGES = 4  # with more, what differs is folded away at first
RELATIVE = ("implicit_margin", "reward_win_rate")  # each against another model: none is the best of the row
ON_PAPER = 6  # models beside one another on a printed page; more stand in rows of four
LONG = 900  # characters of a reply that gets a scroll box
SHOWN_LEAKS = 100
READING = (
    "A cell is the value, its 95 % interval, and where that lies in the row; the dash is chance. Tap a metric for what "
    "it means. ▲ best of the row, ▽ worst; where the bars of two models overlap widely, the two may be equal."
)


def written(outcome: Outcome) -> str:
    """The text of report.html."""
    sections = [
        ("verdicts", "Was it worth it?", _verdicts(outcome)),
        ("numbers", "All numbers", _table(outcome)),
        ("comparisons", "Stage by stage", _comparisons(outcome)),
        ("curves", "How it trained", _curves(outcome)),
        ("spreads", "How the rows are spread", _distributions(outcome)),
        ("answers", "The same questions to every model", _answers(outcome)),
        ("leaks", "Left out: training has seen these rows", _leaks(outcome)),
        ("settings", "Settings", _settings(outcome)),
    ]
    there = [(key, name, body) for key, name, body in sections if body]
    links = "".join(f'<a href="#{key}">{key}</a>' for key, _, _ in there)
    bodies = "".join(f'<section id="{key}"><h2>{name}</h2>{body}</section>' for key, name, body in there)
    notes = "".join(f'<p class="note" dir="auto">{_e(note)}.</p>' for note in outcome.notes)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">\n'
        f"<title>Evaluation: {_e(outcome.recipe)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f'<body><header><p class="kind">Evaluation</p><h1><bdi>{_e(outcome.recipe)}</bdi></h1>'
        f'<p class="advice">{ADVICE}</p>{notes}<nav aria-label="Sections">{links}</nav></header>\n'
        f"<main>{bodies}</main></body></html>\n"
    )


# ---- Verdicts and numbers


def _verdicts(outcome: Outcome) -> str:
    found = stages(outcome.comparisons)
    cards = "".join(_card(stage, folded=len(found) > OPEN_STAGES) for stage in found)
    return f'<div class="cards">{cards}</div><p class="hint">{CAUTION}</p>' if found else ""


def _card(stage: Stage, folded: bool) -> str:
    lines = []
    for verdict in ("better", "worse", "higher", "lower", "unclear"):
        names = [f"<li>{_e(title(c))}{_amount(c)}</li>" for c in stage.found(verdict)]
        if names:
            lines.append(
                f'<dt class="{verdict}">{MARKS[verdict]} {len(names)} {verdict}</dt>'
                f"<dd><ul>{''.join(names)}</ul></dd>"
            )
    listed = f"<dl>{''.join(lines)}</dl>"
    if folded:
        listed = f"<details><summary>{_chips(stage)}</summary>{listed}</details>"
    better, worse = (100 * len(stage.found(v)) / len(stage.comparisons) for v in ("better", "worse"))
    return (
        f'<article class="card" style="--better-to:{better:.0f}%;--worse-to:{better + worse:.0f}%"><h3><bdi>{_e(stage.model)}</bdi> '
        f"<small>against <bdi>{_e(stage.before)}</bdi></small></h3>"
        f'<p class="word">{WORDS[stage.verdict]}</p>{listed}</article>'
    )


def _amount(c: Comparison) -> str:
    if c.verdict == "unclear":
        return ""
    return f' <span class="amount">{signed(c.difference, measure(c.metric).digits)}</span>'


def _table(outcome: Outcome) -> str:
    names = columns(outcome)
    if not names:
        return f'<p class="hint">{NOTHING}</p>'
    heads = "".join(f'<th scope="col" role="columnheader"><bdi>{_e(name)}</bdi></th>' for name in names)
    rows = "".join(_table_row(found, names) for found in by_row(outcome.metrics, names))
    return (
        f'<p class="hint">{READING}</p><div class="box" tabindex="0" role="region" aria-label="All numbers">'
        f'<table class="numbers{" many" if len(names) > ON_PAPER else ""}" role="table" style="--models:{len(names)}"><thead role="rowgroup"><tr role="row">'
        f'<th scope="col" role="columnheader">metric</th>{heads}</tr></thead>'
        f'<tbody role="rowgroup">{rows}</tbody></table></div>'
    )


def _table_row(found: dict[str, Metric], names: list[str]) -> str:
    first = next(iter(found.values()))
    about, sizes = measure(first.metric), sorted({m.n for m in found.values()})
    split = f" <em>{_e(first.split)}</em>" if first.split else ""
    figures = f"n {sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
    if first.chance is not None:
        figures += f", chance {number(first.chance, 2)}"
    if about.better:
        figures += f", {about.better} is better"
    side = {"higher": 1, "lower": -1}.get(about.better, 0)
    side = 0 if first.metric in RELATIVE else side
    ranked = sorted({side * m.value for m in found.values()})
    best, worst = (ranked[-1], ranked[0]) if side and len(ranked) > 1 else (None, None)
    cells = []
    for name in names:
        m = found.get(name)
        mark = None if m is None else {best: "best", worst: "worst"}.get(side * m.value)
        cells.append(_cell(m, name, _ends(list(found.values())), mark))
    return (
        f'<tr role="row"><th scope="row" role="rowheader"><details><summary title="{_e(about.meaning)}">'
        f"{_e(about.title)}{split}</summary><p>{_e(about.meaning)} <code>{_e(first.metric)}</code></p></details>"
        f'<span class="figures">{figures}</span></th>{"".join(cells)}</tr>'
    )


def _cell(m: Metric | None, name: str, ends: tuple[float, float], mark: str | None) -> str:
    if m is None:
        return f'<td role="cell" class="none" data-model="{_e(name)}"></td>'
    digits = measure(m.metric).digits
    sign = {"best": "▲", "worst": "▽", None: ""}[mark]
    said = f'<span class="sign" title="{mark} of the row">{sign}<span class="unseen"> {mark}</span></span>'
    interval = f"{number(m.low, digits)} to {number(m.high, digits)}"
    about = f"{title(m)}, {name}: {number(m.value, digits)}, 95 % interval {interval}, n {m.n:,}"
    scale = _scale(m.metric)
    bar = drawing.track(
        scale(m.low), scale(m.value), scale(m.high), ends, None if m.chance is None else scale(m.chance)
    )
    return (
        f'<td role="cell" class="{mark or "plain"}" data-model="{_e(name)}" title="{_e(about)}">'
        f'<span class="value">{said if mark else ""}{number(m.value, digits)}</span>'
        f'<span class="interval">{interval}</span>{bar}</td>'
    )


def _scale(metric: str) -> Callable[[float], float]:
    """Perplexities stand on a logarithmic scale: from a random model's thousands to a trained one's two."""
    return (lambda x: math.log(max(x, 1e-9))) if metric == "perplexity" else (lambda x: x)


def _ends(metrics: list[Metric]) -> tuple[float, float]:
    """What the tracks of a row run from and to: from nought where that is near, to 1 for shares."""
    first = metrics[0].metric
    scale = _scale(first)
    inner = [m.chance for m in metrics if m.chance is not None]
    low = min([m.low for m in metrics] + inner)
    high = max([m.high for m in metrics] + inner)
    if first == "perplexity":
        low, high = min(low, 1.0), max(high, 1.1)
    else:
        low, high = min(low, 0.0), 1.0 if 0.5 < high <= 1 else max(high, low + 1e-9)
    return scale(low), scale(high)


def _comparisons(outcome: Outcome) -> str:
    found = stages(outcome.comparisons)
    opened = " open" if len(found) <= OPEN_STAGES else ""
    return "".join(
        f'<details class="stage"{opened}><summary><b><bdi>{_e(stage.model)}</bdi></b> against '
        f"<bdi>{_e(stage.before)}</bdi> {_chips(stage)}</summary>"
        '<div class="box" tabindex="0" role="region" aria-label="Comparisons">'
        '<table class="pairs" role="table"><thead role="rowgroup"><tr role="row">'
        + "".join(
            f'<th scope="col" role="columnheader">{name}</th>'
            for name in ("metric", "difference", "", "p", "n", "verdict")
        )
        + f'</tr></thead><tbody role="rowgroup">{"".join(map(_pair, stage.comparisons))}</tbody></table></div></details>'
        for stage in found
    )


def _chips(stage: Stage) -> str:
    counts = ((verdict, len(stage.found(verdict))) for verdict in MARKS)
    return "".join(
        f'<span class="chip {verdict}">{MARKS[verdict]} {count}<span class="unseen"> {verdict}</span></span>'
        for verdict, count in counts
        if count
    )


def _pair(c: Comparison) -> str:
    reach = max(abs(c.low), abs(c.high), abs(c.difference), 1e-12)
    value, _, interval = difference(c).partition(" ")
    cells = (
        ("difference", f'<span class="value">{value}</span> <span class="interval">{interval}</span>'),
        ("bar", drawing.track(c.low, c.difference, c.high, (-reach, reach), 0.0)),
        ("p", chance_of(c.p).removeprefix("p = ").removeprefix("p ")),
        ("n", f"{c.n:,}"),
        ("verdict", f'<span class="chip {c.verdict}">{MARKS[c.verdict]} {c.verdict}</span>'),
    )
    row = "".join(f'<td role="cell" class="{name}">{text}</td>' for name, text in cells)
    return f'<tr role="row"><th scope="row" role="rowheader">{_e(title(c))}</th>{row}</tr>'


# ---- Curves and spreads


def _curves(outcome: Outcome) -> str:
    found = curves.charts(outcome.subjects)
    if not found:
        return ""
    return f'<div class="charts">{"".join(map(drawing.line_chart, found))}</div>'


def _distributions(outcome: Outcome) -> str:
    parts = []
    for metric, values in outcome.distributions.items():
        about = measure(metric)
        drawn = drawing.histograms(values, about.digits)
        if drawn:
            parts.append(
                f'<figure class="spreads"><figcaption title="{_e(about.meaning)}"><b>{_e(about.title)}</b> '
                f"of each row</figcaption>{drawn}</figure>"
            )
    hint = '<p class="hint">Bars: how many rows, as a square root, so that few are seen beside many.</p>'
    return f'{hint}<div class="charts narrow">{"".join(parts)}</div>' if parts else ""


# ---- Answers, leaks, settings


def _answers(outcome: Outcome) -> str:
    if not outcome.questions:
        return ""
    marks = (
        '<label class="switch"><input type="checkbox" id="marks" checked> mark what changed since the model before: '
        "<ins>new</ins> <del>gone</del></label>"
        if any(len(replies) > 1 for _, replies in outcome.questions)
        else ""
    )
    return marks + "".join(
        f'<article class="question"><h3 dir="auto">{_e(question)}</h3><div class="replies">'
        f"{_replies(replies)}</div></article>"
        for question, replies in outcome.questions
    )


def _replies(replies: dict[str, str]) -> str:
    parts, before = [], None
    for name, reply in replies.items():
        body, remark = _marked(None if before is None else replies[before], reply, before)
        long = ' tabindex="0" role="region" aria-label="Long reply"' if len(reply) > LONG else ""
        parts.append(
            f'<div class="reply"><p class="who"><bdi>{_e(name)}</bdi>{remark}</p>'
            f'<div class="text{" long" if long else ""}" dir="auto"{long}>{body}</div></div>'
        )
        before = name
    return "".join(parts)


def _marked(before: str | None, reply: str, name: str | None) -> tuple[str, str]:
    """A reply with the differences to the one before it marked, and a remark on how it differs."""
    shown = _e(reply.strip()) if reply.strip() else '<span class="nothing">(nothing)</span>'
    if before is None:
        return shown, ""
    if before.strip() == reply.strip():
        return shown, f'<span class="remark">as <bdi>{_e(name or "")}</bdi></span>'
    parts = differences.marked(before.strip(), reply.strip())
    if parts is None:
        if not (before.strip() and reply.strip()):
            return shown, ""
        return shown, '<span class="remark">quite different</span>'
    tags = {differences.SAME: "{}", differences.GONE: "<del>{}</del>", differences.NEW: "<ins>{}</ins>"}
    body = "".join(tags[kind].format(_e(text)) for kind, text in parts)
    places = sum(
        kind != differences.SAME and (i == 0 or parts[i - 1][0] == differences.SAME)
        for i, (kind, _) in enumerate(parts)
    )
    return body, f'<span class="remark">{places} change{"s" if places > 1 else ""}</span>'


def _leaks(outcome: Outcome) -> str:
    if not outcome.leaks:
        return ""
    rows = "".join(
        f'<li><p dir="auto">{_e(_short(leak.text))}</p><p class="figures"><code>{_e(leak.where)}</code> is in '
        f"<code>{_e(leak.source)}</code>, overlap {leak.overlap:.0%}</p></li>"
        for leak in outcome.leaks[:SHOWN_LEAKS]
    )
    count = len(outcome.leaks)
    more = f'<p class="hint">The first {SHOWN_LEAKS}; all {count:,} are in report.json.</p>'
    return f'<ul class="leaks">{rows}</ul>{more if count > SHOWN_LEAKS else ""}'


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"


def _settings(outcome: Outcome) -> str:
    models = [
        (s.name, f"{s.path} ({s.kind}{f', template {s.template}' if s.template else ''})")
        for s in outcome.subjects
    ]
    return (
        f"<h3>Models</h3>{_list(models)}<h3>Evaluation</h3>{_list(flat(outcome.settings))}"
        if outcome.settings
        else f"<h3>Models</h3>{_list(models)}"
    )


def _list(items: Iterable[tuple[str, str]]) -> str:
    return (
        '<dl class="settings">'
        + "".join(f"<div><dt>{_e(name)}</dt><dd>{_e(text)}</dd></div>" for name, text in items)
        + "</dl>"
    )


def _e(text: str) -> str:
    """Text as text, in an element or an attribute."""
    return html.escape(visible(text))
