"""Identification figures from candidate lists: identification rates, CMC, FNIR at a false positive identification rate.

A probe is searched among enrolled persons, and the answer is a list of candidates: persons, best first, with scores. A
probe is mated if its person is enrolled (the mate), else non-mated. As in ISO/IEC 19795-1 and NIST's FRVT 1:N:

* rank-n identification rate: share of mated probes whose mate is among the first n candidates, whatever the score; as
  a function of n the cumulative match characteristic, CMC. Closed-set: non-mated probes do not count;
* FPIR(T), false positive identification rate: share of non-mated probes with any candidate of score >= T;
* FNIR(T), false negative identification rate: share of mated probes whose mate is not among the first r candidates
  with a score >= T (here r = 1 unless asked otherwise); TPIR = 1 - FNIR.

Each probe's best score and its mate's score are scores of two kinds, so thresholds, bounds and replicates are those of
:mod:`.verification` and :mod:`.bootstrap`. All figures hold for a gallery of this size: FPIR grows with the persons
enrolled.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xcos_ext.io.arrays import refuse_masked
from xcos_ext.io.several import several
from xcos_ext.io.text import few

from .bootstrap import Resampling, accept_rate, check_resampling, percentile_interval
from .figures import Estimate, Interval, plain
from .verification import allowed_matches, error_curves, fmr_threshold, fmr_upper_bound

__all__ = [
    "Candidates",
    "IdentificationPoint",
    "IdentificationReport",
    "average_identification",
    "identification",
    "ranked_persons",
]

Floats = NDArray[np.float64]
_RANKS = (1, 5, 10, 20)  # given by default, as far as the lists reach


class Candidates(NamedTuple):
    """Candidate lists of P probes.

    Attributes:
        persons: P lists of at most k different persons, best first.
        scores: fp64 [P, k], -inf where a list is shorter.
    """

    persons: list[list[str]]
    scores: Floats


def ranked_persons(scores: ArrayLike, persons: Sequence[str], k: int) -> Candidates:
    """Candidate lists from the scores of all pairs; a person's score is the best of its templates.

    >>> found = ranked_persons([[0.2, 0.9, 0.5]], ["Ann", "Bob", "Ann"], 2)
    >>> found.persons, found.scores.tolist()
    ([['Bob', 'Ann']], [[0.9, 0.5]])

    Args:
        scores: [P, G], finite; larger is more alike.
        persons: G names, whose each template is.
        k: persons to list, at least 1; may be larger than their number.

    Returns:
        :class:`Candidates`; of persons with equal scores the one whose best template comes first.

    Raises:
        ValueError: lengths that differ, a k below 1, or scores that are not finite.
    """
    several(persons, "persons", ordered=True)
    refuse_masked(scores=scores)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(persons):
        raise ValueError(f"scores: expected [P, {len(persons)}], a column for each of persons, got {values.shape}")
    if k < 1:
        raise ValueError(f"k: expected a number from 1, got {k}")
    if not np.isfinite(values).all():
        raise ValueError(f"scores: {int((~np.isfinite(values)).sum())} of {values.size} are NaN or infinite")
    listed = np.full((len(values), k), -np.inf)
    names, numbers = np.unique(np.asarray(persons, dtype=object), return_inverse=True)
    lists: list[list[str]] = []
    for row, places, best in zip(values, np.argsort(-values, axis=1, kind="stable"), listed, strict=True):
        first = np.sort(np.unique(numbers[places], return_index=True)[1])[:k]  # each person's best template
        best[: first.size] = row[places[first]]
        lists.append(names[numbers[places[first]]].tolist())
    return Candidates(lists, listed)


@dataclass(frozen=True)
class IdentificationPoint:
    """What a false positive identification rate, or a threshold, costs, and how well this many probes can tell.

    Attributes:
        requested: the requested FPIR; None where the threshold was given.
        threshold: the one given; else the smallest T with FPIR <= requested on these probes (placed as
            :func:`~xcos_ext.evaluation.fmr_threshold` places it), -inf if none is needed, which happens only with
            probes without candidates.
        fpir: FPIR at the threshold, as observed.
        fpir_upper95: its exact 95 % upper bound for independent probes.
        tpir, fnir: share of mated probes with the mate found at rank and threshold, and 1 - that; None without mated
            probes.
        false_positives: non-mated probes with a candidate.
        non_mated: non-mated probes in all; rates below 1 / non_mated cannot be observed.
        resolved: whether requested >= 1 / non_mated. If not, the threshold is just above the best score of any
            non-mated probe and says little about the requested rate; for a reliable figure expect 30 or more false
            positives. True where nothing was requested.
    """

    requested: float | None
    threshold: float
    fpir: float
    fpir_upper95: float
    tpir: float | None
    fnir: float | None
    false_positives: int
    non_mated: int
    resolved: bool


@dataclass(frozen=True)
class IdentificationReport:
    """All figures of one set of candidate lists.

    Attributes:
        mated, non_mated: numbers of probes of both kinds.
        mated_people, non_mated_people: the people on them.
        enrolled: persons in the gallery.
        rank: the mate's lowest rank that counts for TPIR and FNIR.
        cmc: identification rates at ranks 1 to k; empty without mated probes.
        rates: rank -> identification rate, for the ranks asked for.
        operating_points: one per requested FPIR; empty without non-mated probes.
        at_thresholds: one per given threshold; likewise.
        intervals: ``"rank@<n>"``, ``"tpir@<fpir>"`` -> confidence interval (FNIR's is 1 minus TPIR's); empty without
            bootstrap.
        draws: the same names -> the replicates, for :func:`average_identification`; NaN in those that lack a kind of
            probes.
    """

    mated: int
    non_mated: int
    mated_people: int
    non_mated_people: int
    enrolled: int
    rank: int
    cmc: tuple[float, ...]
    rates: dict[int, float]
    operating_points: tuple[IdentificationPoint, ...]
    at_thresholds: tuple[IdentificationPoint, ...] = ()
    intervals: dict[str, Interval] = field(default_factory=dict)
    draws: dict[str, Floats] = field(default_factory=dict, repr=False, compare=False)

    @property
    def figures(self) -> dict[str, float]:
        """The figures that have intervals, under the same names."""
        found = {f"rank@{rank}": rate for rank, rate in self.rates.items()}
        points = self.operating_points
        return found | {f"tpir@{point.requested:g}": point.tpir for point in points if point.tpir is not None}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; without the replicates. A threshold of -inf becomes None."""
        data = plain(replace(self, draws={}))
        del data["draws"]
        return dict(data)


