"""Confidence intervals of verification figures by resampling people or, where they are unknown, pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xcos_ext.io.optional import need

from .verification import ErrorCurves, crossing, error_curves

__all__ = ["Interval", "Resampling", "bootstrap"]

Floats = NDArray[np.float64]
_REPLICATES_AT_ONCE = 64


class Interval(NamedTuple):
    """Attributes: low and high, both ends of a percentile interval."""

    low: float
    high: float


class Resampling:
    """Draws how often each pair counts in a replicate.

    With people: people are drawn with replacement, a genuine pair counts as often as its person was drawn and an
    impostor pair the product of both numbers (the product-reweighted bootstrap of Owen and Eckles, 2012). It reckons
    with people who are in several pairs, and errs towards wide intervals where few are. Without people, pairs are drawn
    with replacement.

    Args:
        pairs: number of pairs.
        people: integers [N], [N]: the two people of every pair, or None.
    """

    def __init__(self, pairs: int, people: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None) -> None:
        self.pairs = pairs
        self.unit = "pairs" if people is None else "people"
        self._ids: NDArray[np.int64] | None = None
        self.units = pairs
        if people is not None:
            names, inverse = np.unique(np.concatenate(people), return_inverse=True)
            self._ids, self.units = inverse.reshape(2, pairs), names.size

    def draw(self, rng: np.random.Generator, replicates: int) -> NDArray[np.int64]:
        """Weights [replicates, N]."""
        drawn = rng.multinomial(self.units, np.full(self.units, 1 / self.units), replicates)
        if self._ids is None:
            return drawn
        first, second = self._ids
        return np.where(first == second, drawn[:, first], drawn[:, first] * drawn[:, second])


class _Fold:
    """One fold's test, ready for many weightings: the best cut on the other folds, applied to its own pairs."""

    def __init__(self, values: Floats, labels: NDArray[np.bool_], test: NDArray[np.bool_]) -> None:
        train = np.flatnonzero(~test)
        self.order = train[np.argsort(values[train], kind="stable")]
        ordered = values[self.order]
        # A cut after the last of equal scores, or before all of them.
        self.cuts = np.append(np.flatnonzero(np.diff(ordered)) + 1, ordered.size)
        self.options = np.append((ordered[self.cuts[:-1] - 1] + ordered[self.cuts[:-1]]) / 2, np.inf)
        self.sign = np.where(labels[self.order], -1, 1)
        self.test = np.flatnonzero(test)
        self.values, self.labels = values[self.test], labels[self.test]

    def accuracy(self, weights: NDArray[np.int64]) -> Floats:
        """Accuracy [replicates] under weights [replicates, N]; NaN where nothing is left to test."""
        gain = np.cumsum(weights[:, self.order] * self.sign, axis=1)[:, self.cuts - 1]
        result = np.full(len(weights), np.nan)
        for i, row in enumerate(gain):
            best = max(int(row.max()), 0)
            winners = np.flatnonzero(row == best)
            options = self.options[winners] if best else np.append(-np.inf, self.options[winners])
            threshold = options[(options.size - 1) // 2]
            counts = weights[i, self.test]
            total = counts.sum()
            if total:
                result[i] = counts @ ((self.values >= threshold) == self.labels) / total
        return result


def accept_rate(curves: ErrorCurves, rate: float) -> float:
    """TAR at a false match rate, with the threshold of :func:`~xcos_ext.evaluation.fmr_threshold`."""
    thresholds, fmr, fnmr = curves
    allowed = int(np.argmax(fmr <= rate * (1 + 1e-12)))  # just above the largest score that has to be rejected
    following = int(np.searchsorted(-fmr, -fmr[allowed], "right")) - 1  # the next impostor score
    if np.isfinite(thresholds[following]):
        middle = (thresholds[allowed - 1] + thresholds[following]) / 2
        allowed = int(np.searchsorted(thresholds, middle, "left"))
    return 1 - float(fnmr[allowed])


def bootstrap(
    scores: ArrayLike,
    genuine: ArrayLike,
    resampling: Resampling,
    folds: ArrayLike | None = None,
    *,
    fold_scores: ArrayLike | None = None,
    fmrs: Sequence[float] = (1e-1, 1e-2, 1e-3),
    replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of the figures of :func:`~xcos_ext.evaluation.verification`.

    Args:
        scores, genuine, folds, fold_scores, fmrs: as there. Thresholds are chosen anew in every replicate.
        resampling: what is drawn.
        replicates: number of replicates.
        confidence: of the intervals, in (0, 1).
        seed: of the draws, the same for whatever is to be compared.

    Returns:
        ``"accuracy"`` (with folds), ``"auc"``, ``"eer"`` and ``"tar@<rate>"`` -> interval.

    Raises:
        ValueError: fewer than 20 replicates, a confidence outside (0, 1), or pairs too few to be resampled.
    """
    if replicates < 20:
        raise ValueError(f"replicates: expected at least 20, got {replicates}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    values, labels = np.asarray(scores, np.float64), np.asarray(genuine, bool)
    prepared: list[_Fold] = []
    if folds is not None:
        names = np.unique(np.asarray(folds))
        rows = np.broadcast_to(np.asarray(scores if fold_scores is None else fold_scores), (names.size, values.size))
        prepared = [_Fold(row, labels, np.asarray(folds) == name) for name, row in zip(names, rows, strict=True)]
    area = need("sklearn.metrics", "evaluation").auc
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in ("auc", "eer", *(f"tar@{rate:g}" for rate in fmrs))}
    if prepared:
        found["accuracy"] = []
    for start in range(0, replicates, _REPLICATES_AT_ONCE):
        weights = resampling.draw(rng, min(_REPLICATES_AT_ONCE, replicates - start))
        kinds = (weights[:, labels].sum(1) > 0) & (weights[:, ~labels].sum(1) > 0)
        weights = weights[kinds]  # a replicate of one kind has no figures
        if prepared and len(weights):
            found["accuracy"] += np.nanmean([fold.accuracy(weights) for fold in prepared], axis=0).tolist()
        for row in weights:
            curves = error_curves(values, labels, row)
            fmr, fnmr = curves.fmr, curves.fnmr
            found["auc"].append(float(area(fmr, 1 - fnmr)))
            found["eer"].append(crossing(curves).rate)
            for rate in fmrs:
                found[f"tar@{rate:g}"].append(accept_rate(curves, rate))
    if len(found["auc"]) < 0.9 * replicates:
        raise ValueError(f"scores: {values.size} pairs are too few to be resampled")
    tail = 100 * (1 - confidence) / 2
    return {name: Interval(*np.percentile(drawn, (tail, 100 - tail)).tolist()) for name, drawn in found.items()}
