"""Regions of an aligned face as sets of cells, and pasting them from one picture into another: changes whose place is
known.

Needs nothing but torch, so that training can use it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["REGIONS", "SIZES", "Blend", "Pasted", "paste", "pixel_mask", "region_mask", "soft_mask"]

Cells = tuple[tuple[int, int], ...]
Blend = Literal["hard", "soft"]

#: Sizes that every region comes in.
SIZES = ("small", "medium", "large")
_GRID = (7, 7)
_MAX_GAIN = 2.0  # of contrast in matching colours


def _box(top: int, bottom: int, left: int, right: int) -> Cells:
    return tuple((row, column) for row in range(top, bottom) for column in range(left, right))


def _sizes(*cells: Cells) -> dict[str, Cells]:
    return dict(zip(SIZES, cells, strict=True))


def _mirrored(region: Mapping[str, Cells]) -> dict[str, Cells]:
    return {size: tuple((row, _GRID[1] - 1 - column) for row, column in cells) for size, cells in region.items()}


_EYE = _sizes(_box(3, 4, 1, 3), _box(2, 4, 1, 3), _box(2, 4, 0, 3))
_OTHER_EYE = _mirrored(_EYE)
_CHEEK = _sizes(_box(4, 5, 1, 2), _box(4, 5, 0, 2), _box(4, 6, 0, 2))

#: Region -> size -> cells (row, column) of a 7x7 grid over a crop that is aligned to the ArcFace template: eyes at
#: (38, 52) and (74, 52), the tip of the nose at (56, 72), the corners of the mouth at (42, 92) and (71, 92) of 112
#: pixels. Left and right are the picture's.
REGIONS: Mapping[str, Mapping[str, Cells]] = {
    "left eye": _EYE,
    "right eye": _OTHER_EYE,
    # The large one with the bridge of the nose.
    "both eyes": _sizes(*(_EYE[size] + _OTHER_EYE[size] for size in SIZES[:2]), _box(2, 4, 1, 6)),
    "nose": _sizes(_box(4, 5, 3, 4), _box(3, 5, 3, 4), _box(2, 4, 3, 4) + _box(4, 5, 2, 5)),
    "mouth": _sizes(_box(5, 6, 3, 4), _box(5, 6, 2, 5), _box(5, 7, 2, 5)),
    "forehead": _sizes(_box(0, 1, 3, 4), _box(0, 1, 2, 5), _box(0, 2, 2, 5)),
    "chin": _sizes(_box(6, 7, 3, 4), _box(6, 7, 2, 5), _box(6, 7, 1, 6)),
    "left cheek": _CHEEK,
    "right cheek": _mirrored(_CHEEK),
}


def region_mask(region: str, size: str = "medium", grid: tuple[int, int] = _GRID) -> Tensor:
    """A region as a mask of cells, on the CPU.

    >>> region_mask("mouth", "large").nonzero().tolist()
    [[5, 2], [5, 3], [5, 4], [6, 2], [6, 3], [6, 4]]

    Args:
        region: a key of :data:`REGIONS`.
        size: one of :data:`SIZES`.
        grid: rows and columns. Of another grid than 7x7, cells whose middle lies in the region belong to it.

    Returns:
        bool [h, w].

    Raises:
        ValueError: no such region or size, or a grid so coarse that no cell's middle lies in the region.
    """
    if region not in REGIONS:
        raise ValueError(f"region: expected one of {', '.join(REGIONS)}, got {region!r}")
    if size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    mask = torch.zeros(_GRID, dtype=torch.bool)
    mask[tuple(zip(*REGIONS[region][size], strict=True))] = True
    mask = pixel_mask(mask, grid)
    if not mask.any():
        raise ValueError(f"grid: expected one fine enough for {region}, {size}, got {list(grid)}")
    return mask


def pixel_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask of cells, bool [..., h, w], as one of pixels [..., height, width]: each pixel belongs to the cell that its
    middle lies in."""
    index = []
    for pixels, cells in zip(size, mask.shape[-2:], strict=True):
        middles = (torch.arange(pixels, device=mask.device) * 2 + 1) * cells
        index.append(torch.div(middles, 2 * pixels, rounding_mode="floor"))
    return mask[..., index[0].unsqueeze(1), index[1]]


def soft_mask(pixels: Tensor, border: int) -> Tensor:
    """Weights [N, H, W] that rise evenly from 0 just outside a mask to 1 at 2 * ``border`` - 1 pixels inside.

    They are 0 wherever the mask is not, so the mask stays the exact place of a change. There is no ramp along the edge
    of the picture.

    Args:
        pixels: bool [N, H, W].
        border: half the ramp's length in pixels, at least 1: where the weight is one half.
    """
    outside = (~pixels).float().unsqueeze(1)
    # The mask without its border, spread by as much as was taken off: its support is the mask's.
    window = 2 * border - 1
    pad = (border - 1,) * 4
    core = 1 - F.max_pool2d(F.pad(outside, pad, mode="replicate"), window, stride=1)
    return F.avg_pool2d(F.pad(core, pad, mode="replicate"), window, stride=1).squeeze(1)


