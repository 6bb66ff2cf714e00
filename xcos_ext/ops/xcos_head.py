"""xcos_head: learned attention and score of pairs of grid features in one call, for inference."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _checks
from ._kept import kept
from ._library import below_autograd, inference_only, library, promote_under_autocast, say_it_better, tracked
from ._vmap import fold, unfold
from .xcos_score import XCosScore

__all__ = ["HEAD_HIDDEN", "HEAD_MOST_CELLS", "HeadLayer", "HeadParameters", "xcos_head"]

_OP = "xcos_head"

# kHeadHidden and kHeadMostCells in csrc/core/xcos_head.h.
HEAD_HIDDEN = 16
HEAD_MOST_CELLS = 64

_forward = torch.ops.xcos_ext.xcos_head.default
_forward_maps = torch.ops.xcos_ext.xcos_head.maps


@kept
class HeadLayer(NamedTuple):
    """A 3x3 convolution, the batch norm behind it (in evaluation mode) and a PReLU with one slope.

    Attributes:
        weight: [out, in, 3, 3], any strides.
        bias: [out].
        norm_weight: [out].
        norm_bias: [out].
        norm_mean: running mean [out].
        norm_variance: running variance [out].
        slope: [1].
        norm_eps: added to the variance.

    >>> norm = [torch.ones(16)] * 4
    >>> HeadLayer(torch.ones(16, 32, 3, 3), torch.zeros(16), *norm, torch.ones(1)).norm_eps
    1e-05
    """

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    norm_mean: Tensor
    norm_variance: Tensor
    slope: Tensor
    norm_eps: float = 1e-5


@kept
class HeadParameters(NamedTuple):
    """The attention network of xCos (arXiv 2003.05383) as :class:`xcos_ext.model.XCosAttention` holds it.

    All tensors float16, bfloat16 or float32, one dtype, on the features' device. They are read at every call.

    Attributes:
        embed: C -> 16.
        first: 32 -> 16.
        last: 16 -> 1; of a residual attention, whose last convolution stands alone, only (weight, bias).

    >>> def layer(n, m):
    ...     return HeadLayer(torch.ones(n, m, 3, 3), torch.zeros(n), *[torch.ones(n)] * 4, torch.ones(1))
    >>> len(HeadParameters(layer(16, 32), layer(16, 32), layer(1, 16)).tensors())
    21
    """

    embed: HeadLayer
    first: HeadLayer
    last: HeadLayer | tuple[Tensor, Tensor]

    @property
    def residual(self) -> bool:
        return not isinstance(self.last, HeadLayer)

    def tensors(self) -> list[Tensor]:
        """The operators' argument ``parameters``."""
        return [*self.embed[:7], *self.first[:7], *self.last[:7]]  # type: ignore[list-item]

    def norm_eps(self) -> list[float]:
        """The operators' argument of that name."""
        return [layer.norm_eps for layer in self if isinstance(layer, HeadLayer)]


_LAYER = ("weight", "bias", "norm_weight", "norm_bias", "norm_mean", "norm_variance", "slope")
_NAMES = [f"{layer}_{name}" for layer in ("embed", "first", "last") for name in _LAYER]


def _check(
    a: Tensor,
    b: Tensor,
    parameters: list[Tensor],
    norm_eps: list[float],
    temperature: float,
    residual: bool,
    eps: float,
) -> None:
    _checks.check_features(_OP, a, b)
    _checks.check_head(_OP, a, parameters, _NAMES, norm_eps, residual)
    _checks.check_positive(_OP, "temperature", temperature)
    _checks.check_positive(_OP, "eps", eps)


@torch.library.register_fake("xcos_ext::xcos_head", lib=library)
def _fake(
    a: Tensor,
    b: Tensor,
    parameters: list[Tensor],
    norm_eps: list[float],
    temperature: float,
    symmetric: bool,
    residual: bool,
    eps: float,
) -> Tensor:
    _check(a, b, parameters, norm_eps, temperature, residual, eps)
    return a.new_empty((a.shape[0],), dtype=torch.float32)


