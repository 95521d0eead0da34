"""Intervals hold what they say 95 times in 100, tests are wrong 5 times in 100, and pairing rows finds what is there."""

import math

import numpy as np
import pytest

from stagecraft.evaluation import statistics


def mean(sums):
    return sums[:, 0] / sums[:, 1]


def rows_of(values):
    return np.column_stack([values, np.ones(len(values))])


def covered(truth, intervals):
    return np.mean([low <= truth <= high for low, high in intervals])


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_against_published_values(right, n, low, high):
    assert statistics.wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_covers_95_of_100():
    """Computed, not simulated: the chance of every count, and whether its interval holds the true share."""

    def coverage(share, n, shrunk=1.0):
        total = 0.0
        for right in range(n + 1):
            low, high = statistics.wilson(right, n)
            half, centre = shrunk * (high - low) / 2, (low + high) / 2
            chance = math.comb(n, right) * share**right * (1 - share) ** (n - right)
            total += chance * (centre - half <= share <= centre + half)
        return total

    shares = [0.05, 0.1, 0.25, 0.5, 0.8]
    found = [coverage(share, n) for share in shares for n in (40, 100, 150)]
    assert 0.94 < np.mean(found) < 0.96 and min(found) > 0.92 and max(found) < 0.98
    # Control: an interval of three quarters the width does not.
    assert np.mean([coverage(share, 100, 0.75) for share in shares]) < 0.9


