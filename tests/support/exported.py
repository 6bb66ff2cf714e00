"""Models and graphs for the tests of xcos_ext.deploy."""

from __future__ import annotations

import torch

from xcos_ext.backbones import SlimFaceNet, SplitRecogniser
from xcos_ext.model import CellProjection, ClosedFormHead, XCosAttention, XCosHead, XCosModel

HEADS = ("published", "symmetric", "residual", "min-shift", "cells", "norm", "uniform", "closed form")


def _settle(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Statistics, slopes and last layers as if trained: none at the value that hides a mistake."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.uniform_(-0.3, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.uniform_(-0.2, 0.2, generator=generator)
        if isinstance(part, torch.nn.PReLU):
            part.weight.data.uniform_(0.1, 0.4, generator=generator)


def _tiny() -> SplitRecogniser:
    """A backbone of one layer: exporting takes a second."""
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 48, 16, 16), torch.nn.BatchNorm2d(48), torch.nn.PReLU(48))
    return SplitRecogniser(body, torch.nn.Flatten(), grid_shape=(48, 7, 7), embedding_size=48 * 49)


def model(head: str = "symmetric", *, threshold: float | None = 0.25, slim: bool = False) -> XCosModel:
    """A small model from random weights, in evaluation mode, with one of :data:`HEADS`."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    backbone = SlimFaceNet() if slim else _tiny()
    shape = backbone.grid_shape
    made: XCosHead | ClosedFormHead
    if head == "closed form":
        made = ClosedFormHead(
            torch.randn(24, shape[0], generator=generator) / shape[0] ** 0.5,
            scale=torch.rand(shape, generator=generator) + 0.5,
            mean=0.1 * torch.randn(24, 7, 7, generator=generator),
            constant=torch.zeros(24),
            grid_shape=shape,
        )
    elif head in ("norm", "uniform"):
        made = XCosHead(shape[0], attention=head)
    elif head == "cells":
        made = XCosHead(shape[0], projection=CellProjection(shape, 32, separable=False, spread=False))
    else:
        options = {
            "published": {"symmetric": False},
            "symmetric": {"temperature": 0.5},
            "residual": {"residual": True, "temperature": 1.5},
            "min-shift": {"normalize": "min-shift"},
        }[head]
        made = XCosHead(shape[0], attention=XCosAttention(**options))
    found = XCosModel(backbone, made, threshold=threshold, name=f"test {head}", fmr_thresholds={1e-2: 0.3, 1e-3: 0.4})
    _settle(found, generator)
    for attention in found.modules():
        if isinstance(attention, XCosAttention):
            torch.nn.init.normal_(attention.attention[3].weight, std=0.2)
    return found.eval()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Normalised pictures [N, 3, 112, 112], smooth as faces are rather than noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 14, 14, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (112, 112), mode="bilinear")