class _Probes(NamedTuple):
    """Attributes: of P probes: people int64, mated bool; mate_rank int64 from 1 (k + 1: not listed), and best score,
    and mate's score, -inf where there is none."""

    people: NDArray[np.int64]
    mated: NDArray[np.bool_]
    mate_rank: NDArray[np.int64]
    mate: Floats
    best: Floats


def _checked_lists(candidates: Sequence[Sequence[str]], scores: ArrayLike) -> Floats:
    """The scores [P, k] of lists that fit them."""
    refuse_masked(scores=scores)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 1 or len(values) != len(candidates):
        raise ValueError(f"scores: expected [{len(candidates)}, k], a row for each of candidates, got {values.shape}")
    if len(values) == 0:
        raise ValueError("candidates: expected the lists of at least one probe, got none")
    k = values.shape[1]
    lengths = np.array([len(row) for row in candidates])
    if lengths.max() > k:
        probe = int(lengths.argmax())
        raise ValueError(f"candidates: expected at most {k}, a column of scores each, got {lengths[probe]} ({probe=})")
    listed = np.arange(k) < lengths[:, None]
    wrong = np.argwhere(np.where(listed, ~np.isfinite(values), values != -np.inf))
    if wrong.size:
        probe, place = wrong[0].tolist()
        expected = "a finite one" if listed[probe, place] else f"-inf behind {lengths[probe]} candidates"
        raise ValueError(f"scores: expected {expected}, got {values[probe, place]} ({probe=}, {place=})")
    unsorted = np.argwhere(values[:, :-1] < values[:, 1:])
    if unsorted.size:
        probe, place = unsorted[0].tolist()
        low, high = values[probe, place : place + 2].tolist()
        raise ValueError(f"scores: expected the best first, got {low} before {high} ({probe=}, {place=})")
    return values


