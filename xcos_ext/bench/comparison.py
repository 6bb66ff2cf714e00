"""What changed between two runs beyond noise.

Two runs are two draws of the same machine's moods, so a small difference between them says little even where it is far
beyond the scatter within each. A case has changed if four things hold: the 99 % interval of the ratio of the medians
(rounds drawn with replacement, each run for itself) leaves out 1; a Mann-Whitney test of the calls agrees at the 1 %
level, corrected for the number of cases (Holm); the change is no smaller than a minimum; and the fast calls moved with
the median, which they do when the program changed and do not when something else was at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .cases import Key
from .report import Report, Result
from .statistics import Estimate, mann_whitney, ratio

__all__ = ["MINIMUM_EFFECT", "Change", "Comparison", "Verdict", "compare"]

Verdict = Literal["slower", "faster", "same", "unclear"]

#: Smaller changes are not called changes: two runs of one thing differ by a few per cent.
MINIMUM_EFFECT = 0.05
_CONFIDENCE, _LEVEL = 0.99, 0.01

#: What a run was told that figures depend on.
_OF_SETTINGS = {"cold caches": "cold", "gallery": "gallery", "detector": "detector", "TF32": "tf32"}


@dataclass(frozen=True)
class Change:
    """A case that both runs have.

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
    """Two runs held against each other.

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
        return {
            "minimum_effect": self.minimum,
            "differences": list(self.differences),
            "versions": list(self.versions),
            "disturbed": list(self.disturbed),
            "changes": [
                {
                    **change.key.as_dict(),
                    "old": change.old,
                    "new": change.new,
                    "ratio": {"median": change.ratio.median, "low": change.ratio.low, "high": change.ratio.high},
                    "fast": change.fast,
                    "p": change.p,
                    "verdict": change.verdict,
                }
                for change in self.changes
            ],
            "only_old": [key.as_dict() for key in self.only_old],
            "only_new": [key.as_dict() for key in self.only_new],
        }


def _gpu(report: Report) -> Any:
    gpu = report.machine.get("gpu")
    return gpu.get("name") if isinstance(gpu, dict) else None


def _differences(old: Report, new: Report) -> list[str]:
    pairs = {
        "processor": (old.machine["processor"], new.machine["processor"]),
        "cores": (old.machine.get("cores"), new.machine.get("cores")),
        "GPU": (_gpu(old), _gpu(new)),
        "threads": (old.machine["threads"], new.machine["threads"]),
        "model": tuple(f"{report.model['name']} {report.model['fingerprint']}" for report in (old, new)),
        **{name: (old.settings.get(key), new.settings.get(key)) for name, key in _OF_SETTINGS.items()},
    }
    return [f"{name} {_shown(a)} and {_shown(b)}" for name, (a, b) in pairs.items() if a != b]


def _versions(old: Report, new: Report) -> list[str]:
    pairs = {
        "commit": tuple(report.machine["commit"][:10] for report in (old, new)),
        "torch": (old.machine["torch"], new.machine["torch"]),
        "python": (old.machine.get("python"), new.machine.get("python")),
    }
    return [f"{name} {_shown(a)} to {_shown(b)}" for name, (a, b) in pairs.items() if a != b]


def _shown(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)[:80]


def _holm(values: Sequence[float]) -> list[float]:
    """Holm's correction of p-values (Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, highest = [1.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, values[place] * (len(values) - rank)))
        corrected[place] = highest
    return corrected


def _fast(result: Result) -> float:
    return float(np.percentile(result.samples, 10))


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

    Args:
        old, new: the runs; cases are told by stage, runtime, device, dtype and batch.
        minimum: the smallest change of the median that counts, e.g. 0.05.

    Raises:
        ValueError: a minimum that is negative or not below 1.
        XCosError: no case that both have.
        MissingPackageError: scipy is not installed.
    """
    from xcos_ext.io.errors import XCosError

    if not 0 <= minimum < 1:
        raise ValueError(f"minimum: expected 0 or more and less than 1, got {minimum:g}")
    before = {result.key: result for result in old.results}
    after = {result.key: result for result in new.results}
    both = [key for key in after if key in before]
    if not both:
        raise XCosError("the two runs have no case in common: nothing can be compared")
    ratios = [ratio(after[key].rounds, before[key].rounds, paired=False, confidence=_CONFIDENCE) for key in both]
    tests = _holm([mann_whitney(after[key].samples, before[key].samples) for key in both])
    changes = []
    for key, found, p in zip(both, ratios, tests, strict=True):
        a, b = before[key], after[key]
        fast = _fast(b) / _fast(a)
        changes.append(Change(key, a.latency.p50, b.latency.p50, found, fast, p, _verdict(found, fast, p, minimum)))
    return Comparison(
        changes=changes,
        only_old=[key for key in before if key not in after],
        only_new=[key for key in after if key not in before],
        differences=_differences(old, new),
        versions=_versions(old, new),
        minimum=minimum,
        disturbed=[
            name
            for name, report in (("old", old), ("new", new))
            if any(group.get("disturbed") is True for group in report.groups)
        ],
    )
