"""False match rates and decision thresholds from pictures of people, without any protocol's pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from xcos_ext.card.calibration import Calibration, FMRCurve
from xcos_ext.io.arrays import refuse_masked
from xcos_ext.io.several import several
from xcos_ext.model.model import XCosModel
from xcos_ext.ops import xcos_matrix

from .verification import fmr_threshold, fmr_upper_bound

__all__ = ["all_pair_scores", "calibrate", "fmr_curve"]

_PROBES_AT_ONCE = 256
_POINTS_PER_DECADE = 10  # of the curve's table, which is even in log FMR ...
_HIGH_RATES = (0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # ... except where that says little about scores
_EXPECTED_MATCHES = 30  # impostor pairs times rate, for a threshold at that rate to mean something


@torch.no_grad()
def all_pair_scores(
    model: XCosModel, features: Tensor, people: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Scores of every unordered pair of different pictures, through templates (:func:`xcos_ext.xcos_matrix`); pair by
    pair where the head matches cells with their neighbourhoods, which templates cannot.

    >>> from xcos_ext.model import XCosHead
    >>> model = XCosModel(torch.nn.Identity(), XCosHead(4, 4, attention="norm")).eval()
    >>> scores, genuine = all_pair_scores(model, torch.randn(3, 4, 7, 7), ["Ann", "Ann", "Bob"])
    >>> scores.shape, genuine.tolist()
    ((3,), [True, False, False])

    Args:
        model: scores the features; in evaluation mode.
        features: grid features F [N, C, H, W].
        people: N names.

    Returns:
        (scores [N (N - 1) / 2], genuine): pairs (0, 1), (0, 2), ..., (1, 2), ...; the first picture is the probe.

    Raises:
        ValueError: lengths differ.
    """
    count = features.shape[0]
    if len(several(people, "people", ordered=True)) != count:
        raise ValueError(f"people: expected {count} names, got {len(people)}")
    if count < 2:
        return np.empty(0, np.float32), np.empty(0, bool)
    in_place = model.head.matching is None
    if in_place:
        probes, gallery = model.templates(features, "probe"), model.templates(features, "gallery")
    _, names = np.unique(np.asarray(people), return_inverse=True)
    scores, genuine = [], []
    for start in range(0, count - 1, _PROBES_AT_ONCE):
        part = slice(start, min(start + _PROBES_AT_ONCE, count))
        if in_place:
            found = xcos_matrix(probes[part], gallery[slice(start, count)])
        else:
            others = features[start:]
            found = torch.stack([model.score(probe.expand_as(others), others) for probe in features[part]])
        block = found.float().cpu().numpy()
        later = np.triu(np.ones(block.shape, bool), 1)
        scores.append(block[later])
        genuine.append((names[part, None] == names[None, start:])[later])
    return np.concatenate(scores), np.concatenate(genuine)


def _effective_pairs(matches: NDArray[np.int64], of_person: NDArray[np.float64], rate: float, pairs: int) -> float:
    """How many independent pairs would tell a rate as well as these, which share people.

    The variance of the rate with all covariances between pairs that share a person (Aronow, Samii and Assenova,
    "Cluster-robust variance estimation for dyadic data", 2015), against that of independent pairs. ``matches`` and
    ``of_person`` [P] are the false matches and the impostor pairs that each person takes part in.
    """
    independent = pairs * rate * (1 - rate)
    excess = matches - rate * of_person
    shared = float(excess @ excess) - independent
    return pairs if shared <= independent else max(1.0, pairs * independent / shared)


def fmr_curve(
    impostor_scores: ArrayLike,
    people: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    thresholds: Sequence[float] = (),
) -> FMRCurve:
    """The false match rate at any score, from a sample of impostor pairs.

    >>> found = fmr_curve(np.arange(1000) / 1000, thresholds=[0.9]).at(0.9)
    >>> round(found.rate, 3), found.resolved
    (0.1, True)

    Args:
        impostor_scores: [N], finite.
        people: integers [N], [N]: the two people of every pair; the confidence bounds then reckon with people who
            are in many pairs. None: pairs are taken as independent.
        thresholds: scores that the table holds in any case, so that the curve is exact there.

    Raises:
        ValueError: no scores, scores that are not finite, or people of another length.
    """
    several(thresholds, "thresholds", "numbers")
    refuse_masked(impostor_scores=impostor_scores)
    given = np.asarray(impostor_scores, dtype=np.float64).ravel()
    if given.size == 0 or not np.isfinite(given).all():
        raise ValueError("impostor_scores: expected at least one score, all finite")
    ordered, pairs = np.sort(given), given.size
    steps = np.arange(0, np.log10(pairs) * _POINTS_PER_DECADE)
    ranks = np.concatenate((10 ** (steps / _POINTS_PER_DECADE), pairs * np.array((*_HIGH_RATES, 1.0))))
    at_ranks = ordered[pairs - np.clip(np.round(ranks), 1, pairs).astype(np.int64)]
    points = np.unique(np.concatenate((at_ranks, np.asarray(thresholds, dtype=np.float64))))
    points = points[(points >= ordered[0]) & (points <= ordered[-1])]
    counts = pairs - np.searchsorted(ordered, points, "left")
    effective = np.full(points.size, float(pairs))
    members: int | None = None
    if people is not None:
        ids = [np.asarray(side).ravel() for side in people]
        if any(side.size != pairs for side in ids):
            raise ValueError(f"people: expected two integers for each of {pairs} pairs")
        names, inverse = np.unique(np.concatenate(ids), return_inverse=True)
        members = names.size
        # [people, points]: pairs whose score reaches exactly the first k points, then summed from the right.
        reached = np.tile(np.searchsorted(points, given, "right"), 2)
        width = points.size + 1
        table = np.bincount(inverse * width + reached, minlength=members * width).reshape(members, width)
        matches = table[:, ::-1].cumsum(1)[:, ::-1]
        of_person = matches[:, 0].astype(np.float64)
        for k, count in enumerate(counts):
            effective[k] = _effective_pairs(matches[:, k + 1], of_person, count / pairs, pairs)
    rates = counts / pairs
    upper = np.array([fmr_upper_bound(r * n, n) for r, n in zip(rates, effective, strict=True)])
    upper = np.maximum(np.maximum.accumulate(upper[::-1])[::-1], rates)
    # Beyond the last score nothing was seen; dependence is taken from where enough was.
    enough = effective[counts >= min(_EXPECTED_MATCHES, pairs)][-1]
    return FMRCurve(
        scores=tuple(points.tolist()),
        rates=tuple(rates.tolist()),
        upper95=tuple(upper.tolist()),
        smallest=fmr_upper_bound(0, float(enough)),
        pairs=pairs,
        people=members,
    )


