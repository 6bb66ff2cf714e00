"""What is done with every map, so that all explainers are judged alike: checks, cells and pixels, order, areas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from xcos_ext.evaluation.bootstrap import Estimator
from xcos_ext.evaluation.figures import Estimate
from xcos_ext.explain.explainers.interface import Explainer, PairModel, Saliency
from xcos_ext.io.arrays import refuse_masked
from xcos_ext.io.optional import need

__all__ = [
    "LEVELS",
    "Curve",
    "areas",
    "explained",
    "kept_pixels",
    "mean_curve",
    "ranks",
    "standardised",
    "to_cells",
    "to_pixels",
]

Floats = NDArray[np.float64]

#: Shares of the pixels that are deleted or kept: 0, 10, ..., 100 %.
LEVELS = tuple(step / 10 for step in range(11))


def explained(explainer: Explainer, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
    """An explainer's maps, checked.

    Raises:
        ValueError: of another shape than [N, h, w], or values that are not finite.
    """
    maps = explainer(model, a, b)
    for name, made in zip(Saliency._fields, maps, strict=True):
        if made.dim() != 3 or made.shape[0] != a.shape[0]:
            raise ValueError(f"{explainer.name}: {name}: expected [{a.shape[0]}, h, w], got {list(made.shape)}")
        if not torch.isfinite(made).all():
            raise ValueError(f"{explainer.name}: {name}: a map has values that are NaN or infinite")
    return Saliency(*(made.detach().float() for made in maps))


def ranks(maps: Tensor, generator: torch.Generator) -> Tensor:
    """The place, from 0, of every value of maps [N, ...] in its map's order, the largest first: int64 [N, K].

    Equal values are in random order (one permutation is drawn for all maps of the call): without the draw a constant
    map would be taken row by row, which is a pattern.
    """
    values = maps.flatten(1)
    mixed = torch.randperm(values.shape[1], generator=generator).to(values.device)
    order = mixed[values[:, mixed].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def kept_pixels(places: Tensor, level: float, mode: str) -> Tensor:
    """Which pixels keep their value, bool [N, K], by their :func:`ranks`: of ``"insertion"`` the first share, of
    ``"deletion"`` all but these."""
    first = places < round(level * places.shape[1])
    return first if mode == "insertion" else ~first


def to_pixels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [N, h, w] of cells or pixels -> [N, height, width], bilinearly between the middles of the cells; constant
    beyond the outermost.

    >>> to_pixels(torch.tensor([[[0.0, 1.0]]]), (1, 4)).tolist()
    [[[0.0, 0.25, 0.75, 1.0]]]
    """
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


def to_cells(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [N, h, w] of pixels or cells -> [N, rows, columns]: the mean of what lies in each cell; coarser maps than
    the grid are interpolated instead.

    >>> to_cells(torch.tensor([[[0.0, 1.0, 4.0, 5.0]]]), (1, 2)).tolist()
    [[[0.5, 4.5]]]
    """
    if tuple(maps.shape[1:]) == tuple(grid):
        return maps
    if maps.shape[1] < grid[0] or maps.shape[2] < grid[1]:
        return to_pixels(maps, grid)
    # In fp64, so that rounding breaks no ties between cells: symmetric maps stay symmetric.
    return F.adaptive_avg_pool2d(maps.double().unsqueeze(1), grid).squeeze(1).to(maps.dtype)


def areas(maps: ArrayLike, truth: ArrayLike) -> Floats:
    """AUC [N] of every map [N, K] against where the truth is: P(inside > outside) + P(equal) / 2.

    All at once from mid-ranks, because ``sklearn.metrics.roc_auc_score`` takes one map at a time; a test compares them.

    >>> areas([[0.9, 0.1, 0.2], [0.1, 0.1, 0.2]], [True, False, False]).tolist()
    [1.0, 0.25]

    Args:
        maps: [N, K], finite.
        truth: bool [K], the same for all maps, or [N, K]; both kinds must occur in every row.

    Raises:
        ValueError: values that are not finite, or a truth of one kind.
    """
    refuse_masked(maps=maps, truth=truth)
    values = np.asarray(maps, np.float64)
    inside = np.broadcast_to(np.asarray(truth, bool), values.shape)
    count = inside.sum(1)
    if (count == 0).any() or (count == values.shape[1]).any():
        raise ValueError("truth: expected cells inside and outside, got one kind only")
    if not np.isfinite(values).all():
        raise ValueError(f"maps: {int((~np.isfinite(values)).sum())} values are NaN or infinite")
    places = np.where(inside, need("scipy.stats", "evaluation").rankdata(values, axis=1), 0.0).sum(1)
    return (places - count * (count + 1) / 2) / (count * (values.shape[1] - count))


def standardised(maps: Floats, reference: Floats) -> Floats:
    """Each cell of maps [N, K] as a number of standard deviations above its mean, both of the reference [M, K].

    A cell that does not vary there becomes 0: a map that is the same for all pairs says nothing, and gets an AUC of 0.5
    wherever the truth is.
    """
    mean, deviation = reference.mean(0), reference.std(0)
    still = deviation <= 1e-6 * (np.abs(reference).max() + 1e-300)
    return np.where(still, 0.0, (maps - mean) / np.where(still, 1.0, deviation))


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
    """The mean of curves [N, L]; rows of NaN are left out. Areas are by the trapezoid rule."""
    under = 100 * need("scipy.integrate", "evaluation").trapezoid(values, levels, axis=-1)
    return Curve(tuple(map(float, levels)), tuple(np.nanmean(values, 0).tolist()), estimator.mean(under))
