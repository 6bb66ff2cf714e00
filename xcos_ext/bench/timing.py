"""Timing done right: warm-up until calls are steady, contenders in turns, each clock read as its device needs it.

A round gives every contender a block of calls. One call before the block is not timed, so that what the contender
before it left in caches and allocators is not this one's; with cold caches every call is preceded by a flush instead.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from .machine import available_memory, cache_bytes

__all__ = ["Clock", "ColdCache", "Contender", "DeviceClock", "HostClock", "Measured", "measure_in_turns"]

Call = Callable[[], Any]

#: Rounds that a case gets at least, and what it gets where a call alone takes longer than the budget.
_ROUNDS, _SLOW_ROUNDS = 7, 3
#: What a budget is divided into where calls are short.
_WANTED_ROUNDS = 20
#: Calls of one block, at most.
_MOST_CALLS = 500
#: Warm-up ends when two windows of calls in a row have medians this close, or after this share of the budget.
_STEADY, _WARM_SHARE = 0.03, 0.5
_WINDOW = 5


class Clock(Protocol):
    """How calls are timed on a device."""

    name: str

    def wait(self) -> None:
        """Until everything that was started has ended."""

    def each(self, call: Call, calls: int, flush: Call | None) -> list[float]:
        """Seconds of each of some calls."""

    def together(self, call: Call, calls: int) -> float:
        """Seconds a call where many follow each other."""


class HostClock:
    """``time.perf_counter_ns`` around calls that return when their work is done."""

    name = "host"

    def wait(self) -> None:
        """Nothing runs on."""

    def each(self, call: Call, calls: int, flush: Call | None) -> list[float]:
        """Seconds of each call."""
        now, taken = time.perf_counter_ns, []
        for _ in range(calls):
            if flush is not None:
                flush()
            start = now()
            call()
            taken.append((now() - start) * 1e-9)
        return taken

    def together(self, call: Call, calls: int) -> float:
        """Seconds a call."""
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return max(time.perf_counter_ns() - start, 1) * 1e-9 / calls


class DeviceClock:
    """CUDA events on the current stream: synchronised around each call for its latency, around many for throughput."""

    name = "cuda events"

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda

    def wait(self) -> None:
        """Until the device is idle."""
        self._cuda.synchronize()

    def _between(self, call: Call, calls: int) -> float:
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def each(self, call: Call, calls: int, flush: Call | None) -> list[float]:
        """Seconds from an idle device to the end of each call's work, launching included."""
        taken = []
        for _ in range(calls):
            if flush is not None:
                flush()
            self.wait()
            taken.append(self._between(call, 1))
        return taken

    def together(self, call: Call, calls: int) -> float:
        """Seconds a call, the device never waiting for the host to look."""
        self.wait()
        return self._between(call, calls) / calls


