"""Areas, standardised maps, and intervals of means over pairs.

Every figure of these protocols is a mean over pairs of a number of each pair's own. So one bootstrap over people serves
all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xcos_ext.evaluation.bootstrap import Interval, Resampling
from xcos_ext.evaluation.identification import Estimate
from xcos_ext.io.optional import need

__all__ = ["Curve", "Estimator", "areas", "curve_areas", "mean_curve", "plain", "standardised"]

Floats = NDArray[np.float64]
_REPLICATES_AT_ONCE = 64


def areas(maps: ArrayLike, truth: ArrayLike) -> Floats:
    """AUC of every map against where the truth is: P(inside > outside) + P(equal) / 2.

    All at once from mid-ranks, because ``sklearn.metrics.roc_auc_score`` takes one map at a time; a test compares them.

    Args:
        maps: [N, K], finite.
        truth: bool [K], the same for all maps, or [N, K]; both kinds must occur in every row.

    Returns:
        [N].

    Raises:
        ValueError: values that are not finite, or a truth of one kind.
    """
    values = np.asarray(maps, np.float64)
    inside = np.broadcast_to(np.asarray(truth, bool), values.shape)
    count = inside.sum(1)
    if (count == 0).any() or (count == values.shape[1]).any():
        raise ValueError("truth: expected cells inside and outside, got one kind only")
    if not np.isfinite(values).all():
        raise ValueError(f"maps: {int((~np.isfinite(values)).sum())} values are NaN or infinite")
    ranks = np.where(inside, need("scipy.stats", "evaluation").rankdata(values, axis=1), 0.0).sum(1)
    return (ranks - count * (count + 1) / 2) / (count * (values.shape[1] - count))


def standardised(maps: Floats, reference: Floats) -> Floats:
    """Each cell as a number of its own standard deviations above its own mean.

    A cell that does not vary becomes 0: a map that is the same for all pairs says nothing, and gets an AUC of 0.5
    wherever the truth is.

    Args:
        maps: [N, K].
        reference: [M, K], maps that show what each cell is usually like.
    """
    mean, deviation = reference.mean(0), reference.std(0)
    still = deviation <= 1e-6 * (np.abs(reference).max() + 1e-300)
    return np.where(still, 0.0, (maps - mean) / np.where(still, 1.0, deviation))


def curve_areas(levels: ArrayLike, values: ArrayLike) -> Floats:
    """Area under curves over [0, 1], by the trapezoid rule, times 100.

    Args:
        levels: [L], ascending from 0 to 1.
        values: [..., L].
    """
    x, y = np.asarray(levels, np.float64), np.asarray(values, np.float64)
    return 100 * ((y[..., 1:] + y[..., :-1]) / 2 * np.diff(x)).sum(-1)


class Estimator:
    """Means over pairs with percentile intervals from a bootstrap over people, or pairs where people are unknown.

    The same draws serve all figures. Whatever was chosen on all pairs (thresholds, what a cell is usually like) stays
    as it is in a replicate.

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
        if replicates and replicates < 20:
            raise ValueError(f"replicates: expected 0 or at least 20, got {replicates}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
        self.resampling = Resampling(pairs, people)
        self.replicates, self.seed = replicates, seed
        self._tails = (50 * (1 - confidence), 50 * (1 + confidence))
        self._weights: Floats | None = None

    @property
    def unit(self) -> str:
        """What is drawn: ``"people"`` or ``"pairs"``."""
        return self.resampling.unit

    def _drawn(self) -> Floats:
        if self._weights is None:
            rng = np.random.default_rng(self.seed)
            blocks = [
                self.resampling.draw(rng, min(_REPLICATES_AT_ONCE, self.replicates - start))
                for start in range(0, self.replicates, _REPLICATES_AT_ONCE)
            ]
            self._weights = np.concatenate(blocks).astype(np.float64)
        return self._weights

    def mean(self, values: ArrayLike) -> Estimate:
        """The mean [N] -> value and interval; pairs of which it is not known (NaN) are left out.

        Raises:
            ValueError: another length, or nothing known.
        """
        numbers = np.asarray(values, np.float64)
        if numbers.shape != (self.resampling.pairs,):
            raise ValueError(f"values: expected [{self.resampling.pairs}], one a pair, got {list(numbers.shape)}")
        known = ~np.isnan(numbers)
        if not known.any():
            raise ValueError("values: no pair has one")
        value = float(numbers[known].mean())
        if not self.replicates or known.sum() < 2:
            return Estimate(value, None)
        weights = self._drawn()[:, known]
        total = weights.sum(1)
        means = (weights @ numbers[known])[total > 0] / total[total > 0]
        if means.size < 0.9 * self.replicates:
            return Estimate(value, None)  # too few people to be resampled
        return Estimate(value, Interval(*np.percentile(means, self._tails).tolist()))


@dataclass(frozen=True)
class Curve:
    """A mean over pairs at several levels.

    Attributes:
        levels: from 0 to 1: the share of the pixels, or cells, that was changed or kept.
        values: at each level.
        area: 100 times the area under it, with its interval.
    """

    levels: tuple[float, ...]
    values: tuple[float, ...]
    area: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"levels": list(self.levels), "values": list(self.values), "area": plain(self.area)}


def plain(estimate: Estimate) -> dict[str, Any]:
    """An estimate, ready for JSON."""
    return {
        "value": estimate.value,
        "interval": None if estimate.interval is None else list(estimate.interval),
    }


def mean_curve(levels: Sequence[float], values: Floats, estimator: Estimator) -> Curve:
    """The mean of curves [N, L]; rows of NaN are left out."""
    return Curve(
        tuple(float(level) for level in levels),
        tuple(np.nanmean(values, 0).tolist()),
        estimator.mean(curve_areas(levels, values)),
    )
