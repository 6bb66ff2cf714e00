"""A model made ready for embedding many pictures: batch norms folded, memory laid out for convolutions, bfloat16."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.model.head import ClosedFormHead, XCosHead
from xcos_ext.model.model import XCosModel

from .packed import LARGEST_ALLOCATION, can_pack, largest_activation, pack

__all__ = ["FLOATS", "for_inference", "has_fast_bfloat16"]

#: What a body can compute in.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Weights are laid out for this many pictures at a time; the layout serves other batches as well.
_USUAL_BATCH = 16


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

    def __init__(self, body: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = body
        self.dtype = dtype
        #: Pictures at a time on the CPU; None: all.
        self.piece: int | None = None
        # Beside the modules, not among them: packed weights can be neither moved nor copied.
        self._packed: list[fx.GraphModule] = []

    def prepare_cpu(self, size: tuple[int, int], packed: bool) -> None:
        """Find how many pictures to take at a time, and pack the weights where oneDNN can."""
        images = torch.zeros(1, 3, *size, dtype=self.dtype)
        images = images.to(memory_format=torch.channels_last)
        self.piece = max(1, LARGEST_ALLOCATION // max(1, largest_activation(self.body, images)))
        if packed and can_pack(self.dtype):
            many = images.expand(min(self.piece, _USUAL_BATCH), -1, -1, -1)
            try:
                self._packed = [pack(self.body, many.contiguous(memory_format=torch.channels_last))]
            except RuntimeError:  # a convolution that oneDNN does not have on this processor
                self._packed = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": []}  # a copy computes without: slower, and the same

    @property
    def packed(self) -> bool:
        """Whether batches on the CPU that ask for no gradients go through packed weights."""
        return bool(self._packed)

    def _run(self, images: Tensor) -> Tensor:
        body = self.body
        if self._packed and images.device.type == "cpu" and not (torch.is_grad_enabled() and images.requires_grad):
            body = self._packed[0]
        return cast(Tensor, body(images.to(self.dtype, memory_format=torch.channels_last)))

    def forward(self, images: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph is of plain layers, for any batch
            grid = self.body(images.to(self.dtype, memory_format=torch.channels_last))
        elif self.piece is not None and images.device.type == "cpu" and images.shape[0] > self.piece:
            grid = torch.cat([self._run(part) for part in images.chunk(-(-images.shape[0] // self.piece))])
        else:
            grid = self._run(images)
        return grid.to(torch.float32, memory_format=torch.contiguous_format)


def _folded_head(head: XCosHead | ClosedFormHead) -> XCosHead | ClosedFormHead:
    """The head with the batch norm of its 1x1 block folded; everything else is the head's own."""
    block = getattr(head, "conv1x1", None)
    if block is None or not isinstance(block[1], nn.BatchNorm2d):
        return head
    conv = nn.utils.fuse_conv_bn_eval(copy.deepcopy(block[0]), block[1])
    folded = copy.copy(head)
    folded._modules = {**head._modules, "conv1x1": nn.Sequential(conv.requires_grad_(False), block[2]).eval()}
    return folded


def for_inference(model: XCosModel, dtype: torch.dtype | None = torch.float32, *, packed: bool = True) -> XCosModel:
    """A copy of a model that embeds pictures faster; its scores are those of the model, up to rounding.

    Batch norms behind convolutions are folded into them, in the body and in the head's 1x1 block; weights and
    activations are laid out channels last, and with bfloat16 the body computes in it. On a CPU, convolutions get their
    weights in oneDNN's own layout, with ReLU, ReLU6 and residual additions fused in, and a batch goes through in pieces
    small enough for memory to be used again. The head computes in fp32 in any case. The copy cannot be trained, saved
    or asked for a plain embedding; gradients to the images go through unpacked weights. Of a backbone that torch.fx
    cannot follow (``traceable`` is False) the copy computes as the model does, in its types.

    Args:
        model: in evaluation mode.
        dtype: of the body: float32, bfloat16 or float16; None: bfloat16 where it is fast (:func:`has_fast_bfloat16`),
            else float32. In bfloat16 grid features move by one to four per cent.
        packed: False leaves the weights in torch's layout, as a copy of the result (``copy.deepcopy``) has them.

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
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or None, got {dtype}")
    if not getattr(model.backbone, "traceable", True):
        return copy.deepcopy(model).requires_grad_(False)
    body = fuse(_Body(copy.deepcopy(model.backbone))).to(dtype).requires_grad_(False).eval()
    body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ready = copy.copy(model)
    ready._modules = dict(model._modules)
    prepared = _Prepared(cast(fx.GraphModule, body), dtype).requires_grad_(False).eval()
    if device.type == "cpu":
        prepared.prepare_cpu(model.preprocessing.size, packed)
    ready.backbone = prepared
    ready.head = _folded_head(model.head)
    return ready
