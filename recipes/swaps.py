"""Faces with a region of another face: training data whose truth about every cell is known and free.

A region of a second picture is pasted over whole cells of a first one. Each cell then has an owner, and what a teacher
says of it is known too: it is what the teacher says of the owner's whole picture. Learning this makes a cell answer for
the pixels under it, however much of the face its network sees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from xcos_ext.training.settings import SETTINGS

__all__ = ["SwapConfig", "Swapped", "drawn_masks", "swapped"]

_SOFTNESS = 9  # side in pixels of the mean that softens a border
_SHAPES = (3, 4)  # a drawn rectangle has at most so many rows and columns of cells


@dataclass(frozen=True, config=SETTINGS)
class SwapConfig:
    """Faces with swapped regions.

    Attributes:
        share: of the faces that a region is pasted into.
        own: share of these, among faces with a second picture, whose region comes from that picture of the same person:
            a border or another light must not count as another person.
        soft: share whose border is soft.
        matched: share whose region takes the brightness and contrast of the face.
    """

    share: float = Field(default=0.8, ge=0, le=1)
    own: float = Field(default=0.35, ge=0, le=1)
    soft: float = Field(default=0.3, ge=0, le=1)
    matched: float = Field(default=0.5, ge=0, le=1)


class Swapped(NamedTuple):
    """Attributes:
    images: [N, 3, H, W], floating-point, 0..255.
    owner: int64 [N, h, w], index of the face in the batch that each cell comes from.
    whole: bool [N], faces without a pasted region.
    """

    images: Tensor
    owner: Tensor
    whole: Tensor


def drawn_masks(count: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Cells to be pasted: one or two rectangles in each mask.

    Args:
        count: N.
        grid: h, w.
        generator: of the draws, on the CPU.

    Returns:
        bool [N, h, w], each with at least one cell.
    """
    rows, columns = (torch.arange(size) for size in grid)
    made = torch.zeros(count, *grid, dtype=torch.bool)
    second = torch.rand(count, generator=generator) < 0.5
    for use in (torch.ones(count, dtype=torch.bool), second):
        sides = []
        for size, most, places in zip(grid, _SHAPES, (rows, columns), strict=True):
            length = 1 + (torch.rand(count, generator=generator) * min(most, size)).long()
            # It may stick out of the grid: cells at the border have their turn as often as others.
            start = (torch.rand(count, generator=generator) * (size + length - 1)).long() - length + 1
            sides.append((places >= start[:, None]) & (places < (start + length)[:, None]))
        made |= sides[0][:, :, None] & sides[1][:, None, :] & use[:, None, None]
    return made


def swapped(
    images: Tensor, twins: Tensor, grid: tuple[int, int], config: SwapConfig, generator: torch.Generator
) -> Swapped:
    """Faces, some with a region of another face of the batch.

    Args:
        images: [N, 3, H, W], N >= 2, floating-point, 0..255; H and W multiples of the grid's sides.
        twins: int64 [N], index of another picture of the same person, or the face's own.
        grid: h, w.
        config: how often and how.
        generator: of the draws, on the CPU.
    """
    count = len(images)

    def chosen(share: float) -> Tensor:
        return torch.rand(count, generator=generator) < share

    itself = torch.arange(count)
    donor = (itself + 1 + (torch.rand(count, generator=generator) * (count - 1)).long()) % count
    donor = torch.where(chosen(config.own) & (twins != itself), twins, donor)
    mask = drawn_masks(count, grid, generator) & chosen(config.share)[:, None, None]
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    pixels = mask.to(images.dtype).unsqueeze(1).repeat_interleave(height, 2).repeat_interleave(width, 3)
    border = _SOFTNESS // 2
    softened = F.avg_pool2d(F.pad(pixels, (border,) * 4, mode="replicate"), _SOFTNESS, 1)
    pixels = torch.where(chosen(config.soft)[:, None, None, None], softened, pixels)
    other = images[donor]
    (mean, spread), (own_mean, own_spread) = (
        (x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True) + 1) for x in (other, images)
    )
    matched = (other - mean) / spread * own_spread + own_mean
    other = torch.where(chosen(config.matched)[:, None, None, None], matched, other)
    owner = torch.where(mask, donor[:, None, None], itself[:, None, None])
    return Swapped(pixels * other + (1 - pixels) * images, owner, ~mask.flatten(1).any(1))
