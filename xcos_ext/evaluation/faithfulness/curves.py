"""Areas of maps and under curves, standardised maps, means of curves over pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xcos_ext.evaluation.bootstrap import Estimator
from xcos_ext.evaluation.figures import Estimate
from xcos_ext.io.optional import need

__all__ = ["Curve", "areas", "curve_areas", "mean_curve", "standardised"]

Floats = NDArray[np.float64]


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


def mean_curve(levels: Sequence[float], values: Floats, estimator: Estimator) -> Curve:
    """The mean of curves [N, L]; rows of NaN are left out."""
    return Curve(
        tuple(float(level) for level in levels),
        tuple(np.nanmean(values, 0).tolist()),
        estimator.mean(curve_areas(levels, values)),
    )
