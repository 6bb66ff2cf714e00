"""What is done with every map, so that all explainers are judged alike: checks, cells and pixels, and their order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xcos_ext.explain.explainers.interface import Explainer, PairModel, Saliency

__all__ = ["LEVELS", "explained", "kept_pixels", "ranks", "to_cells", "to_pixels"]

#: Shares of the pixels that are deleted or kept: 0, 10, ..., 100 %.
LEVELS = tuple(step / 10 for step in range(11))


def ranks(maps: Tensor, generator: torch.Generator) -> Tensor:
    """The place of every value of a map in its order, the largest first; equal values in random order.

    Without the draw a constant map would be taken row by row, which is a pattern.

    Args:
        maps: [N, ...], floating point.
        generator: on the CPU; one permutation is drawn for all maps of the call.

    Returns:
        int64 [N, K], from 0.
    """
    values = maps.flatten(1)
    mixed = torch.randperm(values.shape[1], generator=generator).to(values.device)
    order = mixed[values[:, mixed].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def kept_pixels(places: Tensor, level: float, mode: str) -> Tensor:
    """Which pixels keep their value.

    Args:
        places: [N, K], from :func:`ranks`.
        level: share of the K.
        mode: ``"deletion"``: all but the first; ``"insertion"``: only the first.

    Returns:
        bool [N, K].
    """
    first = places < round(level * places.shape[1])
    return first if mode == "insertion" else ~first


def to_pixels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [N, h, w] of cells or pixels -> [N, height, width], bilinearly; constant beyond the outermost middles.

    Args:
        maps: floating point; values belong to the middles of the cells.
        size: (height, width).
    """
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


def to_cells(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [N, h, w] of pixels or cells -> [N, rows, columns]: the mean of what lies in each cell.

    Args:
        maps: floating point; coarser ones than the grid are interpolated instead.
        grid: (rows, columns).
    """
    if tuple(maps.shape[1:]) == tuple(grid):
        return maps
    if maps.shape[1] < grid[0] or maps.shape[2] < grid[1]:
        return to_pixels(maps, grid)
    # In fp64, so that rounding breaks no ties between cells: symmetric maps stay symmetric.
    return F.adaptive_avg_pool2d(maps.double().unsqueeze(1), grid).squeeze(1).to(maps.dtype)


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
