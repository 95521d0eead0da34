"""Charts as inline SVG and HTML: lines with axes, histograms under one another, intervals on a track."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from stagecraft.evaluation.curves import SMOOTH_FROM, Chart, Point, smoothed, thinned
from stagecraft.evaluation.verdicts import number

# A chart's size in its own units, which are CSS pixels at about the width of a phone.
WIDTH, HEIGHT = 360, 212
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
BINS = 36
Span = tuple[float, float]
STYLES = ("first", "second")  # of the lines of a chart


def line_chart(chart: Chart) -> str:
    """The chart as a figure: caption, legend with the last values, SVG with axes."""
    every = [point for points in chart.lines.values() for point in points]
    first, last = min(p[0] for p in every), max(p[0] for p in every)
    x_ticks, x_range = ticks(first, last, 5, whole=True), (first, max(last, first + 1))
    bottom, top = _range([p[1] for p in every], chart.title)
    y_ticks = ticks(bottom, top, 5)
    y_range = (min(y_ticks[0], bottom), max(y_ticks[-1], top))
    parts, legend, told = [_grid(x_ticks, y_ticks, x_range, y_range)], [], []
    for style, (name, points) in zip(STYLES, chart.lines.items(), strict=False):
        # Noise of single steps stands behind the line that is read; evaluations are of many rows already.
        smooth = smoothed(points) if style == STYLES[0] and len(points) >= SMOOTH_FROM else None
        if smooth:
            parts.append(_path(points, f"{style} faint", x_range, y_range))
        shown = smooth or points
        parts.append(_path(shown, style, x_range, y_range))
        if len(points) == 1 or (style != STYLES[0] and len(points) < SMOOTH_FROM):
            parts += [_dot(point, style, x_range, y_range) for point in points]
        legend.append(f'<span class="key {style}">{html.escape(name)} <b>{_value(shown[-1][1])}</b></span>')
        told.append(f"{name} from {_value(shown[0][1])} to {_value(shown[-1][1])}")
    label = f"{chart.stage}: {chart.title}, {'; '.join(told)}, over {last:,.0f} steps"
    lost = f'<p class="lost">NaN or infinite at {chart.lost:,} steps</p>' if chart.lost else ""
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(chart.stage)}</b> {html.escape(chart.title)}'
        f'<span class="keys">{"".join(legend)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
        f"{lost}</figure>"
    )


def _path(points: list[Point], style: str, x_range: Span, y_range: Span) -> str:
    places = (_at(point, x_range, y_range) for point in thinned(points))
    return f'<path class="{style}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>'


def _dot(point: Point, style: str, x_range: Span, y_range: Span) -> str:
    x, y = _at(point, x_range, y_range)
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'


def _grid(x_ticks: list[float], y_ticks: list[float], x_range: Span, y_range: Span) -> str:
    parts = []
    digits = max((_places(tick) for tick in y_ticks), default=0)
    for tick in y_ticks:
        y = _at((0, tick), x_range, y_range)[1]
        base = " base" if tick == y_ticks[0] else ""
        parts.append(f'<line class="grid{base}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_signed(tick, digits)}</text>')
    for tick in x_ticks:
        x = _at((tick, 0), x_range, y_range)[0]
        last = tick == x_ticks[-1] and x > WIDTH - RIGHT - 20
        anchor = "end" if last else "middle"
        place = min(x, WIDTH - RIGHT) if last else x
        parts.append(
            f'<text x="{place:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_short(tick)}'
            f"{' steps' if tick == x_ticks[-1] else ''}</text>"
        )
    return "".join(parts)


def _at(point: Point, x_range: Span, y_range: Span) -> tuple[float, float]:
    (left, right), (bottom, top) = x_range, y_range
    x = LEFT + (point[0] - left) / (right - left) * (WIDTH - LEFT - RIGHT)
    return x, HEIGHT - BOTTOM - (point[1] - bottom) / (top - bottom) * (HEIGHT - BOTTOM - TOP)


def _range(values: list[float], title: str) -> tuple[float, float]:
    if title == "pairs right":  # a share
        return 0.0, 1.0
    low, high = min(values), max(values)
    if 0 < low < high / 2:
        low = 0.0
    return (low, high) if high > low else (low - abs(low) / 10 - 0.5, high + abs(high) / 10 + 0.5)


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers that span low to high (`whole`: within them, whole numbers), about as many as asked for."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    # A value just over a round number needs no further tick: it stands a pixel outside.
    first = math.ceil(low / step - 1e-9) if whole else math.floor(low / step + 0.02)
    last = math.floor(high / step + 1e-9) if whole else math.ceil(high / step - 0.02)
    return [i * step for i in range(first, last + 1)] or [low]


def _places(value: float) -> int:
    """Digits behind the point that a tick needs."""
    return next((d for d in range(7) if math.isclose(round(value, d), value, abs_tol=1e-9)), 7)


def _signed(tick: float, digits: int) -> str:
    return f"{tick:,.{digits}f}".replace("-", "−")


def _short(step: float) -> str:
    """1,250 or 40k or 1.5M: short enough for four of them on a phone."""
    for unit, size in (("M", 1e6), ("k", 1e4)):
        if step >= size:
            return f"{step / (1e6 if unit == 'M' else 1e3):,.4g}{unit}"
    return f"{step:,.0f}"


def _value(value: float) -> str:
    """Three figures: 0.278, 7.61, 1.00."""
    return f"{value:#,.3g}".rstrip(".").replace("-", "−")


def histograms(values: dict[str, Sequence[float]], digits: int) -> str:
    """Each model's values as bars on one axis, the models under one another; a line marks the median."""
    finite = {name: sorted(v for v in found if math.isfinite(v)) for name, found in values.items()}
    finite = {name: found for name, found in finite.items() if found}
    if not finite:
        return ""
    low, high = _middle_of([value for found in finite.values() for value in found])
    rows = []
    for name, found in finite.items():
        median = found[len(found) // 2] if len(found) % 2 else sum(found[len(found) // 2 - 1 :][:2]) / 2
        place = min(100.0, max(0.0, 100 * (median - low) / (high - low)))
        rows.append(
            f'<div class="spread"><span class="name">{html.escape(name)}</span>'
            f'<span class="median">median {number(median, digits)}</span>'
            f'<span class="bars"><svg viewBox="0 0 {BINS} 20" preserveAspectRatio="none" aria-hidden="true">'
            f'<path d="{_bars(found, low, high)}"/></svg><i style="left:{place:.1f}%"></i></span></div>'
        )
    axis = "".join(
        f"<span>{number(low + (high - low) * part / 2, min(digits, 2))}</span>" for part in range(3)
    )
    return f'{"".join(rows)}<div class="axis" aria-hidden="true">{axis}</div>'


def _middle_of(values: list[float]) -> tuple[float, float]:
    """All values but the outermost half per cent on either side, which go into the end bars."""
    values = sorted(values)
    cut = len(values) // 200
    low, high = values[cut], values[-1 - cut]
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _bars(values: list[float], low: float, high: float) -> str:
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, max(0, int((value - low) / (high - low) * BINS)))] += 1
    # The root of the count: where one bar holds most of the rows, the few others would vanish.
    heights = [20 * math.sqrt(count / max(counts)) for count in counts]
    return "".join(f"M{i} 20v-{tall:.1f}h.85v{tall:.1f}z" for i, tall in enumerate(heights) if tall)


def track(low: float, value: float, high: float, ends: tuple[float, float], mark: float | None) -> str:
    """An interval as a bar with its value as a dot, on a track from ends[0] to ends[1]; `mark`: chance, or zero."""

    def at(x: float) -> float:
        return min(100.0, max(0.0, 100 * (x - ends[0]) / (ends[1] - ends[0])))

    dash = f'<u style="left:{at(mark):.1f}%"></u>' if mark is not None else ""
    width = max(0.0, at(high) - at(low))
    return (
        f'<span class="track" aria-hidden="true">{dash}<i style="left:{at(low):.1f}%;width:{width:.1f}%"></i>'
        f'<b style="left:{at(value):.1f}%"></b></span>'
    )
