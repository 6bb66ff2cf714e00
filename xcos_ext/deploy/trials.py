"""Ways to compute the same thing, timed in turns, and a choice that comes out alike the next time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xcos_ext.io.text import duration

__all__ = ["Spread", "Trial", "choose", "speedups", "table", "time_in_turns"]

# Rounds at least, whatever the budget, and at most: quartiles need some, and more than these tell nothing new.
_FEWEST, _MOST = 5, 201
# A timed block of calls lasts about this long, so that the clock's own cost does not count.
_BLOCK = 2e-3

Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some samples."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        ordered = sorted(samples)
        n = len(ordered)
        return cls(statistics.median(ordered), ordered[n // 4], ordered[(3 * n) // 4], n)


@dataclass(frozen=True)
class Trial:
    """One way to run a model, and what became of it.

    Attributes:
        name: e.g. ``"packed fp32"``.
        seconds: of a call; None where it could not run.
        speedup: times faster than the eager model, from calls of the same round.
        error: largest difference of a score from the eager model's; None where it could not run.
        build_seconds: preparing it, compilation included.
        problem: why it could not be chosen: its failure, or an error above the tolerance; None: it could.
    """

    name: str
    seconds: Spread | None = None
    speedup: Spread | None = None
    error: float | None = None
    build_seconds: float = 0.0
    problem: str | None = None


def _seconds(call: Call, calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def time_in_turns(
    calls: Mapping[str, Call], seconds: float, device: torch.device, failed: Callable[[str, Exception], None]
) -> dict[str, list[float]]:
    """Time calls round by round, so that a drift of the machine's speed meets all of them.

    Args:
        calls: by name.
        seconds: to spend; five rounds are made in any case.
        device: whose clock counts.
        failed: told of a call that raised; it takes no further part.

    Returns:
        Seconds a call, one of each round, for the calls that did not fail.
    """
    left = dict(calls)
    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in left}

    def attempt(name: str, work: Callable[[], float]) -> float | None:
        try:
            return work()
        except Exception as error:  # out of memory, say: one way less
            failed(name, error)
            del left[name], samples[name]
            return None

    began = time.perf_counter()
    for name in list(left):
        warm = attempt(name, lambda call=left[name]: min(_seconds(call, 1, device) for _ in range(2)))  # type: ignore[misc]
        if warm is not None:
            repeats[name] = max(1, min(500, int(_BLOCK / max(warm, 1e-9))))
    rounds = 0
    while left and rounds < _MOST and (rounds < _FEWEST or time.perf_counter() - began < seconds):
        names = list(left)
        first = rounds % len(names)  # nobody always follows the same neighbour
        for name in names[first:] + names[:first]:
            taken = attempt(name, lambda name=name: _one(left[name], repeats[name], device))  # type: ignore[misc]
            if taken is not None:
                samples[name].append(taken)
        rounds += 1
    return samples


def _one(call: Call, calls: int, device: torch.device) -> float:
    if calls > 1:
        call()  # not timed: what the one before left in the caches is not this one's
    return _seconds(call, calls, device)


def speedups(samples: Mapping[str, Sequence[float]], peer: str) -> dict[str, Spread]:
    """Times faster than one of them, from calls of the same round.

    Args:
        samples: seconds, one of each round, by name.
        peer: whose time is divided by the others'.
    """
    return {
        name: Spread.of([theirs / own for theirs, own in zip(samples[peer], taken, strict=True)])
        for name, taken in samples.items()
    }


def choose(faster: Mapping[str, Spread], margin: float) -> str:
    """The simplest whose median is not beaten by the margin.

    Args:
        faster: times faster than one peer, by name; simplest first.
        margin: share by which the fastest must be ahead of a simpler one, e.g. 0.03.

    Returns:
        A name.
    """
    enough = max(spread.median for spread in faster.values()) / (1 + margin)
    return next(name for name, spread in faster.items() if spread.median >= enough)


def table(trials: Sequence[Trial], chosen: str) -> str:
    """Trials as text, one a line; the chosen one has a star."""
    rows = [("", "way", "time", "quartiles", "x eager", "score error", "built in", "")]
    for trial in trials:
        mark = "*" if trial.name == chosen else ""
        spread, speedup = trial.seconds, trial.speedup
        rows.append(
            (
                mark,
                trial.name,
                "-" if spread is None else duration(spread.median),
                "" if spread is None else f"{duration(spread.low)} .. {duration(spread.high)}",
                "" if speedup is None else f"{speedup.median:.2f} [{speedup.low:.2f}, {speedup.high:.2f}]",
                "" if trial.error is None else f"{trial.error:.1e}",
                duration(trial.build_seconds),
                trial.problem or "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = ("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
