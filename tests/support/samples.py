"""Sample inputs that correctness, gradient, tracing and operator tests share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# [N, C, H, W]: the tuned case, vector tails on both sides, single cells and channels, a raw backbone map, a big grid.
SHAPES = (
    (5, 32, 7, 7),
    (3, 17, 3, 5),
    (2, 8, 12, 14),
    (4, 1, 1, 1),
    (3, 33, 2, 2),
    (2, 31, 1, 9),
    (1, 512, 7, 7),
    (2, 3, 33, 31),
    (7, 16, 4, 4),
)

# With one channel the cosine is +-1 and its gradient a difference of equal terms: it has a test of its own.
GRADIENT_SHAPES = tuple(shape for shape in SHAPES if shape[1] > 1)

LAYOUTS = ("contiguous", "channels_last", "mixed", "expanded", "sliced", "transposed")

MODES = ("uniform", "norm", "weights", "weights_shared", "logits", "logits_shared")


class Sample(NamedTuple):
    a: Tensor
    b: Tensor
    attention: Tensor | str | None
    logits: bool


def feature_maps(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    n, c, h, w = shape
    a = torch.randn(shape, dtype=torch.float64)
    # Half of the pairs are alike, as genuine pairs are.
    b = torch.randn(shape, dtype=torch.float64) + a * (torch.arange(n) % 2).view(-1, 1, 1, 1)
    a, b = a.to(dtype).to(device), b.to(dtype).to(device)
    if layout == "channels_last":
        return a.contiguous(memory_format=torch.channels_last), b.contiguous(memory_format=torch.channels_last)
    if layout == "mixed":
        return a, b.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return a[:1].expand(shape), b
    if layout == "sliced":
        wide = torch.zeros((n * 2, c + 3, h, w), dtype=dtype, device=device)
        wide[::2, 1 : c + 1] = a
        return wide[::2, 1 : c + 1], b
    if layout == "transposed":
        return a.transpose(2, 3).contiguous().transpose(2, 3), b
    return a, b


def sample(shape: tuple[int, ...], dtype: torch.dtype, layout: str, mode: str, device: str = "cpu") -> Sample:
    a, b = feature_maps(shape, dtype, layout, device)
    n, _, h, w = shape
    attention: Tensor | str | None = None
    if mode == "norm":
        attention = "norm"
    elif mode != "uniform":
        size = (h, w) if mode.endswith("shared") else (n, h, w)
        values = torch.randn(size, dtype=torch.float64)
        attention = (values if mode.startswith("logits") else values.abs() / (h * w)).to(dtype).to(device)
    return Sample(a, b, attention, mode.startswith("logits"))


def leaves(s: Sample, dtype: torch.dtype | None = None, device: str | None = None) -> Sample:
    """The same values as fresh leaf tensors that require gradients, layouts kept; optionally cast."""

    def leaf(t: Tensor) -> Tensor:
        t = t.detach()
        if dtype is not None:
            t = t.to(dtype)
        if device is not None:
            t = t.to(device)
        return t.requires_grad_()

    attention = leaf(s.attention) if isinstance(s.attention, Tensor) else s.attention
    return Sample(leaf(s.a), leaf(s.b), attention, s.logits)


def differentiable(s: Sample) -> list[Tensor]:
    return [t for t in (s.a, s.b, s.attention) if isinstance(t, Tensor)]
