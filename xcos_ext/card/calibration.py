"""What a score means: the false match rate at it, and decision thresholds, measured on impostor pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from xcos_ext.io.several import several
from xcos_ext.io.text import printable

__all__ = ["Calibration", "FMRAtScore", "FMRCurve", "check_threshold"]


class FMRAtScore(NamedTuple):
    """The false match rate of a decision threshold at one score.

    Attributes:
        rate: share of impostor pairs that score at least as high; where not ``resolved``, the smallest rate that the
            calibration can tell, and the true one is below it.
        upper95: 95 % upper confidence bound of the rate.
        resolved: whether the calibration can tell the rate.

    >>> str(FMRAtScore(0.001, 0.0015, True))
    '0.10 %, at most 0.15 % with 95 % confidence'
    """

    rate: float
    upper95: float
    resolved: bool

    def __str__(self) -> str:
        if not self.resolved:
            return f"below {_percent(self.rate)}, the smallest this calibration resolves"
        rate, upper = _percent(self.rate), _percent(self.upper95)
        return rate if rate == upper else f"{rate}, at most {upper} with 95 % confidence"


def _in_words(domains: Sequence[str]) -> str:
    names = [printable(name) for name in domains]  # they may be of somebody's file
    if len(names) < 2:
        return "".join(f", {name}" for name in names)
    return f"; the {'worse' if len(names) == 2 else 'worst'} of {', '.join(names[:-1])} and {names[-1]}"


def _percent(rate: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(100 * rate))) if rate < 0.1 else 0
    return f"{100 * rate:.{digits}f} %"


@dataclass(frozen=True)
class FMRCurve:
    """False match rate as a function of the score: a monotone table from a sample of impostor pairs.

    Between its scores the logarithm of the rate is interpolated linearly, which keeps it monotone. Made by
    :func:`xcos_ext.evaluation.fmr_curve`.

    Attributes:
        scores: [K], strictly ascending.
        rates: [K], share of the impostor pairs with at least that score, in (0, 1]; not ascending.
        upper95: [K], upper confidence bounds of the rates; not ascending.
        smallest: the smallest rate that can be told: the upper bound where no impostor pair was seen.
        pairs: number of impostor pairs.
        people: number of people in them, or None where unknown.
        domains: names of the sets of pictures that the pairs are of; several: the rate is the worst of theirs.

    Raises:
        ValueError: a table of another form.

    >>> curve = FMRCurve((0.0, 0.2, 0.4), (1.0, 0.1, 0.01), (1.0, 0.12, 0.02), smallest=0.003, pairs=1000)
    >>> round(curve.at(0.3).rate, 4), curve.at(0.9).resolved
    (0.0316, False)
    """

    scores: tuple[float, ...]
    rates: tuple[float, ...]
    upper95: tuple[float, ...]
    smallest: float
    pairs: int
    people: int | None = None
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("scores", "rates", "upper95"):
            values = np.array(getattr(self, name), dtype=np.float64)
            if values.ndim != 1 or values.size != len(self.scores) or values.size == 0 or not np.isfinite(values).all():
                raise ValueError(f"{name}: expected as many finite numbers as scores, at least one")
            object.__setattr__(self, name, tuple(values.tolist()))
        scores, rates, upper = (np.array(v) for v in (self.scores, self.rates, self.upper95))
        if (np.diff(scores) <= 0).any():
            raise ValueError("scores: expected an ascending sequence without repetitions")
        for name, values in (("rates", rates), ("upper95", upper)):
            if (np.diff(values) > 0).any() or values.min() <= 0 or values.max() > 1:
                raise ValueError(f"{name}: expected rates in (0, 1] that do not ascend")
        if (upper < rates).any():
            raise ValueError("upper95: expected bounds that are not below the rates")
        if not 0 < self.smallest <= 1:
            raise ValueError(f"smallest: expected a rate in (0, 1], got {self.smallest}")
        counts = [self.pairs] if self.people is None else [self.pairs, self.people]
        if not all(isinstance(count, int) and count >= 1 for count in counts):
            raise ValueError(f"pairs, people: expected positive numbers, got {self.pairs}, {self.people}")
        object.__setattr__(self, "domains", tuple(map(str, several(self.domains, "domains", ordered=True))))

    @property
    def sample(self) -> str:
        """What the rates were measured on, in words.

        >>> FMRCurve((0.0,), (1.0,), (1.0,), smallest=0.1, pairs=1200, people=50, domains=("LFW", "CFP")).sample
        '1,200 impostor pairs of 50 people; the worse of LFW and CFP'
        """
        people = "" if self.people is None else f" of {self.people:,} people"
        return f"{self.pairs:,} impostor pairs{people}{_in_words(self.domains)}"

    @classmethod
    def worst(cls, curves: Sequence[FMRCurve]) -> FMRCurve:
        """At every score the highest rate and bound of several curves: a claim that holds on each of their sets.

        Args:
            curves: of different sets, at least one.

        >>> one = FMRCurve((0.0, 0.4), (1.0, 0.01), (1.0, 0.02), smallest=0.001, pairs=1000, domains=("LFW",))
        >>> two = FMRCurve((0.0, 0.5), (1.0, 0.01), (1.0, 0.02), smallest=0.001, pairs=1000, domains=("CFP",))
        >>> worst = FMRCurve.worst([one, two])
        >>> worst.at(0.4) == two.at(0.4), worst.domains
        (True, ('LFW', 'CFP'))
        """
        if len(curves) == 1:
            return curves[0]
        scores = sorted({score for curve in curves for score in curve.scores})
        found = [[curve.at(score) for score in scores] for curve in curves]
        counted = [curve.people for curve in curves]
        return cls(
            scores=tuple(scores),
            rates=tuple(max(at.rate for at in column) for column in zip(*found, strict=True)),
            upper95=tuple(max(at.upper95 for at in column) for column in zip(*found, strict=True)),
            smallest=max(curve.smallest for curve in curves),
            pairs=sum(curve.pairs for curve in curves),
            people=None if None in counted else sum(count for count in counted if count is not None),
            domains=tuple(name for curve in curves for name in curve.domains),
        )

    def at(self, score: float) -> FMRAtScore:
        """The rate at which pairs of different people reach a score.

        Raises:
            TypeError: not a number.
            ValueError: a score that is not finite.
        """
        try:
            finite = math.isfinite(score)
        except TypeError:
            raise TypeError(f"score: expected a number, got {type(score).__name__}") from None
        if not finite:
            raise ValueError(f"score: expected a finite number, got {score}")
        if score > self.scores[-1]:
            return FMRAtScore(self.smallest, self.smallest, False)
        rate, upper = (
            float(np.exp(np.interp(score, self.scores, np.log(values)))) for values in (self.rates, self.upper95)
        )
        if rate < self.smallest:
            return FMRAtScore(self.smallest, max(upper, self.smallest), False)
        return FMRAtScore(rate, max(upper, rate), True)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FMRCurve:
        """The curve that :meth:`as_dict` wrote.

        Raises:
            ValueError, TypeError, KeyError: not such data.
        """
        known = {entry.name: data[entry.name] for entry in fields(cls) if entry.name != "domains"}
        return cls(**known, domains=data.get("domains", ()))  # files of earlier versions do not name them


def checked_thresholds(data: Mapping[Any, Any]) -> dict[float, float]:
    """Thresholds at false match rates as they come from a file.

    Raises:
        ValueError: a rate outside (0, 1), a threshold that is not finite, or one that falls while the rate does.
        TypeError, AttributeError: not a mapping to numbers.
    """
    found = {float(rate): float(threshold) for rate, threshold in data.items()}
    if not all(0 < rate < 1 and math.isfinite(threshold) for rate, threshold in found.items()):
        raise ValueError("expected rates in (0, 1) and finite thresholds at them")
    ordered = [found[rate] for rate in sorted(found, reverse=True)]
    if ordered != sorted(ordered):
        raise ValueError("expected thresholds that rise as the rate falls")
    return found


def check_threshold(threshold: float | None) -> float | None:
    """A decision threshold, or None.

    Raises:
        TypeError: not a number.
        ValueError: not finite.
    """
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number):
        raise TypeError(f"threshold: expected a number or None, got {type(threshold).__name__}")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold: expected a finite number or None, got {threshold}")
    return float(threshold)


@dataclass(frozen=True)
class Calibration:
    """A model's decision threshold, thresholds at stated false match rates, and the whole curve.

    Attributes:
        threshold: the decision threshold; same person if score >= threshold.
        rule: how ``threshold`` was chosen, in words.
        fmr: false match rate -> smallest threshold that keeps it, on the calibration's impostor pairs.
        impostor_pairs: number of impostor pairs behind the figures.
        curve: false match rate at any score; None in files that were written before there was one.

    >>> Calibration.from_dict(Calibration(0.3, "by hand", {0.01: 0.35}).as_dict()).fmr
    {0.01: 0.35}
    """

    threshold: float
    rule: str
    fmr: Mapping[float, float] = field(default_factory=dict)
    impostor_pairs: int = 0
    curve: FMRCurve | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"fmr": {repr(rate): threshold for rate, threshold in self.fmr.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """The calibration that :meth:`as_dict` wrote.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: not such data.
        """
        threshold = float(data["threshold"])
        if not math.isfinite(threshold):
            raise ValueError("threshold: not finite")
        curve = data.get("curve")
        return cls(
            threshold=threshold,
            rule=str(data["rule"]),
            fmr=checked_thresholds(data["fmr"]),
            impostor_pairs=int(data["impostor_pairs"]),
            curve=None if curve is None else FMRCurve.from_dict(curve),
        )
