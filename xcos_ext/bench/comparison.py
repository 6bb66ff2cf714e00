"""What changed between two runs beyond noise.

Two runs are two draws of the same machine's moods, so a small difference between them says little even where it is far
beyond the scatter within each. A case has changed if four things hold: the 99 % interval of the ratio of the medians
(rounds drawn with replacement, each run for itself) leaves out 1; a Mann-Whitney test of the calls agrees at the 1 %
level, corrected for the number of cases (Holm); the change is no smaller than a minimum; and the fast calls moved with
the median, which they do when the program changed and do not when something else was at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from xcos_ext.io.errors import XCosError

from .cases import Key
from .estimates import Estimate, mann_whitney, ratio
from .results import Report

__all__ = ["MINIMUM_EFFECT", "Change", "Comparison", "Verdict", "compare"]

Verdict = Literal["slower", "faster", "unclear", "same"]

#: Smaller changes are not called changes: two runs of one thing differ by a few per cent.
MINIMUM_EFFECT = 0.05
_CONFIDENCE, _LEVEL = 0.99, 0.01


@dataclass(frozen=True)
class Change:
    """A case that both runs have. :func:`compare` makes them.

    Attributes:
        key: which one.
        old, new: median seconds a call.
        ratio: new over old, with its 99 % interval.
        fast: the same of the 10th percentiles.
        p: of the Mann-Whitney test, corrected for the number of cases.
        verdict: ``"slower"``, ``"faster"``; ``"same"``: below the minimum effect, and the interval leaves out changes
            of twice that size; or ``"unclear"``: the runs cannot tell.
    """

    key: Key
    old: float
    new: float
    ratio: Estimate
    fast: float
    p: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Two runs held against each other. :func:`compare` makes one.

    Attributes:
        changes: cases that both have.
        only_old, only_new: cases that one has.
        differences: what is not the same of machine, model and settings, so that the figures are not of the same thing.
        versions: software that changed, which is what such a comparison is for.
        minimum: the smallest change that counts.
        disturbed: runs in which something else was at work, of ``"old"`` and ``"new"``.
    """

    changes: Sequence[Change]
    only_old: Sequence[Key]
    only_new: Sequence[Key]
    differences: Sequence[str]
    versions: Sequence[str]
    minimum: float
    disturbed: Sequence[str] = ()

    @property
    def warning(self) -> str | None:
        """One sentence if the runs are not of the same machine, model and settings, or were disturbed."""
        parts = []
        if self.differences:
            parts.append(f"the runs are not of the same thing ({'; '.join(self.differences)})")
        if self.disturbed:
            runs = "both runs were" if len(self.disturbed) > 1 else f"the {self.disturbed[0]} run was"
            parts.append(f"{runs} disturbed by other work")
        return f"{', and '.join(parts)}: changes need not be the code's" if parts else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = asdict(self)
        data["minimum_effect"] = data.pop("minimum")
        data["changes"] = [{**change.pop("key"), **change} for change in data["changes"]]
        return data


def _facts(report: Report) -> dict[str, Any]:
    """What must be the same, or the figures are not of the same thing."""
    machine, model, settings = report.machine, report.model, report.settings
    return {
        "processor": machine["processor"],
        "cores": machine.get("cores"),
        "GPU": report.gpu,
        "threads": machine["threads"],
        "model": f"{model['name']} {model['fingerprint']}",
        "cold caches": settings.get("cold"),
        "gallery": settings.get("gallery"),
        "detector": settings.get("detector"),
        "TF32": settings.get("tf32"),
    }


def _software(report: Report) -> dict[str, Any]:
    """What may change, which is what such a comparison is for."""
    machine = report.machine
    return {"commit": machine["commit"][:10], "torch": machine["torch"], "python": machine.get("python")}


def _different(old: dict[str, Any], new: dict[str, Any], word: str) -> list[str]:
    def shown(value: Any) -> str:
        return "none" if value is None or value == "" else str(value)[:80]

    return [f"{name} {shown(a)} {word} {shown(new[name])}" for name, a in old.items() if a != new[name]]


def _holm(values: Sequence[float]) -> list[float]:
    """Holm's correction of p-values (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(values)
    corrected = np.empty(len(values))
    corrected[order] = np.maximum.accumulate(np.asarray(values)[order] * np.arange(len(values), 0, -1))
    return np.minimum(corrected, 1).tolist()  # type: ignore[no-any-return]


def _verdict(change: Estimate, fast: float, p: float, minimum: float) -> Verdict:
    # Alike in either direction: 1.05 times the time, 1.05 times the speed.
    if max(change.median, 1 / change.median) < 1 + minimum:
        return "same" if max(change.high, 1 / change.low) < 1 + 2 * minimum else "unclear"
    moved = fast if change.median > 1 else 1 / fast
    if change.low <= 1 <= change.high or p >= _LEVEL or moved < 1 + minimum / 2:
        return "unclear"
    return "slower" if change.median > 1 else "faster"


def compare(old: Report, new: Report, *, minimum: float = MINIMUM_EFFECT) -> Comparison:
    """Which cases changed from one run to another.

    >>> from xcos_ext.bench import Result
    >>> def made(*seconds):
    ...     rounds = tuple((s, 1.01 * s) for s in seconds)
    ...     case = Result(Key("pair", "eager", "cpu", "fp32", 1), 1, "host", rounds, seconds, calls=2 * len(rounds))
    ...     place = {"processor": "", "threads": 1, "torch": "", "commit": "", "date": ""}
    ...     return Report(place, {}, {"name": "a", "fingerprint": "f"}, {}, [case])
    >>> compare(made(*[0.1, 0.11] * 5), made(*[0.2, 0.21] * 5)).changes[0].verdict
    'slower'

    Args:
        old, new: the runs; cases are told by stage, runtime, device, dtype and batch.
        minimum: the smallest change of the median that counts, e.g. 0.05.

    Raises:
        ValueError: a minimum that is negative or not below 1.
        XCosError: no case that both have.
        MissingPackageError: scipy is not installed.
    """
    if not 0 <= minimum < 1:
        raise ValueError(f"minimum: expected 0 or more and less than 1, got {minimum:g}")
    before = {result.key: result for result in old.results}
    after = {result.key: result for result in new.results}
    both = [key for key in after if key in before]
    if not both:
        raise XCosError("the two runs have no case in common: nothing can be compared")
    tests = _holm([mann_whitney(after[key].samples, before[key].samples) for key in both])
    changes = []
    for key, p in zip(both, tests, strict=True):
        a, b = before[key], after[key]
        found = ratio(b.rounds, a.rounds, paired=False, confidence=_CONFIDENCE)
        fast = float(np.percentile(b.samples, 10) / np.percentile(a.samples, 10))
        changes.append(Change(key, a.latency.p50, b.latency.p50, found, fast, p, _verdict(found, fast, p, minimum)))
    disturbed = {
        name: any(group.get("disturbed") is True for group in report.groups)
        for name, report in (("old", old), ("new", new))
    }
    return Comparison(
        changes=changes,
        only_old=[key for key in before if key not in after],
        only_new=[key for key in after if key not in before],
        differences=_different(_facts(old), _facts(new), "and"),
        versions=_different(_software(old), _software(new), "to"),
        minimum=minimum,
        disturbed=[name for name, was in disturbed.items() if was],
    )