def test_a_bootstrap_covers_95_of_100(monkeypatch):
    """Documents of unequal length whose tokens cost about 2 nats: a ratio of sums, as perplexity is one."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(5)
    intervals, of_copies = [], []
    for seed in range(600):
        tokens = rng.integers(20, 200, 80)
        rows = np.column_stack([tokens * rng.normal(2.0, 0.4, 80), tokens])
        intervals.append(statistics.bootstrap(rows, mean, seed))
        of_copies.append(statistics.bootstrap(np.vstack([rows, rows]), mean, seed))
    assert 0.93 <= covered(2.0, intervals) <= 0.97
    # Control: rows counted twice make an interval that is too narrow.
    assert covered(2.0, of_copies) < 0.9


def test_a_bootstrap_is_seeded_and_blocks_change_nothing(monkeypatch):
    rows = rows_of(np.random.default_rng(0).normal(0, 1, 50))
    first = statistics.bootstrap(rows, mean, 1)
    assert first == statistics.bootstrap(rows, mean, 1)
    assert first != statistics.bootstrap(rows, mean, 2)
    p = statistics.randomisation(rows, rows * [0.5, 1], mean, 1)
    monkeypatch.setattr(statistics, "BLOCK", 1000)
    assert statistics.bootstrap(rows, mean, 1) == pytest.approx(first, rel=1e-12)
    assert statistics.randomisation(rows, rows * [0.5, 1], mean, 1) == p


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 0.0625),
        (6, 0, 0.03125),
        (1, 9, 0.021484375),
        (2, 10, 0.0385742),
        (150, 86, 3.71594e-5),  # two ratings of a prime minister (Agresti); p by scipy.stats.binomtest
    ],
)
def test_mcnemar_against_known_values(one, other, p):
    assert statistics.mcnemar(one, other) == pytest.approx(p, rel=1e-5)
    assert statistics.mcnemar(other, one) == statistics.mcnemar(one, other)


def test_mcnemar_of_very_many_rows():
    assert statistics.mcnemar(20_000, 20_000) == 1.0
    assert 0 <= statistics.mcnemar(30_000, 10_000) < 1e-300


def test_a_randomisation_test_of_few_rows_equals_all_its_swaps():
    rows = rows_of(np.array([3.0, 1.0, 2.0, 0.5, 4.0, 2.5]))
    # All differences point one way, so 2 of the 2 ** 6 swaps are as large.
    assert statistics.randomisation(rows, rows * [0, 1], mean, 0) == pytest.approx(2 / 64, abs=0.006)
    mixed = rows * np.array([[1, 1], [-1, 1], [1, 1], [-1, 1], [1, 1], [1, 1]])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    exact = np.mean(np.abs(mixed[:, 0] @ signs) >= abs(mixed[:, 0].sum()) - 1e-9)
    assert statistics.randomisation(mixed, mixed * [0, 1], mean, 0) == pytest.approx(exact, abs=0.015)


def test_equal_models_differ_by_nothing():
    rows = rows_of(np.random.default_rng(0).normal(0, 1, 50))
    assert statistics.randomisation(rows, rows.copy(), mean, 0) == 1.0
    assert statistics.paired_bootstrap(rows, rows.copy(), mean, 0) == (0.0, 0.0)


def test_equal_chances_are_called_different_5_times_in_100(monkeypatch):
    monkeypatch.setattr(statistics, "FLIPS", 999)
    rng = np.random.default_rng(3)
    chance, real = [], []
    for seed in range(1000):
        before = rng.exponential(1.0, 40)
        noise = rng.normal(0, 0.5, 40)
        chance.append(statistics.randomisation(rows_of(before + noise), rows_of(before), mean, seed))
        if seed < 100:
            real.append(statistics.randomisation(rows_of(before + noise + 0.3), rows_of(before), mean, seed))
    assert 0.035 <= np.mean(np.array(chance) < 0.05) <= 0.065
    # Control: a real difference is found most of the time.
    assert np.mean(np.array(real) < 0.05) > 0.8


def test_mcnemar_is_wrong_at_most_5_times_in_100():
    """Exact for each number of rows that differ: the chance of a p below 0.05 when either model is right by a coin."""
    for n in (10, 25, 60):
        wrong = sum(math.comb(n, k) for k in range(n + 1) if statistics.mcnemar(k, n - k) < 0.05) / 2**n
        assert 0.01 < wrong <= 0.05
    # Control: a model that has 7 of 10 such rows right is told most of the time.
    found = [k for k in range(61) if statistics.mcnemar(k, 60 - k) < 0.05]
    assert sum(math.comb(60, k) * 0.7**k * 0.3 ** (60 - k) for k in found) > 0.8


def test_pairing_finds_a_difference_that_intervals_hide():
    """Rows that differ much among each other, and a second model that is a little better on most of them."""
    rng = np.random.default_rng(1)
    before = rng.normal(10, 5, 200)
    after = before + rng.normal(0.2, 0.5, 200)
    (_, high), (low, _) = (statistics.bootstrap(rows_of(x), mean, 0) for x in (before, after))
    assert low < high - 0.9  # unpaired: the intervals lie upon each other
    assert statistics.randomisation(rows_of(after), rows_of(before), mean, 0) < 0.001
    low, high = statistics.paired_bootstrap(rows_of(after), rows_of(before), mean, 0)
    assert 0 < low < 0.2 < high < 0.4
    # Control: the same numbers, row against another row.
    assert statistics.randomisation(rows_of(rng.permutation(after)), rows_of(before), mean, 0) > 0.1


def test_the_interval_of_paired_shares_covers_where_few_rows_differ(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng = np.random.default_rng(2)
    n, gain, loss = 50, 0.05, 0.01
    ours, theirs = [], []
    for seed in range(500):
        kind = rng.choice(4, n, p=[gain, loss, 0.5, 0.44])  # only after, only before, both, neither
        after, before = np.isin(kind, (0, 2)), np.isin(kind, (1, 2))
        ours.append(statistics.paired_shares(int((kind == 0).sum()), int((kind == 1).sum()), n))
        theirs.append(statistics.paired_bootstrap(rows_of(after), rows_of(before), mean, seed))
    assert 0.93 <= covered(gain - loss, ours) <= 0.99
    # Control: the plain bootstrap that the formula stands in for.
    assert covered(gain - loss, theirs) < 0.93
    assert statistics.paired_shares(0, 0, 20) == pytest.approx((-0.126, 0.126), abs=0.0005)
