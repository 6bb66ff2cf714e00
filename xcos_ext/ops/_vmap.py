"""How the operators run under vmap: the mapped dimension is folded into the batch, so one kernel call serves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fold", "unfold"]


def fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Batched tensor [N, ...] with ``size`` examples along ``dim`` (None: shared by all) to [size * N, ...]."""
    batched = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.flatten(0, 1)


def unfold(result: Any, size: int) -> Any:
    """[size * N, ...] back to [size, N, ...], for a tensor or a tuple of them."""
    if torch.is_tensor(result):
        return result.unflatten(0, (size, result.shape[0] // size))
    return tuple(unfold(part, size) for part in result)