@torch.library.register_fake("xcos_ext::xcos_head.maps", lib=library)
def _fake_maps(
    a: Tensor,
    b: Tensor,
    parameters: list[Tensor],
    norm_eps: list[float],
    temperature: float,
    symmetric: bool,
    residual: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    score = _fake(a, b, parameters, norm_eps, temperature, symmetric, residual, eps)
    n, _, h, w = a.shape
    return score, score.new_empty((n, h, w)), score.new_empty((n, h, w))


def _refuse_gradients(a: Tensor, b: Tensor, parameters: list[Tensor], *_: Any) -> None:
    if tracked(a, b, *parameters):
        raise RuntimeError(
            f"{_OP}: expected no gradient to be asked for, got an argument that requires one or has a tangent: this "
            "operator is for inference; wrap the call in torch.no_grad(), or call xcos_ext.reference.xcos_head or "
            "xcos_ext.model.XCosHead.score, which can be differentiated"
        )


def _register(name: str, op: Any) -> None:
    inference_only(name, op, _refuse_gradients)

    for device in ("CPU", "CUDA"):

        def autocast_kernel(a: Tensor, b: Tensor, *rest: Any, _device: str = device.lower()) -> Any:
            a, b = promote_under_autocast(a, b)
            with torch.autocast(_device, enabled=False):
                return op(a, b, *rest)

        library.impl(name, autocast_kernel, f"Autocast{device}")

    def vmap(info: Any, in_dims: tuple[Any, ...], a: Tensor, b: Tensor, parameters: list[Tensor], *rest: Any) -> Any:
        if any(dim is not None for dim in torch.utils._pytree.tree_leaves(in_dims[2])):
            raise RuntimeError(f"{_OP}: parameters: expected the same for all examples under vmap, got mapped ones")
        size = info.batch_size
        results = op(fold(a, in_dims[0], size), fold(b, in_dims[1], size), parameters, *rest)
        return unfold(results, size), 0 if torch.is_tensor(results) else (0, 0, 0)

    torch.library.register_vmap(op, vmap, lib=library)


_register(_OP, _forward)
_register(f"{_OP}.maps", _forward_maps)


@overload
def xcos_head(
    a: Tensor,
    b: Tensor,
    parameters: HeadParameters,
    *,
    temperature: float = ...,
    symmetric: bool = ...,
    eps: float = ...,
    return_maps: Literal[False] = ...,
) -> Tensor: ...
@overload
def xcos_head(
    a: Tensor,
    b: Tensor,
    parameters: HeadParameters,
    *,
    temperature: float = ...,
    symmetric: bool = ...,
    eps: float = ...,
    return_maps: Literal[True],
) -> XCosScore: ...
@overload
def xcos_head(
    a: Tensor,
    b: Tensor,
    parameters: HeadParameters,
    *,
    temperature: float = ...,
    symmetric: bool = ...,
    eps: float = ...,
    return_maps: bool,
) -> Tensor | XCosScore: ...
def xcos_head(
    a: Tensor,
    b: Tensor,
    parameters: HeadParameters,
    *,
    temperature: float = 1.0,
    symmetric: bool = True,
    eps: float = 1e-6,
    return_maps: bool = False,
) -> Tensor | XCosScore:
    """xCos of pairs of grid features with the attention network itself, in one pass: W, S and ``sum W * S``.

    ``W = softmax(g(A, B) / T)`` over the cells, with g the network of :class:`xcos_ext.model.XCosAttention`; residual
    parameters add ``T (log |F(A)| + log |F(B)|)`` to g. Batch norms are folded as in evaluation mode. For inference:
    :class:`xcos_ext.model.XCosHead` calls this by itself where no gradient is wanted.

    Args:
        a: Grid features [N, C, H, W] of the first faces, float16, bfloat16 or float32, at most 64 cells; contiguous
            or channels_last, any batch stride (``expand`` broadcasts without a copy).
        b: Grid features of the second faces; same shape, dtype and device.
        parameters: :class:`HeadParameters`, with 16 hidden channels.
        temperature: T, above 0.
        symmetric: The mean of W(A, B) and W(B, A); False: W(A, B), the published form.
        eps: Lower bound of a cell's norm, above 0.
        return_maps: Also return S and W.

    Returns:
        Scores [N], float32, or ``XCosScore(score [N], similarity [N, H, W], attention [N, H, W])``. Half precision is
        computed in float32; float64 is not taken. A zero cell has cosine 0; NaN stays in its pair.

    Raises:
        RuntimeError: An argument has the wrong rank, shape, dtype, device or value, or a gradient is asked for.
        TypeError: a or b is not a tensor, parameters is no HeadParameters, a number is in a tensor, or a flag is not
            True or False.

    >>> def layer(n, m):
    ...     return HeadLayer(torch.ones(n, m, 3, 3), torch.zeros(n), *[torch.ones(n)] * 4, torch.ones(1))
    >>> parameters = HeadParameters(layer(16, 32), layer(16, 32), layer(1, 16))
    >>> round(xcos_head(torch.ones(1, 32, 7, 7), torch.ones(1, 32, 7, 7), parameters).item(), 4)
    1.0
    """
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{_OP}: {name}: expected a torch.Tensor, got {type(value).__name__}")
    if not isinstance(parameters, HeadParameters):
        raise TypeError(f"{_OP}: parameters: expected HeadParameters, got {type(parameters).__name__}")
    _checks.refuse_tensor(_OP, "temperature", temperature)
    _checks.refuse_tensor(_OP, "eps", eps)
    symmetric = _checks.checked_flag(_OP, "symmetric", symmetric)
    return_maps = _checks.checked_flag(_OP, "return_maps", return_maps)
    if a.dtype != b.dtype:
        a, b = promote_under_autocast(a, b)
    op = _forward_maps if return_maps else _forward
    tensors = parameters.tensors()
    options = (tensors, parameters.norm_eps(), temperature, symmetric, parameters.residual, eps)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        result = op(a, b, *options)
    else:
        _refuse_gradients(a, b, tensors)
        try:
            with below_autograd():
                result = op(a, b, *options)
        except RuntimeError as error:
            say_it_better(error)
            raise
    return XCosScore(*result) if return_maps else result
