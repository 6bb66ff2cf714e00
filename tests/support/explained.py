"""Small models and faces for tests of explanations: a linear body, so that everything takes a millisecond."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from xcos_ext.card import FMRCurve
from xcos_ext.model import XCosAttention, XCosHead, XCosModel

CURVE = FMRCurve(
    scores=(-0.5, 0.0, 0.5, 0.9),
    rates=(1.0, 0.1, 0.01, 0.001),
    upper95=(1.0, 0.2, 0.02, 0.004),
    smallest=1e-3,
    pairs=1000,
)


class Body(nn.Module):
    """Means of 16x16 pixels, mixed to 8 channels, with a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 8, 1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.sin(7 * self.mix(nn.functional.avg_pool2d(images, 16)))


def toy(
    attention: Literal["learned", "uniform", "norm", "symmetric"] = "learned",
    *,
    threshold: float | None = 0.25,
    curve: FMRCurve | None = CURVE,
    name: str = "toy",
    seed: int = 0,
) -> XCosModel:
    """A model of random weights on 112x112 crops, 7x7 cells, in evaluation mode."""
    torch.manual_seed(seed)
    chosen: Any = {
        "learned": lambda: XCosAttention(4, symmetric=False),
        "symmetric": lambda: XCosAttention(4, symmetric=True),
    }.get(attention, lambda: attention)()
    head = XCosHead(8, 4, attention=chosen)
    model = XCosModel(Body(), head, threshold=threshold, name=name, fmr_curve=curve).eval()
    if attention == "learned":  # freshly made it hardly looks anywhere
        with torch.no_grad():
            for parameter in head.attention.parameters():
                parameter.mul_(2).add_(0.2 * torch.randn_like(parameter))
    return model


def crop(seed: int) -> np.ndarray:
    """A crop of random blocks, uint8 RGB [112, 112, 3]."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((8, 8, 1), np.uint8))
