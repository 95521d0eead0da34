"""report.md: the table, how to read it, what each stage changed, and every model's answers."""

from __future__ import annotations

import html
import unicodedata
from typing import Any

from stagecraft.evaluation.results import Comparison, Metric, Outcome
from stagecraft.evaluation.verdicts import (
    CAUTION,
    by_row,
    chance_of,
    columns,
    head,
    measure,
    number,
    signed,
    stages,
    title,
)

INTERVAL = (
    "In parentheses: 95 % intervals (Wilson for shares). Models whose intervals overlap widely may be equal."
)
ADVICE = (
    "The sample data and whatever models trained on it say are there to show the kit at work. None of it is medical "
    "advice."
)
NOTHING = "No metric: there was nothing that could be measured."
SHOWN_LEAKS = 50  # all of them are in report.json


def written(outcome: Outcome) -> str:
    """The text of report.md."""
    lines = [f"# Evaluation: {_escape(outcome.recipe)}", "", f"> {ADVICE}", ""]
    lines += [*_table(outcome), "", INTERVAL]
    lines += [line for note in outcome.notes for line in ("", f"Note: {_escape(note)}.")]
    lines += _comparisons(outcome)
    lines += ["", "## How to read it", ""]
    for name in dict.fromkeys(next(iter(found.values())).metric for found in _rows(outcome)):
        lines.append(f"- **{measure(name).title}** (`{name}`): {measure(name).meaning}")
    lines += ["", "Models:", ""]
    lines += [f"- `{subject.name}`: `{subject.path}`" for subject in outcome.subjects]
    return "\n".join([*lines, *_questions(outcome), *_leaks(outcome), *_settings(outcome)]) + "\n"


def _rows(outcome: Outcome) -> list[dict[str, Metric]]:
    return by_row(outcome.metrics, columns(outcome))


def _table(outcome: Outcome) -> list[str]:
    if not outcome.metrics:
        return [NOTHING]
    names = columns(outcome)
    lines = [
        _row(["metric", "split", "n", "chance", *names]),
        _row(["---", "---", "---:", "---:", *["---:"] * len(names)], escape=False),
    ]
    for found in _rows(outcome):
        lines.append(_row([*head(found), *(_interval(found.get(name)) for name in names)]))
    return lines


def _interval(m: Metric | None) -> str:
    if m is None:
        return ""
    digits = measure(m.metric).digits
    return f"{number(m.value, digits)} ({number(m.low, digits)} to {number(m.high, digits)})"


def _comparisons(outcome: Outcome) -> list[str]:
    if not outcome.comparisons:
        return []
    lines = ["", "## Was each stage worth it?", "", CAUTION]
    for stage in stages(outcome.comparisons):
        lines += ["", f"### {_escape(stage.sentence)}", ""]
        lines += [_row(["metric", "difference", "p", "n", "verdict"])]
        lines += [_row(["---", "---:", "---:", "---:", "---"], escape=False)]
        lines += [
            _row([title(c), difference(c), chance_of(c.p), str(c.n), c.verdict]) for c in stage.comparisons
        ]
    return lines


def difference(c: Comparison) -> str:
    """'+0.920 (0.873 to 0.967)'."""
    digits = measure(c.metric).digits
    low, high = (signed(end, digits).removeprefix("+") for end in (c.low, c.high))
    return f"{signed(c.difference, digits)} ({low} to {high})"


def _questions(outcome: Outcome) -> list[str]:
    if not outcome.questions:
        return []
    lines = ["", "## The same questions to every model", "", "Greedy replies, up to --max_new_tokens."]
    for place, (question, answers) in enumerate(outcome.questions, start=1):
        lines += ["", f"{place}. **{_escape(question)}**", ""]
        lines += [_row(["model", "answer"]), _row(["---", "---"], escape=False)]
        lines += [_row([name, answer or "(nothing)"]) for name, answer in answers.items()]
    return lines


def _leaks(outcome: Outcome) -> list[str]:
    if not outcome.leaks:
        return []
    lines = ["", "## Left out: evaluation rows that training has seen", ""]
    lines += [_row(["row", "seen in", "overlap", "text"])]
    lines += [_row(["---", "---", "---:", "---"], escape=False)]
    for leak in outcome.leaks[:SHOWN_LEAKS]:
        lines.append(_row([leak.where, leak.source, f"{leak.overlap:.0%}", leak.text]))
    more = len(outcome.leaks) - SHOWN_LEAKS
    return [*lines, "", f"... and {more:,} more, all in report.json."] if more > 0 else lines


def _settings(outcome: Outcome) -> list[str]:
    if not outcome.settings:
        return []
    rows = [_row([name, value]) for name, value in flat(outcome.settings)]
    return ["", "## Settings", "", _row(["setting", "value"]), _row(["---", "---"], escape=False), *rows]


def plain(value: Any) -> Any:
    """A setting as JSON can hold it: paths and the like as text, keys as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def flat(settings: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """(name, value) of every setting; 'versions.torch' for those within another."""
    found: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            found += flat(value, f"{before}{name}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            found.append((f"{before}{name}", text))
    return found


def _row(cells: list[str], escape: bool = True) -> str:
    return "| " + " | ".join(_escape(cell) if escape else cell for cell in cells) + " |"


def visible(text: str) -> str:
    """Text without control characters, which a page must not hold; lines and tabs stay."""
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text
    )


def _escape(text: str) -> str:
    """Text as a reader of the Markdown file sees it: no markup, no control characters, lines kept."""
    text = html.escape(visible(text.strip()), quote=False)
    for mark in "\\`*[]|~":
        text = text.replace(mark, f"\\{mark}")
    return "<br>".join(text.split("\n"))
