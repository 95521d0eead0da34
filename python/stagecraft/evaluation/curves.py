"""How each stage trained: the series of its logs/progress.jsonl, thinned to what a small chart can show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagecraft.evaluation.results import Subject

Point = tuple[float, float]  # step, value
MOST_POINTS = 240  # a chart is some 360 pixels wide
SMOOTH_FROM = 40  # fewer points are shown as they are
# What is drawn: a chart's title, and of which keys in the log.
CHARTS = {
    "loss": {"loss": "training", "eval_loss": "held out"},
    "pairs right": {
        "accuracy": "training",
        "rewards/accuracies": "training",
        "eval_accuracy": "held out",
        "eval_rewards/accuracies": "held out",
    },
    "margin": {
        "margin": "training",
        "rewards/margins": "training",
        "eval_margin": "held out",
        "eval_rewards/margins": "held out",
    },
}


@dataclass
class Chart:
    """One chart of one stage: a line for each series, and at how many steps a value was NaN or infinite."""

    stage: str
    title: str
    lines: dict[str, list[Point]] = field(default_factory=dict)
    lost: int = 0


def charts(subjects: Iterable[Subject]) -> list[Chart]:
    """The charts of every stage that a subject comes from; two subjects of one stage (adapter, model) share its log."""
    found, seen = [], set()
    for subject in subjects:
        path = log_of(subject)
        if path is not None and path not in seen:
            seen.add(path)
            found += _charts(subject.name, read(path))
    return found


def log_of(subject: Subject) -> Path | None:
    """OUTPUTS/logs/progress.jsonl of a subject at OUTPUTS/model or OUTPUTS/adapter; BASE+ADAPTER: the adapter's."""
    if subject.kind == "server":
        return None
    path = Path(subject.path.rpartition("+")[2]).absolute().parent / "logs" / "progress.jsonl"
    try:
        path.open("rb").close()
    except (
        OSError,
        ValueError,
    ):  # a hub's name, another user's folder: the numbers are worth a report without it
        return None
    return path


def read(path: Path) -> dict[str, dict[int, float]]:
    """{key: {step: value}} of every number in the log. Half a line, from a kill, counts for nothing.

    A run that went on from a checkpoint makes steps again: a line whose step goes back takes away what was later.
    """
    series: dict[str, dict[int, float]] = {}
    last = -1
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        entry = _entry(line)
        if entry is None:
            continue
        step = entry["step"]
        if step < last:
            for values in series.values():
                for later in [at for at in values if at > step]:
                    del values[later]
        last = step
        for key, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                series.setdefault(key, {})[step] = float(value)
    return series


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(entry, dict) and type(entry.get("step")) is int and entry["step"] >= 0
    return entry if whole else None


def _charts(stage: str, series: dict[str, dict[int, float]]) -> list[Chart]:
    found = []
    for title, keys in CHARTS.items():
        chart = Chart(stage, title)
        for key, name in keys.items():
            values = sorted(series.get(key, {}).items())
            points = [(float(step), value) for step, value in values if math.isfinite(value)]
            chart.lost += len(values) - len(points)
            if points:
                chart.lines[name] = points
        if chart.lines:
            found.append(chart)
    return found


def thinned(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points that keep the line's shape: of each stretch its first, lowest, highest and last."""
    if len(points) <= most:
        return points
    stretches, kept = max(1, most // 4), []
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        ends = {part[0], part[-1], min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def smoothed(points: list[Point]) -> list[Point]:
    """The mean of a window around each point, a twelfth of all; at the ends, where half of it is missing, a straight
    line through the rest: a mean would bend a slope there, a smaller window would follow the last point alone."""
    reach = len(points) // 24
    sums, weighted = [0.0], [0.0]
    for i, (_, value) in enumerate(points):
        sums.append(sums[-1] + value)
        weighted.append(weighted[-1] + i * value)
    smooth = []
    for i, (step, _) in enumerate(points):
        first, end = max(0, i - reach), min(len(points), i + reach + 1)
        count, centre = end - first, (first + end - 1) / 2
        total = sums[end] - sums[first]
        slope = 0.0
        if i != centre:
            slope = (weighted[end] - weighted[first] - centre * total) / (count * (count * count - 1) / 12)
        smooth.append((step, total / count + slope * (i - centre)))
    return smooth
