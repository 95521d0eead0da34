"""The evaluation's outcome for people and programs: lines for the terminal, report.json, report.md, report.html."""

from __future__ import annotations

import json
import textwrap
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stagecraft.evaluation import markdown, page
from stagecraft.evaluation.markdown import NOTHING
from stagecraft.evaluation.results import Comparison, Metric, Outcome
from stagecraft.evaluation.verdicts import (
    CLEAR,
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

SCHEMA = 2
WIDTH = 110
GAP = "  "
INDENT = " " * 11  # room for the longest verdict
METRIC = ("metric", "split", "model", "value", "n", "low", "high", "chance")
COMPARISON = (
    "metric",
    "split",
    "model",
    "before",
    "difference",
    "low",
    "high",
    "p",
    "n",
    "verdict",
)


def write(folder: Path, outcome: Outcome) -> None:
    """report.json, report.md, report.html, then DONE; what is there already is replaced file by file."""
    from stagecraft.files import write_text

    texts = {
        "report.json": json.dumps(as_json(outcome), ensure_ascii=False, indent=2, allow_nan=False) + "\n",
        "report.md": markdown.written(outcome),
        "report.html": page.written(outcome),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        # Half a surrogate pair in a row (JSON may hold "\ud83d" alone) is no text that UTF-8 has bytes for.
        write_text(folder / name, text.encode(errors="replace").decode())
    write_text(folder / "DONE", "eval\n")


def as_json(outcome: Outcome) -> dict[str, Any]:
    """report.json, schema 2 (docs/evaluation.md): lists in the order of the table, the models' order throughout."""
    return {
        "schema": SCHEMA,
        "recipe": outcome.recipe,
        "subjects": [asdict(subject) for subject in outcome.subjects],
        "metrics": [{key: getattr(m, key) for key in METRIC} for m in outcome.metrics],
        "comparisons": [{key: getattr(c, key) for key in COMPARISON} for c in outcome.comparisons],
        "leaks": [asdict(leak) for leak in outcome.leaks],
        "notes": list(outcome.notes),
        "settings": markdown.plain(outcome.settings),
        "questions": [{"question": text, "replies": replies} for text, replies in outcome.questions],
    }


def table(outcome: Outcome, width: int = WIDTH) -> str:
    """Models as columns, metric and split as rows; a cell is value ± half the 95 % interval.

    Models that don't fit into `width` columns follow in a second table, with the rows they have values for.
    """
    metrics = outcome.metrics
    if not metrics:
        return NOTHING
    blocks: list[list[str]] = [[]]
    for name in columns(outcome):
        if blocks[-1] and display_width(_block(metrics, [*blocks[-1], name])[0]) > width:
            blocks.append([])
        blocks[-1].append(name)
    tables = ("\n".join(line.rstrip() for line in _block(metrics, block)) for block in blocks)
    return "\n\n".join(tables)


def comparisons(outcome: Outcome, width: int = WIDTH) -> str:
    """Each model against the one before it: the clear differences with ± half their interval, the unclear in a line."""
    blocks = []
    for stage in stages(outcome.comparisons):
        lines = [stage.sentence]
        for verdict in CLEAR:
            cells = [_difference(c) for c in stage.found(verdict)]
            for i, line in enumerate(_columns(cells, width - len(INDENT))):
                lines.append((f"{GAP}{verdict}" if i == 0 else "").ljust(len(INDENT)) + line)
        unclear = ", ".join(title(c) for c in stage.found("unclear"))
        if unclear:
            head = f"{GAP}unclear".ljust(len(INDENT))
            lines += textwrap.wrap(unclear, width, initial_indent=head, subsequent_indent=INDENT)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _difference(c: Comparison) -> list[str]:
    """'answers: right (phrasing)', '+0.920', '±0.047', 'p<.001'."""
    digits = measure(c.metric).digits
    value = signed(c.difference, digits)
    half = number((c.high - c.low) / 2, len(value.partition(".")[2]))
    return [title(c), value, f"±{half}", chance_of(c.p).replace(" ", "")]


def _columns(cells: list[list[str]], width: int) -> list[str]:
    """Cells of four parts each, the parts aligned, two cells beside one another where that fits."""
    if not cells:
        return []
    widths = [max(map(display_width, parts)) for parts in zip(*cells, strict=True)]
    texts = [
        " ".join(_padded(part, widths[i], to_the_right=i == 1) for i, part in enumerate(parts))
        for parts in cells
    ]
    rows = -(-len(texts) // 2)
    if 2 * display_width(texts[0]) + len(GAP) > width or rows == len(texts):
        return [text.rstrip() for text in texts]
    pairs = [texts[i : i + 1] + texts[rows + i : rows + i + 1] for i in range(rows)]
    return [GAP.join(pair).rstrip() for pair in pairs]


def _block(metrics: list[Metric], names: list[str]) -> list[str]:
    """The lines of a table of these models, all equally wide on a terminal."""
    columns = [[name] for name in names]
    left = [["metric", "split", "n", "chance"]]
    for found in by_row(metrics, names):
        left.append(head(found))
        for column, name in zip(columns, names, strict=True):
            column.append(_cell(found[name]) if name in found else "")
    # Cells are padded at the end so that the ± of a column stand under one another.
    for column in columns:
        after = max((len(cell.partition("±")[2]) for cell in column[1:]), default=0)
        column[1:] = [cell + " " * (after - len(cell.partition("±")[2])) for cell in column[1:]]
    lines = [[*start, *cells] for start, cells in zip(left, zip(*columns, strict=True), strict=True)]
    widths = [max(map(display_width, column)) for column in zip(*lines, strict=True)]
    return [
        GAP.join(_padded(cell, widths[i], to_the_right=i >= 2) for i, cell in enumerate(line))
        for line in lines
    ]


def _cell(m: Metric) -> str:
    """'0.730 ±0.05': digits enough to tell models apart, no more."""
    digits = measure(m.metric).digits
    value, half = number(m.value, digits), (m.high - m.low) / 2
    places = len(value.partition(".")[2])
    return f"{value} ±{number(half, min(places, 2) if half >= 0.005 else places)}"


def display_width(text: str) -> int:
    """Columns a terminal gives the text: East Asian wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def _padded(text: str, width: int, to_the_right: bool) -> str:
    blank = " " * (width - display_width(text))
    return blank + text if to_the_right else text + blank
