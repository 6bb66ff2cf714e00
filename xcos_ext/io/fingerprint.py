"""A short, device-independent name for a set of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["fingerprint_state", "fingerprint_weights"]


def fingerprint_state(state: Mapping[str, Tensor], *, extra: str = "") -> str:
    """SHA-256 over names, shapes and fp32 values of the floating tensors, first 16 hex digits.

    Step counters of batch norm and other integer tensors are left out: they do not change what a network
    computes in evaluation mode.

    Args:
        state: a state dict; order and device do not matter.
        extra: text that goes into the hash, e.g. the kind of head.

    >>> fingerprint_state({"weight": torch.ones(2)}) == fingerprint_state({"weight": torch.ones(2, dtype=torch.half)})
    True
    """
    digest = hashlib.sha256(extra.encode())
    for name in sorted(state):
        tensor = state[name]
        if not tensor.is_floating_point():
            continue
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
        digest.update(f"|{name}:{tuple(tensor.shape)}|".encode())
        digest.update(values.data if values.size else b"")
    return digest.hexdigest()[:16]


def fingerprint_weights(module: nn.Module) -> str:
    """:func:`fingerprint_state` of a module's parameters and buffers."""
    return fingerprint_state(module.state_dict())
