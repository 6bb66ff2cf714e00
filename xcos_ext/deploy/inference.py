"""A model made ready for embedding many pictures: batch norms folded, memory laid out for convolutions, bfloat16.

On the CPU oneDNN runs the convolutions as it likes best: weights in its own layout, what follows fused in.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from xcos_ext.backbones.followed import graph_of
from xcos_ext.backbones.plain import altered, altered_part, batch_statistics
from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.model.head import ClosedFormHead, XCosHead
from xcos_ext.model.model import XCosModel

__all__ = ["FLOATS", "can_pack", "for_inference", "has_fast_bfloat16", "pack"]

#: What a body can compute in.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Weights are laid out for this many pictures at a time; the layout serves other batches as well.
_USUAL_BATCH = 16
# Bytes from which glibc maps fresh pages at every allocation (its highest threshold): a page fault for each 4 KiB
# costs more than the layer that fills them.
_LARGEST_ALLOCATION = (32 << 20) - (64 << 10)

_ADDITIONS = {operator.add, operator.iadd, torch.add}


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether convolutions in bfloat16 are faster than in fp32: a CPU with AVX-512 BF16 or AMX, a GPU from sm_80 on.

    >>> has_fast_bfloat16("meta")
    False
    """
    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_capability(where) >= (8, 0)
    if where.type != "cpu":
        return False
    # Private to torch, but the only place that tells native bfloat16 from an emulation that is slower than fp32.
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this torch has oneDNN, switched on, with the operators that torch.compile uses for frozen weights.

    In half precision only where the processor computes with it: oneDNN's convolutions need AVX-512 for bfloat16.
    """
    # The operators are private to torch: looked for, never taken for granted.
    operators = ("_reorder_convolution_weight", "_convolution_pointwise")
    enabled = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)  # type: ignore[attr-defined]
    if not (enabled and all(hasattr(torch.ops.mkldnn, name) for name in operators)):
        return False
    narrow = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return narrow is None or (hasattr(torch.ops.mkldnn, narrow) and bool(getattr(torch.ops.mkldnn, narrow)()))


class _Packed(nn.Module):
    """A convolution with its activation or its residual addition in one oneDNN call; no gradients, CPU only."""

    def __init__(self, conv: nn.Conv2d, shape: Sequence[int], activation: str = "none", *scalars: float) -> None:
        super().__init__()
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        # Not a buffer: an opaque tensor can be neither copied nor moved.
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.geometry, list(shape))
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.activation = activation
        self.scalars = list(scalars)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            x, self.weight, self.bias, *self.geometry, self.activation, self.scalars, ""
        )
        return found


class _PackedSum(_Packed):
    """conv(x) + other, of the same shape."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        found: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, self.weight, self.bias, *self.geometry, "add", 1.0, None, [], None
        )
        return found


class _Shapes(fx.Interpreter):
    """Runs a graph once and keeps what every node's tensor is, without its data. torch's ShapeProp prints failures."""

    def __init__(self, body: fx.GraphModule, images: Tensor) -> None:
        super().__init__(body)
        self.found: dict[fx.Node, Tensor] = {}
        with torch.no_grad():
            self.run(images)

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if isinstance(made, Tensor):
            self.found[n] = made.to("meta")
        return made


def _packable(module: nn.Module | None) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.dtype in FLOATS
        and module.weight.device.type == "cpu"
    )


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, tuple[float, ...]] | None:
    """oneDNN's name of an activation with its numbers, or None for one that it does not fuse here."""
    if node.op == "call_module":
        module = modules.get(str(node.target))  # None: packed already, with an addition
        if type(module) is nn.ReLU:
            return "relu", ()
        if type(module) in (nn.Hardtanh, nn.ReLU6):
            assert isinstance(module, nn.Hardtanh)
            return "hardtanh", (float(module.min_val), float(module.max_val))
    elif (node.op == "call_method" and node.target in ("relu", "relu_")) or (
        node.op == "call_function" and node.target in (torch.relu, F.relu)
    ):
        return "relu", ()
    return None


