"""What a run found: samples, and the figures that are computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .cases import STAGES, Key
from .statistics import Estimate, Latency, latency, ratio

__all__ = ["FORMAT", "HEAD_TARGET", "SCHEMA", "Report", "Result", "Share", "Skipped"]

FORMAT = "xcos_ext.bench"
SCHEMA = 1

#: The head may take this share of a pair's time on a CPU.
HEAD_TARGET = 0.02


@dataclass(frozen=True)
class Result:
    """A case that was measured.

    Attributes:
        key: which one.
        items: units of its stage that a call does.
        clock: ``"host"`` or ``"cuda events"``.
        rounds: seconds of the calls that were kept, round by round.
        bursts: seconds a call where calls follow each other, one figure a round; empty with cold caches.
        calls: how many were timed.
        warm_calls: how many before.
        preparation: seconds that making the runtime ready took.
        detail: how the runtime does it.
        error: largest difference of a score from the eager fp32 model's; None: no scores, or not compared.
    """

    key: Key
    items: int
    clock: str
    rounds: tuple[tuple[float, ...], ...]
    bursts: tuple[float, ...]
    calls: int
    warm_calls: int = 0
    preparation: float = 0.0
    detail: str = ""
    error: float | None = None

    @cached_property
    def latency(self) -> Latency:
        """Percentiles of the kept calls."""
        return latency(self.rounds)

    @property
    def throughput(self) -> float:
        """Units of the stage a second: median over rounds of calls that follow each other; with cold caches, from the
        mean latency."""
        if not self.bursts:
            return self.items / self.latency.mean
        ordered = sorted(self.bursts)
        middle = len(ordered) // 2
        return self.items / (ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2)

    @property
    def samples(self) -> list[float]:
        """Seconds of the kept calls."""
        return [value for values in self.rounds for value in values]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **self.key.as_dict(),
            "items": self.items,
            "unit": STAGES[self.key.stage].unit,
            "clock": self.clock,
            "detail": self.detail,
            "error": self.error,
            "preparation": self.preparation,
            "warm_calls": self.warm_calls,
            "calls": self.calls,
            "latency": self.latency.as_dict(),
            "throughput": self.throughput,
            "rounds": [list(values) for values in self.rounds],
            "bursts": list(self.bursts),
        }


@dataclass(frozen=True)
class Skipped:
    """A case that was not measured. Attributes: key: which one; reason: why."""

    key: Key
    reason: str


@dataclass(frozen=True)
class Share(Estimate):
    """Share of a pair's time that a part takes: the median of the ratios within rounds, with its 95 % interval.

    Attributes:
        of_fastest: the same of the fastest calls. On a busy machine long calls are interrupted and short ones are
            not, so that medians flatter a part; these hardly are.
    """

    of_fastest: float

    def under(self, target: float) -> bool:
        """Whether the share is below a target, by the medians and by the fastest calls."""
        return max(self.median, self.of_fastest) < target


@dataclass(frozen=True)
class Report:
    """All that a run found.

    Attributes:
        machine: as :func:`xcos_ext.bench.machine` says.
        conditions: of the machine, ``"start"`` and ``"end"``.
        model: name, fingerprint, architecture, parameters.
        settings: of the run.
        results: what was measured.
        skipped: what was not, with reasons.
        groups: how the machine did meanwhile, for each group of cases.
        warnings: what may have disturbed the figures.
    """

    machine: Mapping[str, Any]
    conditions: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: Sequence[Result]
    skipped: Sequence[Skipped] = ()
    groups: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    warnings: Sequence[str] = ()

    def find(self, key: Key) -> Result | None:
        """The case of a key, if it was measured."""
        return next((result for result in self.results if result.key == key), None)

    def shares(self, part: str = "head") -> dict[Key, Share]:
        """Share of a pair's time that a part of the way takes, by the pair's case.

        Args:
            part: ``"head"``, or ``"projection"``, whose time for both faces counts.
        """
        found = {}
        for pair in self.results:
            key = pair.key
            if key.stage != "pair":
                continue
            other = self.find(replace(key, stage=part))
            if other is None or len(other.rounds) != len(pair.rounds):
                continue
            share = ratio(other.rounds, pair.rounds, paired=True)
            faces = 2 if STAGES[part].unit == "pictures" else 1
            found[key] = Share(
                faces * share.median,
                faces * share.low,
                faces * share.high,
                faces * other.latency.fastest / pair.latency.fastest,
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; :func:`xcos_ext.bench.read_report` reads it."""
        shares = [
            {
                **key.as_dict(),
                "share": share.median,
                "low": share.low,
                "high": share.high,
                "of_fastest": share.of_fastest,
                "target": HEAD_TARGET if key.device == "cpu" else None,
                "met": share.under(HEAD_TARGET) if key.device == "cpu" else None,
            }
            for key, share in self.shares().items()
        ]
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "machine": dict(self.machine),
            "conditions": dict(self.conditions),
            "model": dict(self.model),
            "settings": dict(self.settings),
            "cases": [result.as_dict() for result in self.results],
            "skipped": [{**skipped.key.as_dict(), "reason": skipped.reason} for skipped in self.skipped],
            "groups": [dict(group) for group in self.groups],
            "head_share": shares,
            "warnings": list(self.warnings),
        }
