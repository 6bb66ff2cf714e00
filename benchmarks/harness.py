"""Measuring: contenders side by side in one run, medians with spread, results as JSON.

Contenders of a case take turns round by round, so that a drift of the machine's speed meets all of them, each after one
call that is not timed; ratios are taken within a round and their median is reported.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import xcos_ext.bench

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Case:
    """Functions to time against each other on one input.

    Attributes:
        name: Unique, e.g. ``xcos_score/forward/fp32``.
        contenders: Function by name; "xcos_ext" is ours.
        bytes_moved: Bytes a contender must read and write, by name, for the ones where bandwidth is of interest.
        targets: ``(contender, bound, text)``: how many times faster than it ours should be. Instead of a contender,
            "seconds" (at most), "bandwidth" (share, at least), "pairs" (a second, at least), or a fact (at most).
        budget: Seconds to spend on the case.
        scale: Factor by contender, for one too slow to run whole: it runs a part, and its time is multiplied.
        pairs: Pairs of faces a call scores; gives pairs/s.
        multiply_adds: Multiply-adds of a call, by contender, for the ones where arithmetic is of interest.
        facts: Whatever else was measured on the way: errors, memory.
    """

    name: str
    contenders: dict[str, Callable[[], Any]]
    bytes_moved: dict[str, int] = field(default_factory=dict)
    targets: list[tuple[str, float, str]] = field(default_factory=list)
    device: str = "cpu"
    budget: float = 8.0
    note: str = ""
    scale: dict[str, float] = field(default_factory=dict)
    pairs: int | None = None
    multiply_adds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Timing:
    """Seconds per call: median and quartiles over ``rounds``."""

    median: float
    low: float
    high: float
    rounds: int


def _summary(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    n = len(ordered)
    return Timing(statistics.median(ordered), ordered[n // 4], ordered[(3 * n) // 4], n)


def spread(samples: list[float]) -> dict[str, float]:
    """Median, quartiles and number of samples, for a results file."""
    return asdict(_summary(samples))


def _time_once(function: Callable[[], Any], repeats: int, device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begin) / repeats


def measure(case: Case) -> dict[str, Any]:
    """Times the contenders of a case in turns and returns its row of the results file."""
    repeats = {}
    for name, function in case.contenders.items():
        function()  # compiles, allocates, warms up
        once = min(_time_once(function, 1, case.device) for _ in range(3))
        repeats[name] = max(1, min(2000, int(2e-3 / max(once, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in case.contenders}
    begin, rounds = time.perf_counter(), 0
    while rounds < 7 or (time.perf_counter() - begin < case.budget and rounds < 101):
        for name, function in case.contenders.items():
            function()  # not timed: what the one before left in caches and in the allocator is not this one's
            seconds = _time_once(function, repeats[name], case.device)
            samples[name].append(seconds * case.scale.get(name, 1.0))
        rounds += 1
    timings = {name: _summary(values) for name, values in samples.items()}
    row: dict[str, Any] = {
        "name": case.name,
        "device": case.device,
        "note": case.note,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "speedup": {},
        "bandwidth": {},
        "targets": [],
        "pairs": case.pairs,
        "scaled": sorted(case.scale),
        "multiply_adds": {name: count / timings[name].median for name, count in case.multiply_adds.items()},
        "facts": case.facts,
    }
    ours = samples["xcos_ext"]
    for name in case.contenders:
        if name != "xcos_ext":
            row["speedup"][name] = asdict(_summary([p / o for p, o in zip(samples[name], ours, strict=True)]))
    for name, size in case.bytes_moved.items():
        row["bandwidth"][name] = size / timings[name].median
    if len(case.bytes_moved) == 2 and "xcos_ext" in case.bytes_moved:
        (peer,) = set(case.bytes_moved) - {"xcos_ext"}
        scale = case.bytes_moved["xcos_ext"] / case.bytes_moved[peer]
        row["bandwidth_share"] = asdict(_summary([scale * p / o for p, o in zip(samples[peer], ours, strict=True)]))
    for peer, bound, text in case.targets:
        if peer == "seconds":
            reached, met = timings["xcos_ext"].median, timings["xcos_ext"].median <= bound
        elif peer in case.facts:
            reached = case.facts[peer]
            met = reached <= bound
        elif peer == "pairs":
            assert case.pairs is not None
            reached = case.pairs / timings["xcos_ext"].median
            met = reached >= bound
        elif peer == "bandwidth":
            reached = row["bandwidth_share"]["median"]
            met = reached >= bound
        else:
            reached = row["speedup"][peer]["median"]
            met = reached >= bound
        row["targets"].append({"text": text, "bound": bound, "reached": reached, "met": met})
    return row


@functools.cache
def machine() -> dict[str, Any]:
    """What the figures belong to: see :func:`xcos_ext.bench.machine`; the commit is that of these benchmarks."""
    return xcos_ext.bench.machine(RESULTS.parent.parent)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a results file: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"schema": SCHEMA, "machine": machine(), "cases": rows}, indent=1) + "\n")
    os.replace(temporary, path)


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def describe(row: dict[str, Any]) -> str:
    """A few lines of text for one row."""
    lines = [row["name"] + (f"  ({row['note']})" if row["note"] else "")]
    for name, timing in row["seconds"].items():
        text = (
            f"    {name:<14} {duration(timing['median']):>9}  [{duration(timing['low'])} .. {duration(timing['high'])}]"
        )
        if name in row["speedup"]:
            text += f"  ours is {row['speedup'][name]['median']:.2f}x"
        if name in row["bandwidth"]:
            text += f"  {row['bandwidth'][name] / 1e9:.1f} GB/s"
        if name in row["multiply_adds"]:
            text += f"  {row['multiply_adds'][name] / 1e9:.1f} Gmac/s"
        if name == "xcos_ext" and row["pairs"]:
            text += f"  {row['pairs'] / timing['median'] / 1e6:.3g} M pairs/s"
        lines.append(text)
    for name, value in row["facts"].items():
        lines.append(f"    {name}: {value:.3g}")
    for target in row["targets"]:
        lines.append(f"    {'met   ' if target['met'] else 'MISSED'} {target['text']}: {target['reached']:.3g}")
    return "\n".join(lines)
