"""How the operators run under vmap: the mapped dimension is folded into the batch, so one kernel call serves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fold", "fold_shared", "unfold"]


def fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Batched tensor [N, ...] with ``size`` examples along ``dim`` (None: shared by all) to [size * N, ...]."""
    batched = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.flatten(0, 1)


def fold_shared(tensor: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """A map [H, W] shared by the N = ``batch`` pairs of an example to [size * N, H, W], or as it is if all share it."""
    if dim is None:
        return tensor
    rows = tensor.movedim(dim, 0).unsqueeze(1)
    return rows.expand(size, batch, *rows.shape[2:]).flatten(0, 1)


def unfold(result: Any, size: int) -> Any:
    """[size * N, ...] back to [size, N, ...], for a tensor or a tuple of them."""
    if torch.is_tensor(result):
        return result.unflatten(0, (size, result.shape[0] // size))
    return tuple(unfold(part, size) for part in result)
