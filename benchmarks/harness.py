"""Measuring: contenders side by side in one run, medians with spread, results as JSON.

Contenders of a case take turns (:mod:`xcos_ext.deploy.timing`); ratios are taken within a round and their median is
reported.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from tables import RESULTS, duration

import xcos_ext.bench
from xcos_ext.deploy.timing import Contender, Spread, clock_for, measure_in_turns
from xcos_ext.io.atomic import write_atomically

K = TypeVar("K")


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


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of samples, for a results file."""
    found = Spread.of(samples)
    return {"median": found.median, "low": found.low, "high": found.high, "rounds": found.samples}


def in_turns(
    calls: Mapping[K, Callable[[], Any]], seconds: float, device: torch.device | str = "cpu"
) -> dict[K, list[float]]:
    """Seconds a call, one figure a round, of calls that take turns.

    Args:
        calls: by name.
        seconds: to spend on all of them; seven rounds are made in any case.
        device: whose clock counts.

    Raises:
        Exception: what a call raises.
    """
    contenders = [Contender(call, clock_for(device)) for call in calls.values()]
    samples = {}
    found = measure_in_turns(contenders, seconds / len(contenders), one_by_one=False, least=7)
    for name, measured in zip(calls, found, strict=True):
        if measured.failure is not None:
            raise measured.failure
        samples[name] = measured.bursts
    return samples


def measure(case: Case) -> dict[str, Any]:
    """Times the contenders of a case in turns and returns its row of the results file."""
    samples = {
        name: [case.scale.get(name, 1.0) * seconds for seconds in taken]
        for name, taken in in_turns(case.contenders, case.budget, case.device).items()
    }
    timings = {name: spread(values) for name, values in samples.items()}

    def times(peer: str, scale: float = 1.0) -> dict[str, float]:
        return spread([scale * a / b for a, b in zip(samples[peer], samples["xcos_ext"], strict=True)])

    row: dict[str, Any] = {
        "name": case.name,
        "device": case.device,
        "note": case.note,
        "seconds": timings,
        "speedup": {name: times(name) for name in case.contenders if name != "xcos_ext"},
        "bandwidth": {name: size / timings[name]["median"] for name, size in case.bytes_moved.items()},
        "targets": [],
        "pairs": case.pairs,
        "scaled": sorted(case.scale),
        "multiply_adds": {name: count / timings[name]["median"] for name, count in case.multiply_adds.items()},
        "facts": case.facts,
    }
    if len(case.bytes_moved) == 2 and "xcos_ext" in case.bytes_moved:
        (peer,) = set(case.bytes_moved) - {"xcos_ext"}
        scale = case.bytes_moved["xcos_ext"] / case.bytes_moved[peer]
        row["bandwidth_share"] = times(peer, scale)
    median = timings["xcos_ext"]["median"]
    at_most = {"seconds": median, **case.facts}
    at_least = {name: speed["median"] for name, speed in row["speedup"].items()}
    at_least["pairs"] = (case.pairs or 0) / median
    if "bandwidth_share" in row:
        at_least["bandwidth"] = row["bandwidth_share"]["median"]
    for peer, bound, text in case.targets:
        reached = at_most[peer] if peer in at_most else at_least[peer]
        met = reached <= bound if peer in at_most else reached >= bound
        row["targets"].append({"text": text, "bound": bound, "reached": reached, "met": met})
    return row


@functools.cache
def machine() -> dict[str, Any]:
    """What the figures belong to: see :func:`xcos_ext.bench.machine`; the commit is that of these benchmarks."""
    return xcos_ext.bench.machine(RESULTS.parent.parent)


def write_json(path: Path, data: Any, indent: int | None = 1) -> None:
    """Writes a results file: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(f"{json.dumps(data, indent=indent)}\n".encode()))


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
