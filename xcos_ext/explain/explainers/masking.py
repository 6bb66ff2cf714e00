"""Occlusion and CorrRISE: what the score does while parts of picture A are hidden."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from xcos_ext.explain.fills import filled

from .base import BatchedExplainer, check_count, split
from .interface import PairModel, Saliency, XCosPairs

__all__ = ["CorrRISE", "Fill", "Occlusion", "average_ranks", "cell_squares", "patch_masks"]

_GRID = (7, 7)  # of models without cells
_MASKS_AT_ONCE = 1024  # as fp32: 51 MB of 112x112

#: What is shown where a picture is hidden: black, its own mean colour, or the picture itself, blurred.
Fill = Literal["black", "mean", "blur"]


class _MaskingExplainer(BatchedExplainer):
    def __init__(self, fill: str, batch_size: int | None) -> None:
        if fill not in get_args(Fill):
            raise ValueError(f"fill: expected one of {', '.join(get_args(Fill))}, got {fill!r}")
        super().__init__(batch_size)
        self.fill = fill

    def _masked_scores(self, model: PairModel, a: Tensor, features_b: Tensor, keep: Tensor, size: int) -> Tensor:
        """Scores [N, M] of A [N, 3, H, W] with B under masks, bool [M, H, W], True where A stays; a few at a time."""
        masks = len(keep)
        fill = filled(self.fill, a, model.preprocessing)
        scores = []
        for part in torch.arange(len(a) * masks, device=a.device).split(size):
            pair, mask = part // masks, part % masks
            pictures = torch.where(keep[mask].unsqueeze(1), a[pair], fill[pair])
            scores.append(model.score(model.features(pictures), features_b[pair]))
        return torch.cat(scores).view(-1, masks)


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


class Occlusion(_MaskingExplainer):
    """What the score loses (similar) or gains (dissimilar) when a cell of A is hidden: one forward pass per cell.

    >>> Occlusion((7, 7), fill="mean").grid
    (7, 7)

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
        super().__init__(fill, batch_size)
        self.grid = grid

    @torch.no_grad()
    def _maps(self, model: PairModel, a: Tensor, b: Tensor, size: int) -> Saliency:
        features_a, features_b = model.features(a), model.features(b)
        grid = self.grid
        if grid is None:
            grid = (features_a.shape[2], features_a.shape[3]) if isinstance(model, XCosPairs) else _GRID
        keep = ~cell_squares(grid, (a.shape[2], a.shape[3]), a.device)
        hidden = self._masked_scores(model, a, features_b, keep, size)
        lost = (model.score(features_a, features_b).unsqueeze(1) - hidden).float().view(-1, *grid)
        return Saliency(lost, -lost)


def patch_masks(
    masks: int, patches: int, size: int, picture: tuple[int, int], generator: torch.Generator | None = None
) -> Tensor:
    """Random masks: bool [masks, H, W], False in ``patches`` squares of ``size`` pixels that lie fully inside.

    Squares may overlap; their corners are drawn uniformly, independent of each other.

    Raises:
        ValueError: patches that are larger than the picture.
    """
    if size > min(picture):
        raise ValueError(f"size: expected patches of at most {min(picture)} pixels, the picture's side, got {size}")
    shown = torch.ones(masks, *picture, dtype=torch.bool)
    inside = []
    for pixels in picture:
        first = torch.randint(pixels - size + 1, (masks, patches, 1), generator=generator)
        place = torch.arange(pixels)
        inside.append((place >= first) & (place < first + size))
    for number in range(patches):
        shown &= ~(inside[0][:, number].unsqueeze(2) & inside[1][:, number].unsqueeze(1))
    return shown


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..M along the last dimension of [N, M]; equal values share the mean of theirs. fp64."""
    ordered = values.sort(1).values
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above + 1).double() / 2


class CorrRISE(_MaskingExplainer):
    """Correlation, over random masks, of a pixel being shown with the rank of the score.

    As published (arXiv 2305.08546): the same masks for every pair, each hiding three patches of 30x30 pixels; the
    scores' ranks; per pixel the Pearson correlation of "is shown" with them; its positive part is what is similar, its
    negative part what is not. 500 forward passes per picture; B's features are computed once. A pixel that no mask
    hides, or a score that no mask changes, gives 0.

    >>> CorrRISE(masks=10).keep((112, 112)).shape
    torch.Size([10, 112, 112])

    Args:
        masks: random masks.
        patches: hidden squares per mask.
        size: their side in pixels.
        fill: what is shown there: ``"black"``, ``"mean"`` (A's mean colour) or ``"blur"``.
        seed: of the masks, which depend on nothing else than the picture's size.
        clip: as published. False: the maps keep their order where the correlation has the other sign, too.
        batch_size: pictures per forward pass; None: 16 on a CPU, else 256.

    Raises:
        ValueError: an option out of range.
    """

    name = "corrrise"

    def __init__(
        self,
        masks: int = 500,
        patches: int = 3,
        size: int = 30,
        *,
        fill: Fill = "black",
        seed: int = 0,
        clip: bool = True,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(fill, batch_size)
        self.masks = check_count("masks", masks, 2)
        self.patches = check_count("patches", patches)
        self.size = check_count("size", size)
        self.seed = seed
        self.clip = clip
        self._kept: Tensor | None = None  # masks of the last size of picture

    def keep(self, picture: tuple[int, int]) -> Tensor:
        """The masks for pictures of (height, width): bool [masks, H, W], on the CPU."""
        if self._kept is None or tuple(self._kept.shape[1:]) != picture:
            generator = torch.Generator().manual_seed(self.seed)
            self._kept = patch_masks(self.masks, self.patches, self.size, picture, generator)
        return self._kept

    @torch.no_grad()
    def _maps(self, model: PairModel, a: Tensor, b: Tensor, size: int) -> Saliency:
        keep = self.keep((a.shape[2], a.shape[3])).to(a.device)
        scores = self._masked_scores(model, a, model.features(b), keep, size)
        return split(_correlation(scores, keep.flatten(1)).view(-1, *a.shape[2:]), self.clip)


def _correlation(scores: Tensor, keep: Tensor) -> Tensor:
    """Pearson's r of the ranks of [N, M] with every column of [M, P]: [N, P], fp32."""
    ranks = average_ranks(scores)
    ranks -= ranks.mean(1, keepdim=True)
    # Ranks without their mean are multiples of 1/2, so fp32 adds up those of shown pixels without rounding.
    low = ranks.float()
    product = scores.new_zeros(scores.shape[0], keep.shape[1], dtype=torch.float32)
    for part, rows in zip(low.split(_MASKS_AT_ONCE, 1), keep.split(_MASKS_AT_ONCE), strict=True):
        product.addmm_(part, rows.float())
    shown = keep.sum(0).double()
    spread = (shown * (keep.shape[0] - shown) / keep.shape[0]).sqrt() * ranks.norm(dim=1, keepdim=True)
    return torch.where(spread > 0, product / spread.clamp_min(1e-30), 0.0).float()