def calibrate(
    model: XCosModel,
    features: Tensor,
    people: Sequence[str],
    *,
    domains: Sequence[str] | None = None,
    decision_fmr: float = 5e-3,
    fmrs: Sequence[float] = (1e-1, 1e-2, 1e-3),
) -> Calibration:
    """Thresholds at false match rates, and the rate at any score, over all impostor pairs of a set of people.

    >>> from xcos_ext.model import XCosHead
    >>> model = XCosModel(torch.nn.Identity(), XCosHead(4, 4, attention="norm")).eval()
    >>> people = [f"p{i // 2}" for i in range(60)]
    >>> found = calibrate(model, torch.randn(60, 4, 7, 7), people, decision_fmr=0.05, fmrs=(0.1,))
    >>> found.impostor_pairs, round(found.curve.at(found.threshold).rate, 3)
    (1740, 0.05)

    The decision threshold is the one at ``decision_fmr``. It needs no genuine pairs, so people with one
    picture each are enough, and a thousand people give a rate of 1e-3 with confidence. The default rate is
    close to the best accuracy on balanced pairs for the networks measured; where a false match costs more
    than a false rejection, use the thresholds noted at lower rates.

    A calibration holds for pictures like its own. With several sets of them every threshold is the highest that a set
    asks for, and the curve the worst of the sets', so that what is claimed holds on each.

    Args:
        model: the model to calibrate, in evaluation mode; only its score is used.
        features: grid features F [N, C, H, W] of different pictures.
        people: N names.
        domains: N names of the sets that the pictures are of; pairs are made within a set. None: one set, unnamed.
        decision_fmr: false match rate of the decision threshold.
        fmrs: further rates to note.

    Returns:
        The calibration, for :meth:`xcos_ext.XCosModel.set_calibration` or :class:`~xcos_ext.model.PlugStatistics`.

    Raises:
        ValueError: a rate outside (0, 1), or too few impostor pairs for the smallest (fewer than 30 expected false
            matches).
    """
    rates = [decision_fmr, *several(fmrs, "fmrs", "numbers")]
    for rate in rates:
        if not 0 < rate < 1:
            raise ValueError(f"decision_fmr, fmrs: expected rates in (0, 1), got {rate}")
    if domains is None:
        parts = [_sample(model, features, people, "", rates)]
    else:
        people, sets = several(people, "people", ordered=True), np.asarray(several(domains, "domains", ordered=True))
        for name, given in (("people", people), ("domains", sets)):
            if len(given) != features.shape[0]:
                raise ValueError(f"{name}: expected {features.shape[0]} names, got {len(given)}")
        # Without a picture there is one empty set, which says what is missing.
        places = {name: np.flatnonzero(sets == name) for name in dict.fromkeys(sets.tolist())}
        places = places or {"": np.arange(0)}
        parts = [
            _sample(model, features[own], [people[place] for place in own.tolist()], name, rates)
            for name, own in places.items()
        ]
    at = {rate: max(own[rate] for own, _ in parts) for rate in rates}
    curve = FMRCurve.worst([curve for _, curve in parts])
    return Calibration(
        threshold=at[decision_fmr],
        rule=f"false match rate {decision_fmr:g} over all impostor pairs",
        fmr={rate: at[rate] for rate in fmrs},
        impostor_pairs=curve.pairs,
        curve=curve,
    )


def _sample(
    model: XCosModel, features: Tensor, people: Sequence[str], domain: str, rates: Sequence[float]
) -> tuple[dict[float, float], FMRCurve]:
    """One set's thresholds at false match rates, and its curve."""
    scores, genuine = all_pair_scores(model, features, people)
    impostors = scores[~genuine]
    smallest = min(rates)
    if impostors.size * smallest < _EXPECTED_MATCHES:
        raise ValueError(
            f"people: {impostors.size} impostor pairs{domain and f' of {domain}'} cannot tell a false match rate of "
            f"{smallest:g}; at least {int(np.ceil(_EXPECTED_MATCHES / smallest))} are needed"
        )
    at = {rate: fmr_threshold(impostors, rate) for rate in set(rates)}
    _, ids = np.unique(np.asarray(people), return_inverse=True)
    first, second = (ids[side][~genuine] for side in np.triu_indices(len(people), 1))
    curve = fmr_curve(impostors, (first, second), thresholds=list(at.values()))
    return at, replace(curve, domains=(domain,) if domain else ())
