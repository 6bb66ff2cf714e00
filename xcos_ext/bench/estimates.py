"""Percentiles with their uncertainty, and whether two sets of samples differ beyond noise.

Calls of one round share what the machine did then, so they are not independent: intervals come from drawing whole
rounds with replacement (a block bootstrap), never single calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xcos_ext.io.optional import need

__all__ = ["MOST_SAMPLES", "Estimate", "Latency", "drift", "latency", "mann_whitney", "ratio", "thin"]

Rounds = Sequence[Sequence[float]]

#: Samples that are kept of a case.
MOST_SAMPLES = 1000
#: Calls that a percentile needs, or it would be the slowest call or nearly so.
_NEEDED = {90: 10, 99: 100}
_REPLICATES = 1000


@dataclass(frozen=True)
class Estimate:
    """A median with the interval ``low`` to ``high`` that it lies in, 95 % unless told otherwise.

    >>> ratio([[1.0], [1.1]], [[2.0], [2.2]], paired=True)
    Estimate(median=0.5, low=0.5, high=0.5)
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Seconds a call takes.

    >>> found = latency([[0.001, 0.002, 0.003]] * 4)
    >>> found.p50, found.p90, found.p99
    (0.002, 0.003, None)

    Attributes:
        p50: median, with the 95 % interval ``low`` to ``high``.
        p90, p99: percentiles; None where there are fewer than 10 and 100 calls.
        mean: arithmetic mean.
        fastest: the shortest call.
    """

    p50: float
    low: float
    high: float
    p90: float | None
    p99: float | None
    mean: float
    fastest: float


def thin(rounds: Rounds, most: int = MOST_SAMPLES) -> list[list[float]]:
    """At most ``most`` samples, the same share of every round, evenly spaced in it; at least one of each round.

    Where there are more rounds than ``most``, some of these are left out, evenly spaced too.
    """
    kept = [list(rounds[i * len(rounds) // most]) for i in range(most)] if len(rounds) > most else [*map(list, rounds)]
    total, thinned = sum(map(len, kept)), []
    if total <= most:
        return kept
    for samples in kept:
        count = min(len(samples), 1 + (most - len(kept)) * len(samples) // total)
        thinned.append([samples[i * len(samples) // count] for i in range(count)])
    return thinned


def _all(rounds: Rounds) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(samples, np.float64) for samples in rounds])


def _medians(rounds: Rounds, replicates: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Medians over all calls, with rounds drawn with replacement."""
    values = _all(rounds)
    owner = np.repeat(np.arange(len(rounds)), [len(samples) for samples in rounds])
    order = np.argsort(values, kind="stable")
    weights = rng.multinomial(len(rounds), np.full(len(rounds), 1 / len(rounds)), replicates)
    running = np.cumsum(weights[:, owner[order]], axis=1)
    half = running[:, -1:] / 2
    lower, upper = (running >= half).argmax(axis=1), (running > half).argmax(axis=1)
    return (values[order][lower] + values[order][upper]) / 2


def _estimate(middle: float, draws: NDArray[np.float64], confidence: float = 0.95) -> Estimate:
    tail = 50 * (1 - confidence)
    low, high = map(float, np.percentile(draws, (tail, 100 - tail)))
    return Estimate(middle, min(low, middle), max(high, middle))


def latency(rounds: Rounds) -> Latency:
    """Percentiles of all calls; at least one."""
    values = _all(rounds)
    found = _estimate(float(np.median(values)), _medians(rounds, _REPLICATES, np.random.default_rng(0)))
    p90, p99 = (float(np.percentile(values, p)) if values.size >= least else None for p, least in _NEEDED.items())
    return Latency(found.median, found.low, found.high, p90, p99, float(values.mean()), float(values.min()))


def ratio(top: Rounds, bottom: Rounds, *, paired: bool, confidence: float = 0.95) -> Estimate:
    """Median of ``top`` over median of ``bottom``.

    Args:
        top, bottom: seconds of each call, round by round.
        paired: both were measured in the same rounds: the ratio is taken round by round, so that a drift of the machine
            cancels, and rounds are drawn together. Else, rounds of either are drawn for themselves.
        confidence: of the interval.
    """
    rng, replicates = np.random.default_rng(0), 2 * _REPLICATES
    if paired:
        if len(top) != len(bottom):
            raise ValueError(f"top, bottom: expected as many rounds, got {len(top)} and {len(bottom)}")
        ratios = [[float(np.median(a) / np.median(b))] for a, b in zip(top, bottom, strict=True)]
        return _estimate(float(np.median(ratios)), _medians(ratios, replicates, rng), confidence)
    middle = float(np.median(_all(top)) / np.median(_all(bottom)))
    return _estimate(middle, _medians(top, replicates, rng) / _medians(bottom, replicates, rng), confidence)


def drift(rounds: Rounds) -> float | None:
    """Median of the last third of the rounds over that of the first third; None for fewer than six rounds."""
    third = len(rounds) // 3
    return float(np.median(_all(rounds[-third:])) / np.median(_all(rounds[:third]))) if third > 1 else None


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the Mann-Whitney U test: do calls of one tend to be slower than calls of the other?

    Exact for small samples, else the normal approximation, corrected for ties (needs scipy, of the ``cli`` extra).
    """
    p = float(need("scipy.stats", "comparing measurements").mannwhitneyu(a, b, alternative="two-sided").pvalue)
    return p if p == p else 1.0  # NaN where all values are the same
