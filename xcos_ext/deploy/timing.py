"""Timing of calls: warm-up until they are steady, contenders in turns, each clock read as its device needs it.

A round gives every contender a block of calls. One call before the block is not timed, so that what the contender
before it left in caches and allocators is not this one's; with cold caches every call is preceded by a flush instead.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Clock", "Contender", "DeviceClock", "Measured", "Spread", "clock_for", "measure_in_turns"]

Call = Callable[[], Any]

#: Rounds that a contender gets at least, what it gets where a call alone takes longer than the budget, and at most
#: where calls are not timed one by one.
_ROUNDS, _SLOW_ROUNDS, _MOST_ROUNDS = 7, 3, 201
#: What a budget is divided into where calls are short.
_WANTED_ROUNDS = 20
#: Calls of one block at most, and how long a block of calls lasts that are not timed one by one.
_MOST_CALLS, _BLOCK = 500, 2e-3
#: Warm-up ends when two windows of calls in a row have medians this close, or after this share of the budget.
_STEADY, _WARM_SHARE = 0.03, 0.5
_WINDOW = 5


class Clock:
    """``time.perf_counter_ns`` around calls that return when their work is done."""

    name = "host"

    def wait(self) -> None:
        """Until everything that was started has ended: here nothing runs on."""

    def seconds(self, call: Call, calls: int) -> float:
        """Seconds that some calls take which follow each other."""
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return max(time.perf_counter_ns() - start, 1) * 1e-9

    def each(self, call: Call, calls: int, flush: Call | None = None) -> list[float]:
        """Seconds of each of some calls, from an idle device to the end of the work; flushing is not timed."""
        taken = []
        for _ in range(calls):
            if flush is not None:
                flush()
            self.wait()
            taken.append(self.seconds(call, 1))
        return taken

    def together(self, call: Call, calls: int) -> float:
        """Seconds a call where many follow each other, the device never waiting for the host to look."""
        self.wait()
        return self.seconds(call, calls) / calls


class DeviceClock(Clock):
    """CUDA events on the current stream."""

    name = "cuda events"

    def __init__(self) -> None:
        self._cuda = torch.cuda

    def wait(self) -> None:
        """Until the device is idle."""
        self._cuda.synchronize()

    def seconds(self, call: Call, calls: int) -> float:
        """Seconds from one event to another, launching included."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def clock_for(device: torch.device | str) -> Clock:
    """How calls are timed whose work lies on a device."""
    return DeviceClock() if torch.device(device).type == "cuda" else Clock()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some samples.

    >>> Spread.of([3.0, 1.0, 2.0])
    Spread(median=2.0, low=1.0, high=3.0, samples=3)
    >>> Spread.of_ratios([2.0, 8.0], [1.0, 4.0]).median
    2.0
    """

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

    @classmethod
    def of_ratios(cls, top: Sequence[float], bottom: Sequence[float]) -> Spread:
        """Of the ratios within rounds, so that a drift of the machine's speed cancels; one sample of each round."""
        return cls.of([a / b for a, b in zip(top, bottom, strict=True)])


@dataclass
class Contender:
    """One thing to time.

    Attributes:
        call: does it once.
        clock: how it is timed.
        flush: empties the caches before each call; None: they stay warm.
    """

    call: Call
    clock: Clock
    flush: Call | None = None


@dataclass
class Measured:
    """What a contender took.

    Attributes:
        rounds: seconds of each call, round by round; empty where calls are not timed one by one.
        bursts: seconds a call where calls follow each other, one figure a round; empty with cold caches.
        warm_calls: calls before the first that counts.
        steady: whether these had become steady.
        failure: why there are no more; None: all went well.
    """

    rounds: list[list[float]] = field(default_factory=list)
    bursts: list[float] = field(default_factory=list)
    warm_calls: int = 0
    steady: bool = False
    failure: Exception | None = None

    @property
    def calls(self) -> int:
        """Calls that were timed one by one."""
        return sum(map(len, self.rounds))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector off, as timeit has it."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _warm_up(contender: Contender, seconds: float, measured: Measured) -> float:
    """Calls until they are steady; returns the seconds of a typical call."""
    clock, begin = contender.clock, time.perf_counter()
    taken = clock.each(contender.call, 2)  # the first one allocates, and may compile
    before: float | None = None
    while time.perf_counter() - begin < _WARM_SHARE * seconds:
        # Windows of a hundredth of the budget: short calls reach full clocks in their own time.
        size = max(_WINDOW, min(_MOST_CALLS, int(0.01 * seconds / max(taken[-1], 1e-9))))
        window: list[float] = []
        while len(window) < size and time.perf_counter() - begin < _WARM_SHARE * seconds:
            window += clock.each(contender.call, 1)
        taken += window
        if len(window) < size:
            break
        now = statistics.median(window)
        if before is not None and abs(now - before) <= _STEADY * before:
            measured.steady = True
            break
        before = now
    measured.warm_calls = len(taken)
    return min(taken) if len(taken) == 2 else statistics.median(taken[-_WINDOW:])