class Pasted(NamedTuple):
    """Attributes: images [N, 3, H, W] in the type of the receivers, and the mask of pixels, bool [N, H, W]: nothing
    outside it differs from the receivers."""

    images: Tensor
    pixels: Tensor


def paste(images: Tensor, donors: Tensor, mask: Tensor, *, blend: Blend = "hard", match_colour: bool = False) -> Pasted:
    """Replace a region of pictures by the same region of others.

    >>> import torch
    >>> made = paste(torch.zeros(1, 3, 112, 112), torch.ones(1, 3, 112, 112), region_mask("nose"))
    >>> made.images.sum((2, 3)).tolist(), made.pixels.sum().item()
    ([[512.0, 512.0, 512.0]], 512)

    Args:
        images: [N, 3, H, W], uint8 or floating point (normalised or not).
        donors: the same shape and type.
        mask: bool [h, w] or [N, h, w], of cells or of pixels: H x W is divided among them evenly.
        blend: ``"hard"``: the donor's pixels as they are; ``"soft"``: faded in from the mask's edge inwards, to one
            half at 1/28 of the picture's height, a quarter of a 7x7 cell, and on to 1 in as many more.
        match_colour: shift and scale each channel of the donor's region to the mean and standard deviation of the
            region that it replaces (the scale is kept in [1/2, 2]). Takes the light and the tint out of the change, and
            a part of the person with them.

    Returns:
        :class:`Pasted`. uint8 results are rounded and clipped; floating-point ones are not clipped.

    Raises:
        TypeError: pictures of two types, or neither uint8 nor floating point; a mask that is not bool.
        ValueError: shapes that do not fit, an unknown blend, or a mask so narrow that fading leaves nothing of it.
    """
    if images.dim() != 4 or images.shape[1] != 3 or donors.shape != images.shape:
        raise ValueError(
            f"images, donors: expected the same [N, 3, H, W], got {list(images.shape)} and {list(donors.shape)}"
        )
    if donors.dtype != images.dtype or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise TypeError(f"images, donors: expected both uint8 or floating point, got {images.dtype}, {donors.dtype}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")
    count, _, height, width = images.shape
    fits = mask.dim() == 2 or (mask.dim() == 3 and mask.shape[0] == count)
    if not fits or not (1 <= mask.shape[-2] <= height and 1 <= mask.shape[-1] <= width):
        raise ValueError(
            f"mask: expected [h, w] or [{count}, h, w], at most {height} x {width}, got {list(mask.shape)}"
        )
    if blend not in get_args(Blend):
        raise ValueError(f"blend: expected one of {', '.join(get_args(Blend))}, got {blend!r}")
    pixels = pixel_mask(mask.to(images.device), (height, width)).expand(count, height, width)
    inside = pixels.unsqueeze(1)
    if blend == "hard" and not match_colour:
        return Pasted(torch.where(inside, donors, images), pixels)
    receiver, donor = (side if side.is_floating_point() else side.float() for side in (images, donors))
    if match_colour:
        donor = _matched(receiver, donor, inside)
    if blend == "soft":
        border = max(height // 28, 1)
        weight = soft_mask(pixels, border)
        if ((weight.amax((1, 2)) > 0) != pixels.flatten(1).any(1)).any():
            raise ValueError(
                f"mask: expected at least {2 * border - 1} pixels in height and width, or fading leaves nothing"
            )
        donor = receiver + weight.unsqueeze(1).to(receiver.dtype) * (donor - receiver)
    mixed = torch.where(inside, donor, receiver)
    return Pasted(mixed if images.is_floating_point() else mixed.round().clamp(0, 255).to(torch.uint8), pixels)


def _matched(receiver: Tensor, donor: Tensor, pixels: Tensor) -> Tensor:
    """The donor with the receiver's mean and standard deviation, per picture and channel, inside the mask."""
    inside = pixels.to(receiver.dtype)
    total = inside.sum((2, 3), keepdim=True).clamp_min(1)

    def moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
        mean = (pictures * inside).sum((2, 3), keepdim=True) / total
        return mean, (((pictures - mean) * inside).square().sum((2, 3), keepdim=True) / total).sqrt()

    (mean_to, std_to), (mean_from, std_from) = moments(receiver), moments(donor)
    tiny = torch.finfo(receiver.dtype).tiny
    gain = ((std_to + tiny) / (std_from + tiny)).clamp(1 / _MAX_GAIN, _MAX_GAIN)
    return mean_to + gain * (donor - mean_from)
