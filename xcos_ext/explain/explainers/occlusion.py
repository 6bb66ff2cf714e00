"""Occlusion by cell: hide one square of A after the other and see what the score loses."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import at_once, check_count, check_pairs, features_of
from .interface import PairModel, Saliency, XCosPairs
from .masking import Fill, check_fill, fill_pictures, masked_scores

__all__ = ["Occlusion", "cell_squares"]

_GRID = (7, 7)


def cell_squares(grid: tuple[int, int], size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """The pixels of every cell: bool [rows * columns, H, W], row by row; together they are the picture.

    Raises:
        ValueError: more cells than pixels along a side.
    """
    sides = []
    for cells, pixels in zip(grid, size, strict=True):
        if not 1 <= cells <= pixels:
            raise ValueError(f"grid: expected 1 to {pixels} cells along a side of {pixels} pixels, got {cells}")
        owner = torch.arange(pixels, device=device) * cells // pixels
        sides.append(owner == torch.arange(cells, device=device).unsqueeze(1))
    rows, columns = sides
    return (rows.view(grid[0], 1, size[0], 1) & columns.view(1, grid[1], 1, size[1])).flatten(0, 1)


class Occlusion:
    """What the score loses (similar) or gains (dissimilar) when a cell of A is hidden: one forward pass per cell.

    Args:
        grid: (rows, columns) of squares; None: the model's own cells, or 7x7 for models without cells.
        fill: what is shown instead: ``"black"``, ``"mean"`` (A's mean colour) or ``"blur"``.
        batch_size: pictures per forward pass; None: 16 on a CPU, else 256.

    Raises:
        ValueError: an option out of range.
    """

    name = "occlusion"

    def __init__(
        self, grid: tuple[int, int] | None = None, *, fill: Fill = "black", batch_size: int | None = None
    ) -> None:
        if grid is not None:
            if len(grid) != 2:
                raise ValueError(f"grid: expected (rows, columns), got {grid!r}")
            grid = check_count("grid", grid[0]), check_count("grid", grid[1])
        self.grid = grid
        self.fill = check_fill(fill)
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)

    @torch.no_grad()
    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over the squares of A [N, rows, columns].

        Raises:
            TypeError: something else than floating-point tensors.
            ValueError: images that are not [N, 3, H, W], or more cells than pixels.
        """
        check_pairs(model, a, b)
        size = at_once(self.batch_size, a.device)
        features_a, features_b = features_of(model, a, size), features_of(model, b, size)
        grid = self.grid
        if grid is None:
            grid = (features_a.shape[2], features_a.shape[3]) if isinstance(model, XCosPairs) else _GRID
        keep = ~cell_squares(grid, (a.shape[2], a.shape[3]), a.device)
        hidden = masked_scores(model, a, features_b, keep, fill_pictures(self.fill, a, model.preprocessing), size)
        lost = (model.score(features_a, features_b).unsqueeze(1) - hidden).float().view(-1, *grid)
        return Saliency(lost, -lost)
