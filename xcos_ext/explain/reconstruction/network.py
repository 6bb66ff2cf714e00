"""The network that draws a face from what a recogniser kept of it: our design, see docs/reconstruction.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FeatureDecoder"]

_DOUBLINGS = 4  # from a cell to its 16 x 16 pixels
_SEED = (64, 7, 7)  # what an embedding is unfolded to


def _conv(cin: int, cout: int, gain: float = 2.0) -> nn.Conv2d:
    conv = nn.Conv2d(cin, cout, 3, padding=1)
    nn.init.normal_(conv.weight, std=math.sqrt(gain / (9 * cin)))
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv


class _Block(nn.Module):
    """x + conv(relu(conv(relu x))); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = _conv(channels, channels)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class _Cells(nn.Module):
    """A matrix for each cell: [N, C, h, w] -> [N, K, h, w]. A channel need not mean the same in every cell."""

    def __init__(self, shape: tuple[int, int, int], out: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.weight = nn.Parameter(torch.randn(height * width, channels, out) / math.sqrt(channels))
        self.bias = nn.Parameter(torch.zeros(out, height, width))

    def forward(self, x: Tensor) -> Tensor:
        cells = torch.bmm(x.flatten(2).permute(2, 0, 1), self.weight)  # [h * w, N, K]
        return cells.permute(1, 2, 0).unflatten(2, x.shape[2:]) + self.bias


class _Unfold(nn.Module):
    """[N, D] -> [N, K, h, w] by one matrix."""

    def __init__(self, size: int, out: tuple[int, int, int]) -> None:
        super().__init__()
        self.out = out
        self.linear = nn.Linear(size, math.prod(out))
        nn.init.normal_(self.linear.weight, std=1 / math.sqrt(size))
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x)).unflatten(1, self.out)


class FeatureDecoder(nn.Module):
    """A face's picture from its feature: a grid [C, h, w] or an embedding [D].

    The feature is standardised entry by entry, goes through a matrix of its own for each cell (or one matrix, for an
    embedding), and through residual 3x3 convolutions at 7, 14, 28 and 56 pixels; the last ones make the 2x2 pixels of
    each place. What they make is added to the mean face, so a decoder that knows nothing shows that.

    Args:
        shape: of one feature: (C, h, w) or (D,).
        fingerprint: of the model that makes the features, from
            :func:`~xcos_ext.explain.reconstruction.fingerprint_of`.
        widths: channels at 1, 2, 4 and 8 times the grid's size.
        name: for reports.

    Attributes:
        mean: data-set mean of the features; what removed entries are replaced by.
        scale: their standard deviation; positive.
        mean_face: RGB in 0..1, [3, 16 h, 16 w].

    Raises:
        ValueError: a shape or widths of another form.
    """

    mean: Tensor
    scale: Tensor
    mean_face: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        fingerprint: str = "",
        widths: Sequence[int] = (192, 128, 64, 32),
        name: str = "decoder",
    ) -> None:
        super().__init__()
        shape, widths = tuple(int(size) for size in shape), tuple(int(width) for width in widths)
        if len(shape) not in (1, 3) or min(shape) < 1:
            raise ValueError(f"shape: expected (channels, height, width) or (length,), got {shape}")
        if len(widths) != _DOUBLINGS or min(widths) < 1:
            raise ValueError(f"widths: expected {_DOUBLINGS} positive numbers, got {widths}")
        self.shape, self.fingerprint, self.widths, self.name = shape, fingerprint, widths, name
        grid = shape[1:] if len(shape) == 3 else _SEED[1:]
        self.picture_size = (grid[0] << _DOUBLINGS, grid[1] << _DOUBLINGS)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("mean_face", torch.full((3, *self.picture_size), 0.5))
        self.enter: nn.Module
        self.enter = _Cells(shape, _SEED[0]) if len(shape) == 3 else _Unfold(shape[0], _SEED)  # type: ignore[arg-type]
        stages = []
        for cin, cout in zip((_SEED[0], *widths), widths, strict=False):
            stages.append(nn.Sequential(_conv(cin, cout, gain=1.0), _Block(cout)))
        self.stages = nn.ModuleList(stages)
        self.leave = _conv(widths[-1], 12, gain=0.002)
        self.unfold = nn.PixelShuffle(2)

    @property
    def grid(self) -> bool:
        """Whether features are grids [C, h, w], not embeddings."""
        return len(self.shape) == 3

    def check(self, features: Tensor, argument: str = "features") -> None:
        """Refuse what is no batch of features.

        Raises:
            TypeError: not floating-point.
            ValueError: another shape than [N, *shape].
        """
        if features.dim() != 1 + len(self.shape) or tuple(features.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"{argument}: expected [N, {wanted}], got {list(features.shape)}")
        if not features.is_floating_point():
            raise TypeError(f"{argument}: expected floating-point features, got {features.dtype}")

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, *shape] -> pictures, RGB in about 0..1, fp32 [N, 3, H, W], not clamped; differentiable."""
        x = self.enter((features.float() - self.mean) / self.scale)
        x = x.contiguous(memory_format=torch.channels_last)
        for number, stage in enumerate(self.stages):
            if number:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = stage(x)
        return self.mean_face + self.unfold(self.leave(F.relu(x))).float()
