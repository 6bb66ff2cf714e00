"""Operators of two feature maps and some options, differentiable once in the maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import apply, backward_function, differentiable
from ._vmap import fold, unfold

__all__ = ["two_map_operator"]


def _fold(size: int, in_dims: tuple[Any, ...], a: Tensor, b: Tensor, *options: Any) -> tuple[Any, ...]:
    return fold(a, in_dims[0], size), fold(b, in_dims[1], size), *options


def two_map_operator(name: str, backward: Any, **overloads: Any) -> list[type[torch.autograd.Function]]:
    """Autograd, autocast and vmap for an operator.

    Args:
        name: of the operator.
        backward: its backward operator: the gradient of the first output, the maps, the options, and which of the
            maps need a gradient.
        overloads: the operator by the name of its overload; outputs behind the first have no gradient.

    Returns:
        The function of each overload.
    """

    def vmap_backward(
        info: Any, in_dims: tuple[Any, ...], grad: Tensor, a: Tensor, b: Tensor, *options: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        size = info.batch_size
        folded = (fold(t, d, size) for t, d in zip((grad, a, b), in_dims, strict=False))
        results = [(unfold(g, size), 0) if g.numel() else (g, None) for g in backward(*folded, *options)]
        return tuple(r for r, _ in results), tuple(d for _, d in results)

    function = backward_function(name, backward, vmap_backward)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        a, b, *ctx.options = inputs
        ctx.save_for_backward(a, b)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])

    def gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad[:2]
        grad_a, grad_b = apply(function, backward, True, grad, a, b, *ctx.options, need_a, need_b)
        return grad_a if need_a else None, grad_b if need_b else None, *(None,) * len(ctx.options)

    return [
        differentiable(name if overload == "default" else f"{name}.{overload}", op, setup_context, gradients, _fold)
        for overload, op in overloads.items()
    ]
