"""How sure a number is: 95 % intervals, and tests of two models on the same rows.

A metric here is a function of sums over rows: a mean, a ratio of sums, corpus BLEU. `rows` are arrays (rows, columns),
`of_sums` makes of the columns' sums (cases, columns) the metric of each case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval
RESAMPLES = 2000  # of a bootstrap: its ends then vary by about 2 % of the interval's width from seed to seed
FLIPS = 10_000  # of a randomisation test: p of 0.05 then has a standard error of 0.002
BLOCK = 1 << 22  # numbers held at once

OfSums = Callable[["np.ndarray"], "np.ndarray"]


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, 1927, JASA 22: 209-212); sound near 0 and 1 and for small n.

    Half successes (ties) may count in `right`; the interval is then somewhat wider than it need be.
    """
    share, spread = right / n, Z95 * Z95 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # The ends are exact at 0 and n; rounding would leave 1e-17 there.
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def bootstrap(rows: np.ndarray, of_sums: OfSums, seed: int) -> tuple[float, float]:
    """95 % interval: percentiles of RESAMPLES metrics, each of as many rows drawn with replacement."""
    import numpy as np

    values = [of_sums(counts @ rows) for counts in _drawn(len(rows), seed)]
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    after: np.ndarray, before: np.ndarray, of_sums: OfSums, seed: int
) -> tuple[float, float]:
    """95 % interval of the difference of two models' metrics, both of the same rows drawn."""
    import numpy as np

    width = after.shape[1]
    both = np.hstack([after, before])
    return bootstrap(both, lambda sums: of_sums(sums[:, :width]) - of_sums(sums[:, width:]), seed)


def randomisation(after: np.ndarray, before: np.ndarray, of_sums: OfSums, seed: int) -> float:
    """p of the difference of two models' metrics: how often it is as large when chance swaps the models row by row.

    For a mean this is the sign-flip test of the rows' differences; for BLEU approximate randomisation (Noreen, 1989).
    """
    import numpy as np

    seen = of_sums(np.stack([after.sum(0), before.sum(0)]))
    # Sums in another order differ in the last digits; what should be equal must count as equal.
    least = abs(seen[0] - seen[1]) * (1 - 1e-9) - 1e-12 * np.abs(seen).max()
    total, gap = after.sum(0) + before.sum(0), after - before
    as_large = 0
    for kept in _flips(len(after), seed):
        ours = kept @ gap + before.sum(0)
        as_large += int((np.abs(of_sums(ours) - of_sums(total - ours)) >= least).sum())
    return (as_large + 1) / (FLIPS + 1)


def mcnemar(only_after: int, only_before: int) -> float:
    """Exact p of McNemar's test: of rows that one model alone has right, is it either model's as often?"""
    n, few = only_after + only_before, min(only_after, only_before)
    ways = total = 1  # to choose none of n
    for k in range(few):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def paired_shares(only_after: int, only_before: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares of the same n rows (Bonett and Price, 2012, JEBS 37: 479-488).

    A bootstrap is too narrow where few rows differ, and of no width where none does.
    """
    after, before = (only_after + 1) / (n + 2), (only_before + 1) / (n + 2)
    half = Z95 * math.sqrt((after + before - (after - before) ** 2) / (n + 2))
    return max(-1.0, after - before - half), min(1.0, after - before + half)


def _drawn(n: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n rows is drawn, RESAMPLES times, as blocks (resamples, rows)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    for count in _blocks(RESAMPLES, n):
        places = rng.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        yield np.bincount(places.ravel(), minlength=count * n).reshape(count, n).astype(float)


def _flips(n: int, seed: int) -> Iterator[np.ndarray]:
    """FLIPS times a coin for each of n rows, as blocks (flips, rows) of 0 and 1."""
    import numpy as np

    rng = np.random.default_rng(seed)
    for count in _blocks(FLIPS, n):
        yield rng.integers(0, 2, (count, n), np.int8).astype(float)


def _blocks(cases: int, n: int) -> Iterator[int]:
    size = max(1, BLOCK // n)
    for start in range(0, cases, size):
        yield min(size, cases - start)