def _read(
    candidates: Sequence[Sequence[str]], scores: ArrayLike, persons: Sequence[str], enrolled: Collection[str]
) -> tuple[_Probes, int]:
    """What the figures are made of, and k."""
    several(persons, "persons", ordered=True)
    known = set(several(enrolled, "enrolled"))
    for probe, row in enumerate(several(candidates, "candidates", "lists", ordered=True)):
        several(row, f"candidates[{probe}]", ordered=True)
    values = _checked_lists(candidates, scores)
    if len(persons) != len(values):
        raise ValueError(f"persons: expected {len(values)} names, one a probe, got {len(persons)}")
    k = values.shape[1]
    mate_rank = np.full(len(values), k + 1)
    mate = np.full(len(values), -np.inf)
    for probe, (row, person) in enumerate(zip(candidates, persons, strict=True)):
        if len(set(row)) < len(row):
            raise ValueError(f"candidates: expected every person once, got {few(map(repr, row), 3)} ({probe=})")
        if not known.issuperset(row):
            strangers = few((repr(name) for name in row if name not in known), 3)
            raise ValueError(f"candidates: expected persons who are enrolled, got {strangers} ({probe=})")
        if person in row:
            rank = list(row).index(person)
            mate_rank[probe], mate[probe] = rank + 1, values[probe, rank]
    _, people = np.unique(np.asarray(persons), return_inverse=True)
    mated = np.array([person in known for person in persons])
    return _Probes(people, mated, mate_rank, mate, values[:, 0]), k


