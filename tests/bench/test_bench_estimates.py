"""Percentiles, intervals and tests of ``xcos bench``, against numbers known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from xcos_ext.bench.estimates import MOST_SAMPLES, drift, latency, mann_whitney, ratio, thin
from xcos_ext.io.text import duration, rate, span


def rounds_of(
    rng: np.random.Generator, rounds: int, calls: int, centre: float, wobble: float = 0.0
) -> list[list[float]]:
    """Calls around ``centre``; every round has a speed of its own."""
    speeds = centre * np.exp(wobble * rng.standard_normal(rounds))
    return [list(speed * (1 + 0.02 * rng.random(calls))) for speed in speeds]


def test_percentiles_are_those_of_all_calls():
    values = np.arange(1, 201) / 1e3
    found = latency([list(values[:50]), list(values[50:])])
    assert found.p50 == pytest.approx(np.median(values))
    assert found.p90 == pytest.approx(np.percentile(values, 90))
    assert found.p99 == pytest.approx(np.percentile(values, 99))
    assert found.mean == pytest.approx(values.mean())
    assert found.fastest == values.min()


@pytest.mark.parametrize(
    ("calls", "p90", "p99"),
    [(1, False, False), (9, False, False), (10, True, False), (99, True, False), (100, True, True)],
)
def test_a_percentile_needs_enough_calls(calls, p90, p99):
    found = latency([[0.001] * calls])
    assert (found.p90 is not None, found.p99 is not None) == (p90, p99)


def test_one_call_is_its_own_interval():
    found = latency([[0.25]])
    assert found.p50 == found.low == found.high == found.mean == 0.25


def test_the_interval_covers_the_median_of_a_machine_whose_rounds_differ():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        found = latency(rounds_of(rng, 20, 30, 1e-3, wobble=0.05))
        hits += found.low <= 1.01e-3 <= found.high
    assert hits >= 51  # 95 % of 60, less what chance and few rounds take
    # An interval from single calls would take 600 of them for independent and be several times too narrow.
    assert (found.high - found.low) / found.p50 > 0.02


def test_intervals_are_the_same_from_run_to_run():
    rounds = rounds_of(np.random.default_rng(1), 8, 5, 1e-3, 0.1)
    assert latency(rounds) == latency(rounds)


def test_thinning_keeps_a_share_of_every_round():
    rounds = [[float(i)] * (10 * (i + 1)) for i in range(40)]
    kept = thin(rounds, 100)
    assert sum(map(len, kept)) <= 100
    assert [values[0] for values in kept] == [float(i) for i in range(40)]
    assert len(kept[-1]) > len(kept[0])


def test_thinning_leaves_few_samples_alone_and_thousands_of_rounds_within_bounds():
    few = [[1.0, 2.0], [3.0]]
    assert thin(few) == few
    assert len(thin([[1.0]] * 5000)) == MOST_SAMPLES


def test_a_paired_ratio_does_not_see_a_drift_that_both_have():
    rng = np.random.default_rng(2)
    speeds = np.linspace(1, 3, 30)  # the machine slows down threefold
    bottom = [[s * (1 + 0.01 * rng.random()) for _ in range(5)] for s in speeds]
    top = [[0.5 * s * (1 + 0.01 * rng.random()) for _ in range(5)] for s in speeds]
    found = ratio(top, bottom, paired=True)
    assert found.median == pytest.approx(0.5, rel=0.01)
    assert found.high - found.low < 0.01
    assert ratio(top, bottom, paired=False).high - ratio(top, bottom, paired=False).low > 0.1


def test_a_paired_ratio_needs_the_same_rounds():
    with pytest.raises(ValueError, match="as many rounds, got 2 and 1"):
        ratio([[1.0], [1.0]], [[1.0]], paired=True)


def test_drift_compares_the_ends_and_needs_six_rounds():
    assert drift([[1.0]] * 5) is None
    assert drift([[1.0], [1.0], [1.2], [1.2], [1.5], [1.5]]) == pytest.approx(1.5)


def test_mann_whitney_tells_shifted_calls_apart_and_equal_ones_not():
    rng = np.random.default_rng(3)
    a, b = 1 + 0.1 * rng.random(200), 1 + 0.1 * rng.random(200)
    assert mann_whitney(a, b) > 0.01
    assert mann_whitney(a, b + 0.05) < 1e-6
    assert mann_whitney([1.0] * 5, [1.0] * 5) == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5, "2.50 s"),
        (0.00461, "4.61 ms"),
        (0.0461, "46.1 ms"),
        (0.461, "461 ms"),
        (4.2e-5, "42.0 µs"),
        (3e-9, "3.00 ns"),
        (None, "-"),
    ],
)
def test_durations_have_three_digits(seconds, text):
    assert duration(seconds) == text


def test_an_interval_stays_in_one_unit():
    assert span(0.00102, 0.00098, 0.0011) == "1.02 ms (0.98 – 1.10)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.77, "5.77 pairs/s"), (2341.2, "2,341 pairs/s"), (1.11e6, "1.11 M pairs/s"), (3e9, "3.00 G pairs/s")],
)
def test_rates(value, text):
    assert rate(value, "pairs") == text
