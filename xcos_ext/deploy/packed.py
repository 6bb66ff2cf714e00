"""A folded body whose convolutions oneDNN runs as it likes best: weights in its own layout, what follows fused in."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["LARGEST_ALLOCATION", "can_pack", "largest_activation", "pack"]

#: Bytes from which glibc maps fresh pages at every allocation (its highest threshold): a page fault for each 4 KiB
#: costs more than the layer that fills them.
LARGEST_ALLOCATION = (32 << 20) - (64 << 10)

_ADDITIONS = {operator.add, operator.iadd, torch.add}
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}


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
    """Runs a graph once and keeps shape and bytes of what every node makes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.largest = 0

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if isinstance(made, Tensor):
            self.shapes[n] = tuple(made.shape)
            self.largest = max(self.largest, made.numel() * made.element_size())
        return made


def _run(body: fx.GraphModule, images: Tensor) -> _Shapes:
    shapes = _Shapes(body)
    with torch.no_grad():
        shapes.run(images)
    return shapes


def largest_activation(body: fx.GraphModule, images: Tensor) -> int:
    """Bytes of the largest tensor between the layers, a picture; ``images`` is one batch."""
    return _run(body, images).largest // images.shape[0]


def _packable(module: nn.Module | None) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.dtype in _FLOATS
        and module.weight.device.type == "cpu"
    )


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, tuple[float, ...]] | None:
    """oneDNN's name of an activation with its numbers, or None for one that it does not fuse here."""
    if node.op == "call_module":
        module = modules.get(str(node.target))  # None: packed already, with an addition
        if isinstance(module, nn.ReLU):
            return "relu", ()
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
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
    shapes = _run(body, images).shapes
    packed = fx.GraphModule(body, copy.deepcopy(body.graph))
    modules = dict(packed.named_modules())
    # The copy's nodes stand in the original's order; new ones are entered as they come.
    known = dict(zip(packed.graph.nodes, (shapes.get(n) for n in body.graph.nodes), strict=True))
    for count, node in enumerate(list(packed.graph.nodes)):
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        if not _packable(conv):
            continue
        assert isinstance(conv, nn.Conv2d)
        source = node.all_input_nodes[0]
        inputs: tuple[fx.Node, ...] = (source,)
        last, made = node, None
        shape = known[source]
        assert shape is not None
        (user,) = node.users if len(node.users) == 1 else (None,)
        if user is not None and (fused := _activation(user, modules)) is not None:
            last, made = user, _Packed(conv, shape, fused[0], *fused[1])
        elif user is not None and user.target in _ADDITIONS and len(user.args) == 2 and not user.kwargs:
            other = user.args[0] if user.args[1] is node else user.args[1]
            # The sum is computed in the addition's place, where both summands are there.
            if isinstance(other, fx.Node) and other is not node and known.get(other) == known[node]:
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
