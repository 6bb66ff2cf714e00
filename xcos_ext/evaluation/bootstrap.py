"""Confidence intervals by resampling people or, where they are unknown, pairs: of verification figures, of means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xcos_ext.io.optional import need
from xcos_ext.io.several import several

from .figures import Estimate, Interval
from .verification import ErrorCurves, checked_scores, crossing, error_curves

__all__ = ["Estimator", "Resampling", "accept_rate", "bootstrap", "check_resampling", "percentile_interval"]

Floats = NDArray[np.float64]
_REPLICATES_AT_ONCE = 64


def check_resampling(replicates: int, confidence: float) -> None:
    """Refuse fewer than 20 replicates, other than 0 for none, and a confidence outside (0, 1)."""
    if replicates and replicates < 20:
        raise ValueError(f"replicates: expected 0 or at least 20, got {replicates}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")


def percentile_interval(draws: ArrayLike, confidence: float) -> Interval:
    """The middle of the replicates [R]; those that are NaN are left out."""
    tail = 100 * (1 - confidence) / 2
    return Interval(*np.nanpercentile(np.asarray(draws, np.float64), (tail, 100 - tail)).tolist())


class Resampling:
    """Draws how often each pair counts in a replicate.

    With people: people are drawn with replacement, a genuine pair counts as often as its person was drawn and an
    impostor pair the product of both numbers (the product-reweighted bootstrap of Owen and Eckles, 2012). It reckons
    with people who are in several pairs, and errs towards wide intervals where few are. Without people, pairs are drawn
    with replacement.

    >>> Resampling(2, (np.array([0, 1]), np.array([0, 2]))).units, Resampling(2).unit
    (3, 'pairs')

    Args:
        pairs: number of pairs.
        people: integers [N], [N]: the two people of every pair, or None.

    Raises:
        ValueError: no pairs, or people of another number of pairs.
    """

    def __init__(self, pairs: int, people: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None) -> None:
        if pairs < 1:
            raise ValueError(f"pairs: expected at least one, got {pairs}")
        if people is not None and [len(side) for side in people] != [pairs, pairs]:
            lengths = [len(side) for side in people]
            raise ValueError(f"people: expected two sides of {pairs}, one a pair, got lengths {lengths}")
        self.pairs = pairs
        self.unit = "pairs" if people is None else "people"
        sides = [np.arange(pairs)] * 2 if people is None else people
        names, inverse = np.unique(np.concatenate(sides), return_inverse=True)
        self._ids, self.units = inverse.reshape(2, pairs), names.size

    def draw(self, rng: np.random.Generator, replicates: int) -> NDArray[np.int64]:
        """Weights [replicates, N]."""
        drawn = rng.multinomial(self.units, np.full(self.units, 1 / self.units), replicates)
        if self.unit == "pairs":
            return drawn
        first, second = self._ids
        return np.where(first == second, drawn[:, first], drawn[:, first] * drawn[:, second])

    def blocks(self, replicates: int, seed: int) -> Iterator[NDArray[np.int64]]:
        """The weights of many replicates, some at a time."""
        rng = np.random.default_rng(seed)
        for start in range(0, replicates, _REPLICATES_AT_ONCE):
            yield self.draw(rng, min(_REPLICATES_AT_ONCE, replicates - start))

    def of_both_kinds(self, genuine: NDArray[np.bool_], replicates: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
        """The same without replicates of genuine or of impostor pairs alone, which have no figures.

        Raises:
            ValueError: more than a tenth are such ones; said after the last block.
        """
        used = 0
        for weights in self.blocks(replicates, seed):
            kept = weights[weights[:, genuine].any(1) & weights[:, ~genuine].any(1)]
            used += len(kept)
            yield kept
        if used < 0.9 * replicates:
            raise ValueError(f"replicates: expected 0, or more pairs: {self.pairs} pairs are too few to be resampled")


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

    >>> found = bootstrap([0.9, 0.8, 0.4, 0.3] * 10, [1, 1, 0, 0] * 10, Resampling(40), fmrs=[0.1], replicates=20)
    >>> found["auc"], found["tar@0.1"]
    (Interval(low=1.0, high=1.0), Interval(low=1.0, high=1.0))

    Args:
        scores, genuine, folds, fold_scores, fmrs: as there. Thresholds are chosen anew in every replicate.
        resampling: what is drawn.
        replicates: number of replicates.
        confidence: of the intervals, in (0, 1).
        seed: of the draws, the same for whatever is to be compared.

    Returns:
        ``"accuracy"`` (with folds), ``"auc"``, ``"eer"`` and ``"tar@<rate>"`` -> interval.

    Raises:
        ValueError: scores or labels as there, another number of them than ``resampling`` draws, fewer than 20
            replicates, a confidence outside (0, 1), or pairs too few to be resampled.
    """
    if replicates < 20:
        raise ValueError(f"replicates: expected at least 20, got {replicates}")
    check_resampling(replicates, confidence)
    for rate in several(fmrs, "fmrs", "numbers"):
        if not 0 < rate < 1:
            raise ValueError(f"fmrs: expected rates in (0, 1), got {rate}")
    values, labels = checked_scores(scores, genuine)
    if values.size != resampling.pairs:
        raise ValueError(f"scores: expected {resampling.pairs}, as many as resampling has pairs, got {values.size}")
    prepared: list[_Fold] = []
    if folds is not None:
        names = np.unique(np.asarray(folds))
        if np.shape(folds) != values.shape or names.size < 2:
            raise ValueError(f"folds: expected {values.size}, at least two of them different, got {np.shape(folds)}")
        rows = np.broadcast_to(np.asarray(scores if fold_scores is None else fold_scores), (names.size, values.size))
        prepared = [_Fold(row, labels, np.asarray(folds) == name) for name, row in zip(names, rows, strict=True)]
    area = need("sklearn.metrics", "evaluation").auc
    found: dict[str, list[float]] = defaultdict(list)
    for weights in resampling.of_both_kinds(labels, replicates, seed):
        if prepared and len(weights):
            found["accuracy"] += np.nanmean([fold.accuracy(weights) for fold in prepared], axis=0).tolist()
        for row in weights:
            curves = error_curves(values, labels, row)
            found["auc"].append(float(area(curves.fmr, 1 - curves.fnmr)))
            found["eer"].append(crossing(curves).rate)
            for rate in fmrs:
                found[f"tar@{rate:g}"].append(accept_rate(curves, rate))
    return {name: percentile_interval(drawn, confidence) for name, drawn in found.items()}


