"""The evaluation's outcome for people and programs: the terminal's table, report.md and report.json."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stagecraft.evaluation.results import Metric

WIDTH = 110
GAP = "  "
MEANINGS = {
    "perplexity": "how surprised the model is by held-out documents, per token; lower is better, 1 is the least. "
    "Comparable only between models with the same tokenizer. Interval: bootstrap over documents.",
    "answer_accuracy": "share of greedy replies that contain the right key phrase. `phrasing` asks about facts from "
    "training in new words, `fact` asks for what was seen in the documents only; other splits are the data's own.",
    "choice_accuracy": "share of questions whose right option has the highest mean log-probability per token as the "
    "assistant's reply. It needs no free text, so it moves earlier than answer_accuracy.",
    "preference_accuracy": "share of held-out pairs in which the model finds the chosen answer likelier per token "
    "than the rejected one. Read it beside answer_accuracy: preference training can raise it and ruin answers.",
    "reward_accuracy": "share of held-out pairs in which the reward model scores the chosen answer higher.",
}
INTERVAL = (
    "In parentheses: 95 % intervals (Wilson for shares). Models whose intervals overlap widely may be equal."
)
ADVICE = (
    "The sample data and whatever models trained on it say are there to show the kit at work. None of it is medical "
    "advice."
)


def table(metrics: list[Metric], width: int = WIDTH) -> str:
    """Models as columns, metric and split as rows; a cell is value ± half the 95 % interval.

    Models that don't fit into `width` columns follow in a second table, with the rows they have values for.
    """
    blocks: list[list[str]] = [[]]
    for name in dict.fromkeys(m.model for m in metrics):
        if blocks[-1] and display_width(_block(metrics, [*blocks[-1], name])[0]) > width:
            blocks.append([])
        blocks[-1].append(name)
    tables = ("\n".join(line.rstrip() for line in _block(metrics, block)) for block in blocks)
    return "\n\n".join(tables)


def _block(metrics: list[Metric], names: list[str]) -> list[str]:
    """The lines of a table of these models, all equally wide on a terminal."""
    columns = [[name] for name in names]
    left = [["metric", "split", "n", "chance"]]
    for found in _by_row(metrics, names):
        left.append(_head(next(iter(found.values()))))
        for column, name in zip(columns, names, strict=True):
            column.append(_cell(found[name]) if name in found else "")
    # Cells are padded at the end so that the ± of a column stand under one another.
    for column in columns:
        after = max(len(cell.partition("±")[2]) for cell in column[1:])
        column[1:] = [cell + " " * (after - len(cell.partition("±")[2])) for cell in column[1:]]
    lines = [[*head, *cells] for head, cells in zip(left, zip(*columns, strict=True), strict=True)]
    widths = [max(map(display_width, column)) for column in zip(*lines, strict=True)]
    return [
        GAP.join(_padded(cell, widths[i], to_the_right=i >= 2) for i, cell in enumerate(line))
        for line in lines
    ]


def _by_row(metrics: list[Metric], names: list[str]) -> list[dict[str, Metric]]:
    """For each metric and split measured on these models, in order of appearance: {model: Metric}."""
    found: dict[tuple[str, str | None], dict[str, Metric]] = {}
    for m in metrics:
        if m.model in names:
            found.setdefault((m.metric, m.split), {})[m.model] = m
    return list(found.values())


def _head(m: Metric) -> list[str]:
    return [m.metric, m.split or "", str(m.n), "" if m.chance is None else f"{m.chance:.2f}"]


def write(
    folder: Path,
    recipe: str,
    models: list[tuple[str, str]],
    metrics: list[Metric],
    questions: list[tuple[str, dict[str, str]]],
    notes: Iterable[str] = (),
) -> None:
    """report.json, report.md, then DONE. `questions`: (question, {model: its answer}) of each fixed question."""
    from stagecraft.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    value = as_json(recipe, models, metrics)
    write_text(
        folder / "report.json", json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    )
    write_text(folder / "report.md", markdown(recipe, models, metrics, questions, notes))
    write_text(folder / "DONE", "eval\n")


def as_json(recipe: str, models: list[tuple[str, str]], metrics: list[Metric]) -> dict[str, Any]:
    """report.json: schema 1. split and chance are null where a metric has none."""
    order = ("metric", "split", "model", "value", "n", "low", "high", "chance")
    return {
        "schema": 1,
        "recipe": recipe,
        "models": [{"name": name, "path": path} for name, path in models],
        "metrics": [{key: asdict(m)[key] for key in order} for m in metrics],
    }


def markdown(
    recipe: str,
    models: list[tuple[str, str]],
    metrics: list[Metric],
    questions: list[tuple[str, dict[str, str]]],
    notes: Iterable[str] = (),
) -> str:
    """report.md: the table, how to read it, and each fixed question with every model's answer."""
    names = list(dict.fromkeys(m.model for m in metrics))
    lines = [f"# Evaluation: {_escape(recipe)}", "", f"> {ADVICE}", ""]
    if metrics:
        lines += [
            _row(["metric", "split", "n", "chance", *names]),
            _row(["---", "---", "---:", "---:", *["---:"] * len(names)], escape=False),
        ]
    for found in _by_row(metrics, names):
        cells = [_interval(found[name]) if name in found else "" for name in names]
        lines.append(_row([*_head(next(iter(found.values()))), *cells]))
    lines += ["", INTERVAL]
    lines += [line for note in notes for line in ("", f"Note: {_escape(note)}.")]
    lines += ["", "## How to read it", ""]
    lines += [f"- **{name}**: {MEANINGS[name]}" for name in dict.fromkeys(m.metric for m in metrics)]
    lines += ["", "Models:", "", *[f"- `{name}`: `{path}`" for name, path in models]]
    if questions:
        lines += [
            "",
            "## The same questions to every model",
            "",
            "Greedy replies, up to --max_new_tokens.",
        ]
    for number, (question, answers) in enumerate(questions, start=1):
        lines += ["", f"{number}. **{_escape(question)}**", ""]
        lines += [_row(["model", "answer"]), _row(["---", "---"], escape=False)]
        lines += [_row([name, answer or "(nothing)"]) for name, answer in answers.items()]
    return "\n".join(lines) + "\n"


def display_width(text: str) -> int:
    """Columns a terminal gives the text: East Asian wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def _padded(text: str, width: int, to_the_right: bool) -> str:
    blank = " " * (width - display_width(text))
    return blank + text if to_the_right else text + blank


def _cell(m: Metric) -> str:
    """'0.730 ±0.05': digits enough to tell models apart, no more."""
    digits = max(0, 3 - len(str(int(m.value)))) if m.metric == "perplexity" else 3
    return f"{m.value:.{digits}f} ±{(m.high - m.low) / 2:.{min(digits, 2)}f}"


def _interval(m: Metric) -> str:
    digits = 2 if m.metric == "perplexity" else 3
    return f"{m.value:.{digits}f} ({m.low:.{digits}f} to {m.high:.{digits}f})"


def _row(cells: list[str], escape: bool = True) -> str:
    return "| " + " | ".join(_escape(cell) if escape else cell for cell in cells) + " |"


def _escape(text: str) -> str:
    """Text as a reader of the Markdown file sees it: no markup, no control characters, lines kept."""
    text = "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text.strip()
    )
    text = html.escape(text, quote=False)
    for mark in "\\`*[]|~":
        text = text.replace(mark, f"\\{mark}")
    return "<br>".join(text.split("\n"))
