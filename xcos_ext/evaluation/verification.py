"""Verification figures from scores: k-fold accuracy, AUC, EER, error curves, thresholds at a false match
rate.

Everywhere a larger score means more alike, and a pair is declared genuine if score >= threshold:

* FMR(t), false match rate: share of impostor pairs with score >= t (also FAR),
* FNMR(t), false non-match rate: share of genuine pairs with score < t; TAR = 1 - FNMR.

Scores are [N] and finite; ``genuine`` is [N], booleans or 0 and 1, and both kinds must occur: anything else is a
ValueError.

Curves and areas are scikit-learn's, the binomial bound is SciPy's. Impostor pairs that share people are not
independent, so the confidence bounds here are optimistic where few people make many pairs; :mod:`.bootstrap` and
:func:`.fmr_curve` reckon with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xcos_ext.io.arrays import refuse_masked
from xcos_ext.io.optional import need
from xcos_ext.io.several import several

from .figures import plain

__all__ = [
    "EER",
    "ErrorCurves",
    "KFoldAccuracy",
    "OperatingPoint",
    "VerificationReport",
    "auc",
    "best_threshold",
    "eer",
    "error_curves",
    "fmr_threshold",
    "fmr_upper_bound",
    "kfold_accuracy",
    "operating_point",
    "verification",
]

Floats = NDArray[np.float64]


def checked_scores(scores: ArrayLike, genuine: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """Scores and labels that figures can be made of; the module's docstring says which."""
    refuse_masked(scores=scores, genuine=genuine)
    values = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(genuine)
    if values.ndim != 1 or labels.shape != values.shape:
        raise ValueError(f"scores, genuine: expected two equal lengths, got {values.shape} and {labels.shape}")
    if labels.dtype != np.bool_:
        if not np.isin(labels, (0, 1)).all():
            raise ValueError("genuine: expected booleans or 0 and 1")
        labels = labels.astype(bool)
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(f"scores: {bad} of {values.size} are NaN or infinite")
    if labels.all() or not labels.any():
        raise ValueError(f"genuine: expected pairs of both kinds, got {int(labels.sum())} genuine of {labels.size}")
    return values, labels


class ErrorCurves(NamedTuple):
    """Error rates at every threshold where they change.

    Attributes:
        thresholds: [K], the distinct scores, ascending, then +inf.
        fmr: [K], false match rate at each threshold; falls from 1 to 0.
        fnmr: [K], false non-match rate; rises from 0 to 1.
    """

    thresholds: Floats
    fmr: Floats
    fnmr: Floats


def error_curves(scores: ArrayLike, genuine: ArrayLike, weights: ArrayLike | None = None) -> ErrorCurves:
    """FMR and FNMR as functions of the threshold, exactly (``sklearn.metrics.roc_curve``).

    ``weights`` [N] say how often each pair counts (None: once); pairs of weight 0 are left out.

    >>> curves = error_curves([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0])
    >>> [part.tolist() for part in curves]
    [[0.1, 0.6, 0.7, 0.9, inf], [1.0, 0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5, 1.0]]
    """
    values, labels = checked_scores(scores, genuine)
    if weights is not None and (np.shape(weights) != values.shape or not (np.asarray(weights) >= 0).all()):
        raise ValueError(f"weights: expected {values.size} numbers that are not negative")
    fpr, tpr, thresholds = need("sklearn.metrics", "evaluation").roc_curve(
        labels, values, sample_weight=weights, drop_intermediate=False
    )
    return ErrorCurves(thresholds[::-1], fpr[::-1], 1 - tpr[::-1])


def auc(scores: ArrayLike, genuine: ArrayLike) -> float:
    """Area under the ROC curve: P(genuine score > impostor score) + P(equal) / 2 (``sklearn.metrics``).

    >>> auc([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0])
    0.75
    """
    values, labels = checked_scores(scores, genuine)
    return float(need("sklearn.metrics", "evaluation").roc_auc_score(labels, values))


class EER(NamedTuple):
    """Attributes: rate (FMR = FNMR), and the threshold where the curves cross."""

    rate: float
    threshold: float


def eer(scores: ArrayLike, genuine: ArrayLike) -> EER:
    """Equal error rate, interpolated linearly between the two thresholds around the crossing.

    >>> eer([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0])
    EER(rate=0.5, threshold=0.7)
    """
    return crossing(error_curves(scores, genuine))


def crossing(curves: ErrorCurves) -> EER:
    """Where error curves cross; see :func:`eer`."""
    gap = curves.fmr - curves.fnmr  # 1 at the first threshold, -1 at the last, non-increasing
    after = int(np.argmax(gap <= 0))
    low, high = gap[after - 1], gap[after]
    share = float(low / (low - high))
    rate = curves.fmr[after - 1] + share * (curves.fmr[after] - curves.fmr[after - 1])
    left, right = curves.thresholds[after - 1], curves.thresholds[after]
    # Beyond the largest score there is no distance to interpolate over.
    threshold = left + share * (right - left) if np.isfinite(right) else np.nextafter(left, np.inf)
    return EER(float(rate), float(threshold))


