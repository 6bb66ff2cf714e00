"""Percentiles with their uncertainty, and what differs between two sets of samples beyond noise.

Calls of one round share what the machine did then, so they are not independent: intervals come from drawing whole
rounds with replacement (a block bootstrap), never single calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_SAMPLES", "Estimate", "Latency", "drift", "latency", "mann_whitney", "ratio", "thin"]

Rounds = Sequence[Sequence[float]]

#: Samples that are kept of a case.
MOST_SAMPLES = 1000
#: Calls that a percentile needs, or it would be the slowest call or nearly so.
_NEEDED = {90: 10, 99: 100}
_REPLICATES = 1000


@dataclass(frozen=True)
class Estimate:
    """A median with the interval it lies in.

    Attributes:
        median: the value.
        low, high: 95 % unless told otherwise.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Seconds a call takes.

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

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def thin(rounds: Rounds, most: int = MOST_SAMPLES) -> list[list[float]]:
    """At most ``most`` samples, the same share of every round, evenly spaced in it; at least one of each round.

    Where there are more rounds than ``most``, some of these are left out, evenly spaced too.
    """
    kept = [list(samples) for samples in rounds if len(samples)]
    if len(kept) > most:
        kept = [kept[i * len(kept) // most] for i in range(most)]
    total = sum(map(len, kept))
    if total <= most:
        return kept
    spare = most - len(kept)
    thinned = []
    for samples in kept:
        count = min(len(samples), 1 + spare * len(samples) // total)
        thinned.append([samples[i * len(samples) // count] for i in range(count)])
    return thinned


def _medians(rounds: Rounds, replicates: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Medians over all calls, with rounds drawn with replacement."""
    values = np.concatenate([np.asarray(samples, np.float64) for samples in rounds])
    owner = np.repeat(np.arange(len(rounds)), [len(samples) for samples in rounds])
    order = np.argsort(values, kind="stable")
    weights = rng.multinomial(len(rounds), np.full(len(rounds), 1 / len(rounds)), replicates)
    running = np.cumsum(weights[:, owner[order]], axis=1)
    half = running[:, -1:] / 2
    lower = (running >= half).argmax(axis=1)
    upper = (running > half).argmax(axis=1)
    return (values[order][lower] + values[order][upper]) / 2


def _interval(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(draws, (tail, 100 - tail))
    return float(low), float(high)


def latency(rounds: Rounds, *, seed: int = 0) -> Latency:
    """Percentiles of all calls.

    Args:
        rounds: seconds of each call, round by round; at least one.
        seed: of the interval's draws.
    """
    values = np.concatenate([np.asarray(samples, np.float64) for samples in rounds])
    low, high = _interval(_medians(rounds, _REPLICATES, np.random.default_rng(seed)), 0.95)
    tails = {p: float(np.percentile(values, p)) if values.size >= least else None for p, least in _NEEDED.items()}
    middle = float(np.median(values))
    return Latency(
        middle, min(low, middle), max(high, middle), tails[90], tails[99], float(values.mean()), float(values.min())
    )


def ratio(
    top: Rounds, bottom: Rounds, *, paired: bool, confidence: float = 0.95, replicates: int = 2000, seed: int = 0
) -> Estimate:
    """Median of ``top`` over median of ``bottom``.

    Args:
        top, bottom: seconds of each call, round by round.
        paired: both were measured in the same rounds: the ratio is taken round by round, so that a drift of the machine
            cancels, and rounds are drawn together. Else, rounds of either are drawn for themselves.
        confidence: of the interval.
        replicates: draws.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    if paired:
        if len(top) != len(bottom):
            raise ValueError(f"top, bottom: expected as many rounds, got {len(top)} and {len(bottom)}")
        ratios = np.array([np.median(a) / np.median(b) for a, b in zip(top, bottom, strict=True)])
        middle = float(np.median(ratios))
        draws = _medians([[value] for value in ratios], replicates, rng)
    else:
        first, second = (np.concatenate([np.asarray(s, np.float64) for s in rounds]) for rounds in (top, bottom))
        middle = float(np.median(first) / np.median(second))
        draws = _medians(top, replicates, rng) / _medians(bottom, replicates, rng)
    low, high = _interval(draws, confidence)
    return Estimate(middle, min(low, middle), max(high, middle))


def drift(rounds: Rounds) -> float | None:
    """Median of the last third of the rounds over that of the first third; None for fewer than six rounds."""
    third = len(rounds) // 3
    if third < 2:
        return None
    ends = [np.median(np.concatenate([np.asarray(s) for s in part])) for part in (rounds[-third:], rounds[:third])]
    return float(ends[0] / ends[1])


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the Mann-Whitney U test: do calls of one tend to be slower than calls of the other?

    Exact for small samples, else the normal approximation, corrected for ties (needs scipy, of the ``cli`` extra).
    """
    from xcos_ext.io.optional import need

    p = float(need("scipy.stats", "comparing measurements").mannwhitneyu(a, b, alternative="two-sided").pvalue)
    return p if p == p else 1.0  # NaN where all values are the same