def pack(body: fx.GraphModule, images: Tensor) -> fx.GraphModule:
    """A copy of a body whose convolutions are oneDNN's own, with ReLU, ReLU6 and residual additions inside them.

    Args:
        body: a graph in evaluation mode on the CPU, its batch norms folded where they can be.
        images: a batch of the usual size, channels last: weights are laid out for it. Other sizes work.

    Returns:
        The copy: same values up to rounding, no gradients, not to be copied or moved.

    Raises:
        RuntimeError: oneDNN refuses a convolution, for example in a dtype this processor lacks.
    """
    shapes = _Shapes(body, images).found
    packed = fx.GraphModule(body, copy.deepcopy(body.graph))
    modules = dict(packed.named_modules())
    # The copy's nodes stand in the original's order; new ones are entered as they come.
    copies = zip(body.graph.nodes, packed.graph.nodes, strict=True)
    known = {copied: shapes[node] for node, copied in copies if node in shapes}
    for count, node in enumerate(list(packed.graph.nodes)):
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        if not _packable(conv):
            continue
        assert isinstance(conv, nn.Conv2d)
        source = node.all_input_nodes[0]
        inputs: tuple[fx.Node, ...] = (source,)
        last, made = node, None
        shape = known[source].shape
        (user,) = node.users if len(node.users) == 1 else (None,)
        if user is not None and (fused := _activation(user, modules)) is not None:
            last, made = user, _Packed(conv, shape, fused[0], *fused[1])
        elif user is not None and user.target in _ADDITIONS and len(user.args) == 2 and not user.kwargs:
            other = user.args[0] if user.args[1] is node else user.args[1]
            # The sum is computed in the addition's place, where both summands are there.
            if (
                isinstance(other, fx.Node)
                and other in known
                and other is not node
                and (known[other].shape == known[node].shape)
            ):
                last, inputs, made = user, (source, other), _PackedSum(conv, shape)
        name = f"packed_{count}"
        packed.add_module(name, _Packed(conv, shape) if made is None else made)
        with packed.graph.inserting_before(last):
            new = packed.graph.call_module(name, inputs)
        known[new] = known[last]
        last.replace_all_uses_with(new)
        for old in (last,) if last is node else (last, node):
            packed.graph.erase_node(old)
    packed.delete_all_unused_submodules()
    packed.graph.lint()
    packed.recompile()
    return packed.eval()


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
        images = torch.zeros(1, 3, *size, dtype=self.dtype, device="cpu").to(memory_format=torch.channels_last)
        largest = max(made.nbytes for made in _Shapes(self.body, images).found.values())
        self.piece = max(1, _LARGEST_ALLOCATION // max(1, largest))
        if packed and can_pack(self.dtype):
            many = images.expand(min(self.piece, _USUAL_BATCH), -1, -1, -1)
            with contextlib.suppress(RuntimeError):  # a convolution that oneDNN does not have on this processor
                self._packed = [pack(self.body, many.contiguous(memory_format=torch.channels_last))]

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
    kinds = ((nn.Conv2d,), (nn.BatchNorm2d,), (nn.PReLU,))
    if (
        block is None
        or altered_part(block)
        or type(block) is not nn.Sequential
        or len(block) != len(kinds)
        or any(altered(layer, kind) for layer, kind in zip(block, kinds, strict=True))
        or block[1].running_mean is None
    ):
        return head
    first, norm = cast(nn.Conv2d, copy.deepcopy(block[0])), cast(nn.BatchNorm2d, block[1])
    conv = nn.utils.fuse_conv_bn_eval(first, norm)
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
    cannot follow (``traceable`` is False), or that has hooks, a ``forward`` set on one of its modules, or batch norms
    without running statistics, the copy computes as the model does, in its types.

    Args:
        model: in evaluation mode.
        dtype: of the body: float32, bfloat16 or float16; None: bfloat16 where it is fast (:func:`has_fast_bfloat16`),
            else float32. In bfloat16 grid features move by one to four per cent.
        packed: False leaves the weights in torch's layout, as a copy of the result (``copy.deepcopy``) has them.

    Returns:
        The copy, on the same device, with the same preprocessing, thresholds and calibration.

    Raises:
        ValueError: a model in training mode, or another dtype.

    >>> from xcos_ext import backbones, model
    >>> small = model.XCosModel(backbones.SlimFaceNet(), model.XCosHead(512)).eval()
    >>> for_inference(small).features(torch.zeros(2, 3, 112, 112)).shape
    torch.Size([2, 32, 7, 7])
    """
    from torch.fx.experimental.optimization import fuse

    if any(module.training for module in model.modules()):
        raise ValueError("model: expected evaluation mode, got training mode; call .eval() first")
    device = next(model.parameters()).device
    if dtype is None:
        dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or None, got {dtype}")
    if not getattr(model.backbone, "traceable", True) or altered_part(model.backbone) or batch_statistics(model):
        return copy.deepcopy(model).requires_grad_(False)
    graph = graph_of(_Body(copy.deepcopy(model.backbone)))
    body = fuse(graph, inplace=True, no_trace=True).to(dtype).requires_grad_(False).eval()
    body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ready = copy.copy(model)
    ready._modules = dict(model._modules)
    prepared = _Prepared(cast(fx.GraphModule, body), dtype).requires_grad_(False).eval()
    if device.type == "cpu":
        prepared.prepare_cpu(model.preprocessing.size, packed)
    ready.backbone = prepared
    head = model.head
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in (*head.parameters(), *head.buffers())):
        head = copy.deepcopy(head).float()
    ready.head = _folded_head(head)
    return ready
