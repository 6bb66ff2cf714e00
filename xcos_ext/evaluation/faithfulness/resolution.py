"""Maps between cells and pixels, in one place, so that all explainers are judged alike."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Upsampling", "to_cells", "to_pixels"]

Upsampling = Literal["bilinear", "nearest"]


def to_pixels(maps: Tensor, size: tuple[int, int], mode: Upsampling = "bilinear") -> Tensor:
    """Maps [N, h, w] of cells or pixels -> [N, height, width].

    Args:
        maps: floating point; values belong to the middles of the cells.
        size: (height, width).
        mode: ``"bilinear"`` (constant beyond the outermost middles), or ``"nearest"`` for cells with edges.
    """
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    if mode == "nearest":
        return F.interpolate(maps.unsqueeze(1), size, mode="nearest-exact").squeeze(1)
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
