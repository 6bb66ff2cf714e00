"""Faces of nobody: mixtures and distortions of aligned faces, for a teacher to describe and a student to learn from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mixed", "warped"]

# Shares of pictures that are averaged with another face, or joined with one along a random border; the rest is as is.
_AVERAGED, _JOINED = 0.15, 0.40
_REGIONS = 4  # blobs of the joining mask along a side
_SOFT = 8.0  # steepness of the border
_WARPED = 0.6  # share of pictures that are warped
_WARP = 0.035  # standard deviation of the warp, in half-widths of the picture
_KNOTS = 5  # of the warp along a side


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return (low + (high - low) * torch.rand(count, generator=generator)).view(-1, 1, 1, 1)


def mixed(images: Tensor, partners: Tensor, generator: torch.Generator) -> Tensor:
    """Faces, some of them averaged or joined with a partner's face.

    Aligned faces have eyes, nose and mouth in the same places, so an average, or the upper part of one face and the
    lower part of another, is still a face: one that no data set has. The partner's brightness and contrast are first
    brought to the face's own.

    Args:
        images: [N, 3, H, W], floating-point, 0..255.
        partners: the same shape.
        generator: of the draws, on the CPU.

    Returns:
        [N, 3, H, W], about 0..255.
    """
    count, _, height, width = images.shape
    kind = torch.rand(count, generator=generator).view(-1, 1, 1, 1)
    blobs = torch.rand(count, 1, _REGIONS, _REGIONS, generator=generator)
    mask = F.interpolate(blobs, size=(height, width), mode="bicubic", align_corners=False)
    middle = mask.flatten(1).median(1).values.view(-1, 1, 1, 1)  # half of each face
    joined = ((mask - middle) * _SOFT + 0.5).clamp(0, 1)
    averaged = _uniform(count, 0.3, 0.7, generator)
    share = torch.where(kind < _AVERAGED, averaged, torch.where(kind < _AVERAGED + _JOINED, joined, 1.0))
    own, other = ((x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True) + 1) for x in (images, partners))
    return share * images + (1 - share) * ((partners - other[0]) / other[1] * own[1] + own[0])


def warped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Faces, some of them warped smoothly by a few pixels: other noses, chins and brows.

    Args:
        images: [N, 3, H, W], floating-point.
        generator: of the draws, on the CPU.

    Returns:
        The same shape; what comes in from outside is mirrored.
    """
    count, _, height, width = images.shape
    size = (torch.rand(count, 1, 1, 1, generator=generator) < _WARPED) * _WARP
    knots = torch.randn(count, 2, _KNOTS, _KNOTS, generator=generator) * size
    shift = F.interpolate(knots, size=(height, width), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    straight = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, straight + shift, mode="bilinear", padding_mode="reflection", align_corners=False)
