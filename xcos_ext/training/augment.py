"""Alterations of aligned pictures that leave the person the same: flip, jitter, colour, blur, noise, patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from .settings import SETTINGS

__all__ = ["AugmentConfig", "augmented"]

_BLUR_SIZES = (28, 80)  # a blurred picture was this small for a moment
_PATCH_SIZES = (0.1, 0.45)  # sides of a patch, shares of the picture's


@dataclass(frozen=True, config=SETTINGS)
class AugmentConfig:
    """How far pictures are altered; every picture draws its own alteration.

    Attributes:
        flip: share mirrored left to right.
        rotate: degrees, at most, either way.
        scale: factor, at most, either way, minus 1.
        stretch: the same of width against height.
        shift: pixels at most along each side, as a share of that side.
        brightness, contrast, saturation, gamma, tint: natural logarithm of the factor, at most, either way; the tint's
            is for each colour.
        grey: share without colour.
        blur: share made small and large again.
        noise: standard deviation of the pixels' noise in grey levels; a picture's own is drawn from a half-normal.
        patch: share with a rectangle of one colour or of noise over part of the face.
    """

    flip: float = Field(default=0.5, ge=0, le=1)
    rotate: float = Field(default=7.0, ge=0, le=180)
    scale: float = Field(default=0.08, ge=0, lt=1)
    stretch: float = Field(default=0.05, ge=0, lt=1)
    shift: float = Field(default=0.035, ge=0, lt=1)
    brightness: float = Field(default=0.3, ge=0)
    contrast: float = Field(default=0.4, ge=0)
    saturation: float = Field(default=0.4, ge=0)
    gamma: float = Field(default=0.3, ge=0)
    tint: float = Field(default=0.12, ge=0)
    grey: float = Field(default=0.1, ge=0, le=1)
    blur: float = Field(default=0.2, ge=0, le=1)
    noise: float = Field(default=3.0, ge=0)
    patch: float = Field(default=0.15, ge=0, le=1)


class _Draws:
    """Random numbers for each picture of a batch, [N, 1, 1, 1] or [N]."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator

    def unit(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(self.count, *shape, generator=self.generator)

    def either_way(self, limit: float, *shape: int) -> Tensor:
        """Uniform in [-limit, limit)."""
        return (2 * self.unit(*shape) - 1) * limit

    def factor(self, limit: float, *shape: int) -> Tensor:
        """exp of :meth:`either_way`."""
        return self.either_way(limit, *shape).exp()

    def chosen(self, share: float) -> Tensor:
        """Numbers of about that share of the pictures."""
        return torch.nonzero(self.unit() < share).flatten()


def augmented(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Altered pictures.

    Args:
        images: uint8 RGB [N, 3, H, W], on the CPU.
        config: how far.
        generator: of the draws, on the CPU; the same one gives the same pictures.

    Returns:
        uint8 [N, 3, H, W]. What comes in from outside is mirrored.

    Raises:
        TypeError: not uint8.
        ValueError: another shape.

    >>> faces = torch.zeros(2, 3, 112, 112, dtype=torch.uint8)
    >>> augmented(faces, AugmentConfig(), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 112, 112])
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected [N, 3, H, W], got {list(images.shape)}")
    if not len(images):
        return images.clone()
    draws = _Draws(len(images), generator)
    faces = _moved(images.float(), config, draws)
    faces = _coloured(faces, config, draws)
    faces = _blurred(faces, config, draws)
    faces = _patched(faces, config, draws)
    if config.noise > 0:
        strength = torch.randn(draws.count, 1, 1, 1, generator=generator).abs() * config.noise
        faces = faces + strength * torch.randn(faces.shape, generator=generator)
    return faces.clamp(0, 255).round().to(torch.uint8)


def _moved(faces: Tensor, config: AugmentConfig, draws: _Draws) -> Tensor:
    angle = draws.either_way(math.radians(config.rotate))
    scale = draws.factor(math.log1p(config.scale))
    stretch = draws.factor(math.log1p(config.stretch))
    mirror = torch.where(draws.unit() < config.flip, -1.0, 1.0)
    across, down = (draws.either_way(2 * config.shift) for _ in range(2))  # the grid's side is 2
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = (
        torch.stack((mirror * cosine * stretch, -sine, across), 1),
        torch.stack((mirror * sine * stretch, cosine, down), 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(faces.shape), align_corners=False)
    return F.grid_sample(faces, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _coloured(faces: Tensor, config: AugmentConfig, draws: _Draws) -> Tensor:
    grey = faces.mean(1, keepdim=True)
    saturation = draws.factor(config.saturation, 1, 1, 1)
    saturation[draws.chosen(config.grey)] = 0
    faces = grey + (faces - grey) * saturation
    middle = faces.mean((1, 2, 3), keepdim=True)
    contrast, brightness = draws.factor(config.contrast, 1, 1, 1), draws.factor(config.brightness, 1, 1, 1)
    faces = ((faces - middle) * contrast + middle * brightness) * draws.factor(config.tint, 3, 1, 1)
    return 255 * (faces / 255).clamp(0, 1) ** draws.factor(config.gamma, 1, 1, 1)


def _blurred(faces: Tensor, config: AugmentConfig, draws: _Draws) -> Tensor:
    for face in draws.chosen(config.blur).tolist():
        small = int(torch.randint(*_BLUR_SIZES, (1,), generator=draws.generator))
        size = [min(small, side) for side in faces.shape[2:]]
        once = F.interpolate(faces[face : face + 1], size=size, mode="bilinear", antialias=True)
        faces[face] = F.interpolate(once, size=faces.shape[2:], mode="bilinear")[0]
    return faces


def _patched(faces: Tensor, config: AugmentConfig, draws: _Draws) -> Tensor:
    height, width = faces.shape[2:]
    low, high = _PATCH_SIZES
    for face in draws.chosen(config.patch).tolist():
        u = torch.rand(4, generator=draws.generator).tolist()
        tall, wide = (max(1, round((low + (high - low) * v) * side)) for v, side in ((u[0], height), (u[1], width)))
        top, left = int(u[2] * (height - tall + 1)), int(u[3] * (width - wide + 1))
        noisy = bool(torch.rand(1, generator=draws.generator) < 0.5)
        shape = (3, tall, wide) if noisy else (3, 1, 1)
        faces[face, :, top : top + tall, left : left + wide] = 255 * torch.rand(shape, generator=draws.generator)
    return faces