def best_threshold(scores: ArrayLike, genuine: ArrayLike) -> float:
    """The threshold with the highest accuracy; of several equally good ones the median.

    It is chosen from the midpoints between neighbouring distinct scores, which lose no accuracy.

    >>> round(best_threshold([0.9, 0.7, 0.3, 0.1], [1, 1, 0, 0]), 3)
    0.5
    """
    values, labels = checked_scores(scores, genuine)
    distinct = np.unique(values)
    ends = np.nextafter(distinct[[0, -1]], [-np.inf, np.inf])
    options = np.concatenate((ends[:1], (distinct[:-1] + distinct[1:]) / 2, ends[1:]))
    impostors, genuines = np.sort(values[~labels]), np.sort(values[labels])
    right = genuines.size - np.searchsorted(genuines, options, "left") + np.searchsorted(impostors, options, "left")
    winners = options[right == right.max()]
    return float(winners[(winners.size - 1) // 2])


class KFoldAccuracy(NamedTuple):
    """Cross-validated accuracy.

    Attributes:
        mean: mean over folds, in [0, 1].
        std: sample standard deviation over folds (n - 1); NaN for a single fold.
        folds: accuracy of each fold.
        thresholds: the threshold used in each fold, chosen on the others.
    """

    mean: float
    std: float
    folds: tuple[float, ...]
    thresholds: tuple[float, ...]


def kfold_accuracy(scores: ArrayLike, genuine: ArrayLike, folds: ArrayLike) -> KFoldAccuracy:
    """Accuracy on each fold with the threshold that is best on all other folds (LFW's View 2 protocol).

    >>> kfold_accuracy([0.9, 0.1, 0.8, 0.2, 0.4, 0.6], [1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2]).folds
    (1.0, 1.0, 0.0)

    Args:
        scores: [N]; or [K, N], row k being what scores the pairs where the k-th fold (in ascending order) is
            tested, for scores with parts estimated on the other folds.
        genuine: [N].
        folds: [N], integers; at least two different ones.

    Raises:
        ValueError: shapes differ, fewer than two folds, or training folds without one of the kinds.
    """
    refuse_masked(scores=scores, folds=folds)
    fold = np.asarray(folds)
    names = np.unique(fold)
    rows = np.asarray(scores, dtype=np.float64)
    if rows.ndim == 2 and len(rows) != names.size:
        raise ValueError(f"scores: expected a row for each of {names.size} folds, got {len(rows)}")
    if rows.ndim not in (1, 2) or fold.shape != rows.shape[-1:]:
        raise ValueError(f"folds: expected shape {rows.shape[-1:]}, got {fold.shape}")
    if names.size < 2:
        raise ValueError(f"folds: expected at least two, got {names.size}")
    rows = np.broadcast_to(rows, (names.size, *rows.shape[-1:]))
    thresholds, accuracies = [], []
    for name, row in zip(names, rows, strict=True):
        values, labels = checked_scores(row, genuine)
        test = fold == name
        threshold = best_threshold(values[~test], labels[~test])
        thresholds.append(threshold)
        accuracies.append(float(((values[test] >= threshold) == labels[test]).mean()))
    return KFoldAccuracy(
        float(np.mean(accuracies)), float(np.std(accuracies, ddof=1)), tuple(accuracies), tuple(thresholds)
    )


def fmr_upper_bound(false_matches: float, impostors: float, confidence: float = 0.95) -> float:
    """Exact one-sided (Clopper-Pearson) upper bound of a false match rate.

    With no false match among n independent impostor pairs this is about 3 / n at 95 %.

    >>> round(fmr_upper_bound(0, 1000), 6)
    0.002991

    Args:
        false_matches: observed, 0..impostors.
        impostors: independent impostor comparisons, at least 1; an effective number need not be whole.
        confidence: in (0, 1).
    """
    if not 0 <= false_matches <= impostors or impostors < 1:
        raise ValueError(f"false_matches, impostors: expected 0 <= a <= b and b >= 1, got {false_matches}, {impostors}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    if false_matches == impostors:
        return 1.0
    special = need("scipy.special", "evaluation")
    return float(special.betaincinv(false_matches + 1, impostors - false_matches, confidence))


def fmr_threshold(impostor_scores: ArrayLike, fmr: float) -> float:
    """The smallest threshold at which the share of impostor scores >= threshold is at most ``fmr``.

    It lies halfway between the largest score that has to be rejected and the next one above, or just above
    the largest score where the number of pairs cannot resolve the rate.

    >>> round(fmr_threshold([0.1, 0.2, 0.3, 0.5], 0.25), 3)
    0.4

    Raises:
        ValueError: a rate outside (0, 1), no scores, or scores that are not finite.
    """
    if not 0 < fmr < 1:
        raise ValueError(f"fmr: expected a rate in (0, 1), got {fmr}")
    refuse_masked(impostor_scores=impostor_scores)
    impostors = np.sort(np.asarray(impostor_scores, dtype=np.float64).ravel())
    if impostors.size == 0 or not np.isfinite(impostors).all():
        raise ValueError("impostor_scores: expected at least one score, all finite")
    rejected = impostors[impostors.size - 1 - allowed_matches(fmr, impostors.size)]
    above = impostors[np.searchsorted(impostors, rejected, "right") :]
    if above.size:
        return float((rejected + above[0]) / 2)
    # Just above in fp32, so that an fp32 score equal to `rejected` stays below after rounding.
    threshold = float(np.nextafter(np.float32(rejected), np.float32(np.inf)))
    return threshold if threshold > rejected else float(np.nextafter(rejected, np.inf))


def allowed_matches(fmr: float, impostors: int) -> int:
    """False matches that a rate allows; the product may miss a whole number by rounding (0.07 * 100)."""
    return int(np.floor(fmr * impostors * (1 + 1e-12)))


@dataclass(frozen=True)
class OperatingPoint:
    """What a requested false match rate costs, and how well this many pairs can tell.

    Attributes:
        requested: the requested FMR.
        threshold: the smallest threshold with FMR <= requested on these pairs (:func:`fmr_threshold`).
        fmr: FMR at the threshold, as observed.
        fmr_upper95: its exact 95 % upper bound for independent pairs (:func:`fmr_upper_bound`).
        tar: share of genuine pairs accepted, 1 - FNMR.
        false_matches: impostor pairs accepted.
        impostors: impostor pairs in all; rates below 1 / impostors cannot be observed.
        resolved: whether requested >= 1 / impostors. If not, the threshold is just above the largest impostor
            score and says little about the requested rate. For a reliable figure expect 30 or more false
            matches.
    """

    requested: float
    threshold: float
    fmr: float
    fmr_upper95: float
    tar: float
    false_matches: int
    impostors: int
    resolved: bool


def operating_point(scores: ArrayLike, genuine: ArrayLike, fmr: float) -> OperatingPoint:
    """Threshold and true accept rate at a false match rate in (0, 1) (TAR@FAR).

    >>> point = operating_point([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0], 0.5)
    >>> point.tar, point.fmr, point.resolved
    (1.0, 0.5, True)
    """
    values, labels = checked_scores(scores, genuine)
    impostors = values[~labels]
    threshold = fmr_threshold(impostors, fmr)
    false_matches = int((impostors >= threshold).sum())
    return OperatingPoint(
        requested=float(fmr),
        threshold=threshold,
        fmr=false_matches / impostors.size,
        fmr_upper95=fmr_upper_bound(false_matches, impostors.size),
        tar=float((values[labels] >= threshold).mean()),
        false_matches=false_matches,
        impostors=int(impostors.size),
        resolved=allowed_matches(fmr, impostors.size) >= 1,
    )


@dataclass(frozen=True)
class VerificationReport:
    """All figures of one set of scores.

    Attributes:
        pairs, genuine: numbers of pairs and of genuine pairs.
        auc: area under the ROC curve.
        eer: equal error rate; eer_threshold: where it is.
        accuracy: k-fold accuracy, or None without folds.
        operating_points: one per requested false match rate.
    """

    pairs: int
    genuine: int
    auc: float
    eer: float
    eer_threshold: float
    accuracy: KFoldAccuracy | None
    operating_points: tuple[OperatingPoint, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dict(plain(self))


def verification(
    scores: ArrayLike,
    genuine: ArrayLike,
    folds: ArrayLike | None = None,
    *,
    fold_scores: ArrayLike | None = None,
    fmrs: Sequence[float] = (1e-1, 1e-2, 1e-3),
) -> VerificationReport:
    """Every figure of this module at once.

    >>> report = verification([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0], fmrs=[0.5])
    >>> report.pairs, report.auc, report.eer, report.accuracy
    (4, 0.75, 0.5, None)

    Args:
        scores: [N].
        genuine: [N].
        folds: [N] integers for the k-fold accuracy, or None to leave it out.
        fold_scores: [K, N] for the k-fold accuracy, as in :func:`kfold_accuracy`; by default ``scores``.
        fmrs: false match rates for the operating points.

    Raises:
        ValueError: as in the single functions.
    """
    several(fmrs, "fmrs", "numbers")
    values, labels = checked_scores(scores, genuine)
    equal = eer(values, labels)
    return VerificationReport(
        pairs=int(values.size),
        genuine=int(labels.sum()),
        auc=auc(values, labels),
        eer=equal.rate,
        eer_threshold=equal.threshold,
        accuracy=None
        if folds is None
        else kfold_accuracy(values if fold_scores is None else fold_scores, labels, folds),
        operating_points=tuple(operating_point(values, labels, rate) for rate in fmrs),
    )