def identification(
    candidates: Sequence[Sequence[str]],
    scores: ArrayLike,
    persons: Sequence[str],
    enrolled: Collection[str],
    *,
    ranks: Sequence[int] | None = None,
    fpirs: Sequence[float] = (1e-1, 1e-2),
    thresholds: Sequence[float] = (),
    rank: int = 1,
    replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> IdentificationReport:
    """Closed-set and open-set figures of the answers to P probes.

    >>> answers = [["Ann", "Bob"], ["Bob", "Ann"], ["Bob"]]
    >>> scores = [[0.9, 0.1], [0.6, 0.5], [0.7, -np.inf]]
    >>> report = identification(answers, scores, ["Ann", "Ann", "Cid"], {"Ann", "Bob"}, fpirs=[0.5], replicates=0)
    >>> report.cmc, report.operating_points[0].fnir
    ((0.5, 1.0), 0.5)

    Intervals are percentiles of bootstrap replicates: people on the probes are drawn with replacement, all probes of a
    person together, and thresholds are chosen anew in each. The gallery stays as it is, so they do not say how
    figures vary with who is enrolled.

    Args:
        candidates: P lists of persons, best first, each person at most once.
        scores: [P, k]: of the candidates, finite, non-increasing; -inf where a list is shorter than k. An array or a
            tensor on the CPU.
        persons: P names, whose each probe is.
        enrolled: everybody in the gallery.
        ranks: for the identification rates, 1 to k; by default those of 1, 5, 10 and 20 that k allows.
        fpirs: false positive identification rates for the operating points, in (0, 1).
        thresholds: finite ones, such as a model's own, whose FPIR and FNIR are of interest.
        rank: the mate's lowest rank that counts as found for TPIR, 1 to k.
        replicates: of the bootstrap; 0 for none.
        confidence: of the intervals, in (0, 1).
        seed: of the draws, the same for whatever is to be compared.

    Returns:
        :class:`IdentificationReport`. Without mated probes it has thresholds and FPIR only, without non-mated ones
        identification rates only. A rank beyond k is an error, not a guess: a mate that is not listed may be anywhere.

    Raises:
        ValueError: lists and scores that do not fit each other, candidates who are not enrolled, ranks, rates,
            replicates or a confidence outside their range, or people too few to be resampled.
        TypeError: one text or number where several are wanted.
    """
    for name, values in (("ranks", () if ranks is None else ranks), ("fpirs", fpirs), ("thresholds", thresholds)):
        several(values, name, "numbers")
    probes, k = _read(candidates, scores, persons, enrolled)
    ranks = [wanted for wanted in _RANKS if wanted <= k] if ranks is None else list(ranks)
    for name, wanted in (*(("ranks", wanted) for wanted in ranks), ("rank", rank)):
        if not 1 <= wanted <= k:
            raise ValueError(f"{name}: expected 1 to {k}, the length of the candidate lists, got {wanted}")
    for rate in fpirs:
        if not 0 < rate < 1:
            raise ValueError(f"fpirs: expected rates in (0, 1), got {rate}")
    if not np.isfinite(np.asarray(thresholds, dtype=np.float64)).all():
        raise ValueError(f"thresholds: expected finite numbers, got {list(thresholds)}")
    check_resampling(replicates, confidence)
    mated = probes.mated
    counts = np.bincount(probes.mate_rank[mated], minlength=k + 2)[1 : k + 1]
    cmc = tuple((counts.cumsum() / mated.sum()).tolist()) if mated.any() else ()
    mate, best, lowest = _two_kinds(probes, rank)
    requested = [(fmr_threshold(best, rate), float(rate)) for rate in fpirs] if best.size else []
    given = thresholds if best.size else ()
    draws = _replicates(probes, mate, best, ranks, fpirs, replicates, seed) if replicates else {}
    return IdentificationReport(
        mated=int(mated.sum()),
        non_mated=int((~mated).sum()),
        mated_people=np.unique(probes.people[mated]).size,
        non_mated_people=np.unique(probes.people[~mated]).size,
        enrolled=len(set(enrolled)),
        rank=rank,
        cmc=cmc,
        rates={wanted: cmc[wanted - 1] for wanted in ranks} if cmc else {},
        operating_points=tuple(_point(mate, best, lowest, *wanted) for wanted in requested),
        at_thresholds=tuple(_point(mate, best, lowest, threshold) for threshold in given),
        intervals={name: percentile_interval(values, confidence) for name, values in draws.items()},
        draws=draws,
    )


def _two_kinds(probes: _Probes, rank: int) -> tuple[Floats, Floats, float]:
    """Mates' scores of mated probes, best scores of non-mated ones, and the lowest score that was given.

    Mates that are not found and probes without candidates get a score so low that halfway from there to any other is
    still below all others: a threshold in between keeps every candidate.
    """
    mate = np.where(probes.mate_rank <= rank, probes.mate, -np.inf)[probes.mated]
    best = probes.best[~probes.mated]
    given = np.concatenate((mate, best))
    given = given[np.isfinite(given)]
    low, high = (float(given.min()), float(given.max())) if given.size else (0.0, 0.0)
    nothing = 2 * low - high - max(1, abs(low), abs(high))
    return np.maximum(mate, nothing), np.maximum(best, nothing), low


def _point(
    mate: Floats, best: Floats, lowest: float, threshold: float, requested: float | None = None
) -> IdentificationPoint:
    """The point at a threshold; one that was found for a rate and is below every score that was given is none."""
    at = max(threshold, lowest)  # never down to the stand-ins for what was not found
    false_positives, found = int((best >= at).sum()), mate >= at
    return IdentificationPoint(
        requested=requested,
        threshold=float(threshold) if requested is None or threshold >= lowest else -np.inf,
        fpir=false_positives / best.size,
        fpir_upper95=fmr_upper_bound(false_positives, best.size),
        tpir=float(found.mean()) if mate.size else None,
        fnir=float((~found).mean()) if mate.size else None,
        false_positives=false_positives,
        non_mated=best.size,
        resolved=requested is None or allowed_matches(requested, best.size) >= 1,
    )


def _replicates(
    probes: _Probes,
    mate: Floats,
    best: Floats,
    ranks: Sequence[int],
    fpirs: Sequence[float],
    replicates: int,
    seed: int,
) -> dict[str, Floats]:
    """The figures in every replicate; NaN in those that lack a kind of probes that there is."""
    mated = probes.mated
    if not mated.any():
        return {}
    kinds = [kind for kind in (mated, ~mated) if kind.any()]
    hits = probes.mate_rank[mated, None] <= np.asarray(ranks, dtype=np.int64)
    scores, genuine = np.concatenate((mate, best)), np.arange(mated.size) < mate.size
    figures = [f"rank@{rank}" for rank in ranks]
    if len(kinds) == 2:
        figures += [f"tpir@{rate:g}" for rate in fpirs]
    found = np.full((replicates, len(figures)), np.nan)
    resampling = Resampling(mated.size, (probes.people, probes.people))
    drawn = (weights for block in resampling.blocks(replicates, seed) for weights in block)
    for row, weights in zip(found, drawn, strict=True):
        if not all(weights[kind].any() for kind in kinds):
            continue
        own = weights[mated]
        rates = (own @ hits / own.sum()).tolist()
        if len(kinds) == 2:
            curves = error_curves(scores, genuine, np.concatenate((own, weights[~mated])))
            rates += [accept_rate(curves, rate) for rate in fpirs]
        row[:] = rates
    if np.isnan(found).all(1).mean() > 0.1:
        raise ValueError(f"persons: {resampling.units} people on probes are too few to be resampled")
    return dict(zip(figures, found.T, strict=True))


def average_identification(
    reports: Sequence[IdentificationReport],
    minus: Sequence[IdentificationReport] | None = None,
    *,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """Figures averaged over parts with a gallery and perhaps a model each, or differences of two such averages.

    >>> part = identification([["Ann"], ["Bob"]], [[0.9], [0.8]], ["Ann", "Ann"], {"Ann", "Bob"}, replicates=0)
    >>> average_identification([part, part])["rank@1"].value
    0.5

    Scores of different parts are never put under one threshold: every part has its own, and the figures are averaged,
    each part alike. Intervals come from the parts' replicates; those of differences reckon with both sides' having
    answered the same probes.

    Args:
        reports: one a part. Parts with other people should have been resampled with other seeds, so that their
            replicates are independent.
        minus: one a part, of the same probes and resampled with the same seeds; what is subtracted.
        confidence: of the intervals, in (0, 1).

    Returns:
        ``"rank@<n>"``, ``"tpir@<fpir>"`` -> estimate, for figures that all reports have.

    Raises:
        ValueError: no reports, other numbers of parts or replicates, or a confidence outside (0, 1).
    """
    others = [] if minus is None else list(minus)
    if not reports or (minus is not None and len(others) != len(reports)):
        raise ValueError(f"reports, minus: expected one or more, as many of both, got {len(reports)} and {len(others)}")
    check_resampling(0, confidence)
    everything = [*reports, *others]
    result = {}
    for name in reports[0].figures:
        if not all(name in report.figures for report in everything):
            continue
        sizes = {report.draws[name].size if name in report.draws else 0 for report in everything}
        if len(sizes) > 1:
            raise ValueError(f"reports, minus: expected as many replicates of all, got {sorted(sizes)}")
        sides = [side for side in (reports, others) if side]
        value, *less = (float(np.mean([report.figures[name] for report in side])) for side in sides)
        drawn, *fewer = (np.mean([report.draws.get(name, ()) for report in side], axis=0) for side in sides)
        interval = percentile_interval(drawn - sum(fewer), confidence) if drawn.size else None
        result[name] = Estimate(value - sum(less), interval)
    return result
