"""A model made ready for embedding many pictures: batch norms folded, memory laid out for convolutions, bfloat16."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from xcos_ext.backbones.recogniser import Recogniser

from .model import XCosModel

__all__ = ["for_inference", "has_fast_bfloat16"]


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether convolutions in bfloat16 are faster than in fp32: a CPU with AVX-512 BF16 or AMX, a GPU from sm_80 on."""
    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_capability(where) >= (8, 0)
    if where.type != "cpu":
        return False
    # Private to torch, but the only place that tells native bfloat16 from an emulation that is slower than fp32.
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


class _Body(nn.Module):
    """A recogniser's way from images to its map, which torch.fx can follow."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.grid(images) if isinstance(self.backbone, Recogniser) else self.backbone(images)


class _Prepared(nn.Module):
    """The folded body: images of any layout and float type in, fp32 map out."""

    def __init__(self, body: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = body
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        grid = self.body(images.to(self.dtype, memory_format=torch.channels_last))
        return grid.to(torch.float32, memory_format=torch.contiguous_format)


def for_inference(model: XCosModel, dtype: torch.dtype | None = torch.float32) -> XCosModel:
    """A copy of a model that embeds pictures faster; its scores are those of the model, up to rounding.

    Batch norms behind convolutions are folded into them, weights and activations are laid out channels last, and
    with bfloat16 the body computes in it. The head computes in fp32 in any case. The copy cannot be trained, saved or
    asked for a plain embedding.

    Args:
        model: in evaluation mode.
        dtype: of the body: float32, bfloat16 or float16; None: bfloat16 where it is fast (:func:`has_fast_bfloat16`),
            else float32. In bfloat16 grid features move by about one per cent.

    Returns:
        The copy, on the same device, with the same preprocessing, thresholds and calibration.

    Raises:
        ValueError: a model in training mode, or another dtype.
    """
    from torch.fx.experimental.optimization import fuse

    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call .eval() first")
    device = next(model.parameters()).device
    if dtype is None:
        dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or None, got {dtype}")
    body = fuse(_Body(copy.deepcopy(model.backbone))).to(dtype)
    body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ready = copy.copy(model)
    ready._modules = dict(model._modules)
    ready.backbone = _Prepared(body, dtype).requires_grad_(False).eval()
    return ready