class ColdCache:
    """Empties caches by going over a buffer that is larger than they are.

    On a CPU, torch's own threads read and write 1.25 times the last-level cache, so that every core's private caches
    are emptied too; on a GPU, twice its L2 is overwritten on the current stream.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Attributes:
        bytes: of the buffer.
        whole: whether it is as large as it should be; a quarter of the free memory is the limit.
    """

    def __init__(self, device: str) -> None:
        import torch

        if device == "cuda":
            wanted = 2 * int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
            limit = int(torch.cuda.mem_get_info()[0]) // 4
        else:
            wanted, limit = cache_bytes() * 5 // 4, available_memory() // 4
        self.bytes = min(wanted, limit) // 8 * 8
        self.whole = wanted <= limit
        self._buffer = torch.zeros(self.bytes // 8, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        self._buffer.add_(1)


@dataclass
class Contender:
    """One thing to time.

    Attributes:
        name: for messages.
        call: does it once.
        clock: how it is timed.
        flush: empties the caches before each call; None: they stay warm.
    """

    name: str
    call: Call
    clock: Clock
    flush: Call | None = None


@dataclass
class Measured:
    """What a contender took.

    Attributes:
        rounds: seconds of each call, round by round.
        bursts: seconds a call where calls follow each other, one figure a round; empty with cold caches.
        warm_calls: calls before the first that counts.
        steady: whether these had become steady.
        failure: why there are no more; None: all went well.
    """

    rounds: list[list[float]] = field(default_factory=list)
    bursts: list[float] = field(default_factory=list)
    warm_calls: int = 0
    steady: bool = False
    failure: str | None = None

    @property
    def calls(self) -> int:
        """Timed calls."""
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


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _warm_up(contender: Contender, seconds: float, measured: Measured) -> float:
    """Calls until they are steady; returns the seconds of a typical call."""
    clock, begin = contender.clock, time.perf_counter()
    taken = clock.each(contender.call, 2, None)  # the first one allocates, and may compile
    before: float | None = None
    while time.perf_counter() - begin < _WARM_SHARE * seconds:
        # Windows of a hundredth of the budget: short calls reach full clocks in their own time.
        size = max(_WINDOW, min(_MOST_CALLS, int(0.01 * seconds / max(taken[-1], 1e-9))))
        window: list[float] = []
        while len(window) < size and time.perf_counter() - begin < _WARM_SHARE * seconds:
            window += clock.each(contender.call, 1, None)
        taken += window
        if len(window) < size:
            break
        now = _median(window)
        if before is not None and abs(now - before) <= _STEADY * before:
            measured.steady = True
            break
        before = now
    measured.warm_calls = len(taken)
    return _median(taken[-_WINDOW:])


@dataclass
class _Turn:
    """A contender with its results and how many calls a round gives it."""

    contender: Contender
    measured: Measured
    calls: int
    slow: bool

    def take(self) -> None:
        """Its block of calls of one round."""
        contender, clock = self.contender, self.contender.clock
        if contender.flush is None and not self.slow:
            contender.call()
            clock.wait()
        self.measured.rounds.append(clock.each(contender.call, self.calls, contender.flush))
        if contender.flush is not None:
            return
        if isinstance(clock, HostClock):  # the calls followed each other as it is
            self.measured.bursts.append(sum(self.measured.rounds[-1]) / self.calls)
        else:
            self.measured.bursts.append(clock.together(contender.call, max(self.calls, 3)))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def measure_in_turns(
    contenders: Sequence[Contender], seconds: float, *, tick: Callable[[float], None] | None = None
) -> list[Measured]:
    """Times contenders in turns, round by round.

    Args:
        contenders: what to time; one that raises is left out from then on, and its ``failure`` says why.
        seconds: to spend on each, warm-up and untimed calls included. At least seven rounds are taken all the same, or
            three where a single call takes longer than that.
        tick: told the share that is done.

    Returns:
        What each took, in their order.
    """
    results = [Measured() for _ in contenders]
    turns: list[_Turn] = []
    with _no_collection():
        for contender, measured in zip(contenders, results, strict=True):
            try:
                once = _warm_up(contender, seconds, measured)
                spent = once
                if contender.flush is not None:
                    begin = time.perf_counter()
                    spent += _median(contender.clock.each(contender.flush, 3, None))
                    spent = max(spent, (time.perf_counter() - begin) / 3)
            except Exception as error:
                measured.failure = _one_line(error)
                continue
            share = (1 - _WARM_SHARE) * seconds / _WANTED_ROUNDS
            calls = max(1, min(_MOST_CALLS, int(share / max(spent, 1e-9)) - 1))
            turns.append(_Turn(contender, measured, calls, slow=once > seconds))
        least = _ROUNDS if not any(turn.slow for turn in turns) else _SLOW_ROUNDS
        budget = (1 - _WARM_SHARE) * seconds * max(len(turns), 1)
        begin, done = time.perf_counter(), 0
        while turns and (done < least or time.perf_counter() - begin < budget):
            for turn in list(turns):
                try:
                    turn.take()
                except Exception as error:
                    turn.measured.failure = _one_line(error)
                    turns.remove(turn)
            done += 1
            if tick is not None:
                tick(min(1.0, max(done / least / 2, (time.perf_counter() - begin) / max(budget, 1e-9))))
    return results