class Estimator:
    """Means over pairs with percentile intervals from a bootstrap over people, or pairs where people are unknown.

    The same draws serve all figures. Whatever was chosen on all pairs (thresholds, what a cell is usually like) stays
    as it is in a replicate.

    >>> Estimator(3, replicates=0).mean([1.0, 2.0, np.nan])
    Estimate(value=1.5, interval=None)

    Args:
        people: int [N], [N]: the two people of every pair; None: unknown.
        pairs: N.
        replicates: 0 for no intervals; else at least 20.
        seed: of the draws.
        confidence: of the intervals, in (0, 1).

    Raises:
        ValueError: fewer than 20 replicates, or a confidence outside (0, 1).
    """

    def __init__(
        self,
        pairs: int,
        people: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
        *,
        replicates: int = 1000,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> None:
        check_resampling(replicates, confidence)
        self.pairs, self.replicates, self.confidence = pairs, replicates, confidence
        resampling = Resampling(pairs, people)
        self.unit = resampling.unit
        drawn = [weights.astype(np.float64) for weights in resampling.blocks(replicates, seed)]
        self._weights: Floats = np.concatenate(drawn) if drawn else np.empty((0, pairs))

    def mean(self, values: ArrayLike) -> Estimate:
        """The mean [N] -> value and interval; pairs of which it is not known (NaN) are left out.

        Raises:
            ValueError: another length, or nothing known.
        """
        numbers = np.asarray(values, np.float64)
        if numbers.shape != (self.pairs,):
            raise ValueError(f"values: expected [{self.pairs}], one a pair, got {list(numbers.shape)}")
        known = ~np.isnan(numbers)
        if not known.any():
            raise ValueError("values: no pair has one")
        value = float(numbers[known].mean())
        weights = self._weights[:, known]
        total = weights.sum(1)
        drawn = total > 0
        if not self.replicates or known.sum() < 2 or drawn.sum() < 0.9 * self.replicates:
            return Estimate(value, None)  # too few people to be resampled
        means = (weights @ numbers[known])[drawn] / total[drawn]
        return Estimate(value, percentile_interval(means, self.confidence))
