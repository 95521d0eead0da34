"""Comparisons told in words: which metrics a model is better or worse in than the one before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stagecraft.evaluation.results import MEASURES, Comparison, Measure, Metric, Outcome

CLEAR = ("better", "worse", "higher", "lower")  # the rest is unclear
MARKS = {"better": "▲", "worse": "▼", "higher": "△", "lower": "▽", "unclear": "≈"}
# Twenty comparisons at 5 % are expected to find one difference where there is none.
CAUTION = (
    "Each difference is tested on the same rows for both models. About one in twenty is called clear by chance alone, "
    "so trust a p of .04 less than one below .001."
)


@dataclass(frozen=True)
class Stage:
    """All comparisons of a model with the one before it."""

    model: str
    before: str
    comparisons: list[Comparison]

    def found(self, verdict: str) -> list[Comparison]:
        """Those with this verdict."""
        return [c for c in self.comparisons if c.verdict == verdict]

    @property
    def verdict(self) -> str:
        """better, worse, mixed or unclear."""
        better, worse = bool(self.found("better")), bool(self.found("worse"))
        return "mixed" if better and worse else "better" if better else "worse" if worse else "unclear"

    @property
    def sentence(self) -> str:
        """Whether the stage was worth it, in plain words."""
        opening = {
            "better": f"{self.model} is better than {self.before}",
            "worse": f"{self.model} is worse than {self.before}",
            "mixed": f"{self.model} gained and lost against {self.before}",
            "unclear": f"{self.model} is not clearly better or worse than {self.before}",
        }[self.verdict]
        counts = [
            f"{len(self.found(verdict))} {verdict}"
            for verdict in ("better", "worse", "unclear")
            if self.found(verdict)
        ]
        return f"{opening}: {', '.join(counts)}" if counts else opening


def stages(comparisons: Iterable[Comparison]) -> list[Stage]:
    """Comparisons by pair of models, in order of appearance; within a pair in the order of MEASURES."""
    found: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        found.setdefault((comparison.model, comparison.before), []).append(comparison)
    return [Stage(*pair, sorted(group, key=place)) for pair, group in found.items()]


def place(item: Comparison | Metric) -> int:
    """Where a metric stands among MEASURES; those that are not in there come last."""
    names = list(MEASURES)
    return names.index(item.metric) if item.metric in names else len(names)


def columns(outcome: Outcome) -> list[str]:
    """Models that have a number, in the order of the subjects."""
    names = [subject.name for subject in outcome.subjects]
    measured = dict.fromkeys(m.model for m in outcome.metrics)
    return [name for name in names if name in measured] + [name for name in measured if name not in names]


def by_row(metrics: list[Metric], names: list[str]) -> list[dict[str, Metric]]:
    """For each metric and split measured on these models, in the order of MEASURES: {model: Metric}."""
    found: dict[tuple[str, str | None], dict[str, Metric]] = {}
    for m in sorted(metrics, key=place):
        if m.model in names:
            found.setdefault((m.metric, m.split), {})[m.model] = m
    return list(found.values())


def head(found: dict[str, Metric]) -> list[str]:
    """metric, split, n and chance of a row of the table."""
    first, sizes = next(iter(found.values())), [m.n for m in found.values()]
    n = f"{min(sizes)}-{max(sizes)}" if len(set(sizes)) > 1 else str(sizes[0])
    return [
        measure(first.metric).title,
        first.split or "",
        n,
        "" if first.chance is None else f"{first.chance:.2f}",
    ]


def measure(metric: str) -> Measure:
    """What is known of a metric."""
    return MEASURES.get(metric) or Measure(metric, "", 3, "")


def title(item: Comparison | Metric) -> str:
    """'answers: right (phrasing)'."""
    return measure(item.metric).title + (f" ({item.split})" if item.split else "")


def number(value: float, digits: int) -> str:
    """Four figures at most, and no more than `digits` behind the point: 0.920, 27.83, 2,048."""
    places = min(digits, max(0, 4 - len(str(int(abs(value))))))
    text = f"{value:,.{places}f}"
    return text.removeprefix("-") if is_zero(text) else text.replace("-", "−")


def signed(value: float, digits: int) -> str:
    """A difference with its sign: +0.920, −0.031, 0.000."""
    text = number(value, digits)
    return text if is_zero(text) or value < 0 else f"+{text}"


def is_zero(text: str) -> bool:
    """Whether a rounded number is nothing but zeros."""
    return not any(c in "123456789" for c in text)


def chance_of(p: float) -> str:
    """'p < .001', 'p = .03'."""
    if p < 0.001:
        return "p < .001"
    return f"p = {p:.{3 if p < 0.1 else 2}f}".replace("= 0.", "= .")
