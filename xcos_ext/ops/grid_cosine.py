"""grid_cosine: the cosine of two feature maps, cell by cell."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from . import _checks
from ._library import apply, compiled, library, promote_under_autocast
from ._two_maps import two_map_operator

__all__ = ["grid_cosine"]

_forward = torch.ops.xcos_ext.grid_cosine.default
_backward = torch.ops.xcos_ext.grid_cosine_backward.default


@torch.library.register_fake("xcos_ext::grid_cosine", lib=library)
def _fake(a: Tensor, b: Tensor, eps: float) -> Tensor:
    _checks.check_features("grid_cosine", a, b)
    _checks.check_positive("grid_cosine", "eps", eps)
    n, _, h, w = a.shape
    return torch.empty((n, h, w), dtype=_checks.result_dtype(a.dtype), device=a.device)


@torch.library.register_fake("xcos_ext::grid_cosine_backward", lib=library)
def _fake_backward(
    grad_similarity: Tensor, a: Tensor, b: Tensor, eps: float, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    op = "grid_cosine_backward"
    _checks.check_features(op, a, b)
    _checks.check_positive(op, "eps", eps)
    _checks.check_gradient(op, "grad_similarity", grad_similarity, a, True)
    return _checks.gradient_map(a, need_a), _checks.gradient_map(b, need_b)


(_GridCosine,) = two_map_operator("grid_cosine", _backward, default=_forward)


@overload
def grid_cosine(a: Tensor, b: Tensor, *, eps: float = ...) -> Tensor: ...
@overload
def grid_cosine(a: np.ndarray, b: np.ndarray, *, eps: float = ...) -> np.ndarray: ...
def grid_cosine(a: Any, b: Any, *, eps: float = 1e-6) -> Any:
    """Cosine of two feature maps, cell by cell: xCos's S (arXiv 2003.05383).

    ``S[n,h,w] = x.y / (max(|x|, eps) max(|y|, eps))`` with ``x = a[n,:,h,w]`` and ``y = b[n,:,h,w]``.

    Args:
        a: Feature maps [N, C, H, W], float16, bfloat16, float32 or float64; contiguous or channels_last, any
            batch stride (``expand`` broadcasts without a copy). NumPy arrays are taken as well (no bfloat16).
        b: Feature maps of the same shape, dtype and device.
        eps: Lower bound of a cell's norm, above 0.

    Returns:
        S [N, H, W] in [-1, 1] up to rounding: float64 for float64 features, else float32. A zero cell has cosine 0
        and gradient 0; NaN stays in its own cell. Differentiable once, in a and b, and any number of
        times in forward mode.

    Raises:
        RuntimeError: An argument has the wrong rank, shape, dtype, device or value (ValueError for NumPy arrays).
        TypeError: a and b are neither two tensors nor two arrays, or an array has a mask.

    >>> x = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    >>> round(grid_cosine(x, x.flip(1)).item(), 4)
    0.96
    """
    _checks.refuse_tensor("grid_cosine", "eps", eps)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype:
            a, b = promote_under_autocast(a, b)
        return apply(_GridCosine, _forward, a.requires_grad or b.requires_grad, a, b, eps)
    if _checks.are_arrays("grid_cosine", a, b):
        return compiled.grid_cosine_numpy(a, b, eps)
    raise _checks.kind_error("grid_cosine", a, b)