@dataclass
class _Turn:
    """A contender with its results and how many calls a round gives it."""

    contender: Contender
    measured: Measured
    calls: int
    slow: bool
    one_by_one: bool

    def take(self) -> None:
        """Its block of calls of one round."""
        contender, clock, measured = self.contender, self.contender.clock, self.measured
        if contender.flush is None and not self.slow:
            contender.call()
        if not self.one_by_one:
            measured.bursts.append(clock.together(contender.call, self.calls))
            return
        measured.rounds.append(clock.each(contender.call, self.calls, contender.flush))
        if contender.flush is not None:
            return
        if isinstance(clock, DeviceClock):
            measured.bursts.append(clock.together(contender.call, max(self.calls, 3)))
        else:  # the calls followed each other as it is
            measured.bursts.append(sum(measured.rounds[-1]) / self.calls)


def _turn(contender: Contender, measured: Measured, seconds: float, one_by_one: bool) -> _Turn:
    """A contender that is warm, with the calls that a round has time for."""
    once = spent = _warm_up(contender, seconds, measured)
    if contender.flush is not None:
        begin = time.perf_counter()
        flushing = statistics.median(contender.clock.each(contender.flush, 3))
        spent = max(once + flushing, (time.perf_counter() - begin) / 3)
    share = (1 - _WARM_SHARE) * seconds / _WANTED_ROUNDS - spent if one_by_one else _BLOCK
    calls = max(1, min(_MOST_CALLS, int(share / max(spent, 1e-9))))
    return _Turn(contender, measured, calls, once > seconds, one_by_one)


def measure_in_turns(
    contenders: Sequence[Contender],
    seconds: float,
    *,
    one_by_one: bool = True,
    least: int | None = None,
    tick: Callable[[float], None] | None = None,
) -> list[Measured]:
    """Times contenders in turns, round by round, so that a drift of the machine's speed meets all of them.

    Args:
        contenders: what to time; one that raises is left out from then on, and its ``failure`` says why.
        seconds: to spend on each, warm-up and untimed calls included.
        one_by_one: each call is timed for itself; else only blocks of calls are, and ``rounds`` stay empty.
        least: rounds that are taken in any case; None: seven, or three where a single call takes longer than the
            budget.
        tick: told the share that is done.

    Returns:
        What each took, in their order.

    >>> short, long = measure_in_turns([Contender(lambda n=n: sum(range(n)), Clock()) for n in (10, 10_000)], 0.01)
    >>> len(short.rounds) == len(long.rounds) >= 7, short.failure
    (True, None)
    """
    results = [Measured() for _ in contenders]
    turns: list[_Turn] = []
    with _no_collection():
        for contender, measured in zip(contenders, results, strict=True):
            try:
                turns.append(_turn(contender, measured, seconds, one_by_one))
            except Exception as error:
                measured.failure = error
        if least is None:
            least = _SLOW_ROUNDS if any(turn.slow for turn in turns) else _ROUNDS
        budget = (1 - _WARM_SHARE) * seconds * max(len(turns), 1)
        begin, done = time.perf_counter(), 0
        while turns and (done < least or time.perf_counter() - begin < budget):
            if not one_by_one and done == _MOST_ROUNDS:
                break
            for turn in list(turns):
                try:
                    turn.take()
                except Exception as error:
                    turn.measured.failure = error
                    turns.remove(turn)
            done += 1
            if tick is not None:
                tick(min(1.0, max(done / least / 2, (time.perf_counter() - begin) / max(budget, 1e-9))))
    return results
