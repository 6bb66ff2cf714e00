"""Cases of grid_cosine: forward, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case
from peers import eager_grid, with_gradients

import xcos_ext


def cases(device: str, pairs: int | None = None) -> Iterator[Case]:
    """Every case for a device; 4,096 pairs on a CPU and 262,144 on a GPU unless told otherwise."""
    pairs = pairs or (262_144 if device == "cuda" else 4_096)
    a, b = (torch.randn(pairs, 32, 7, 7, device=device) for _ in range(2))
    note = f"{pairs} pairs of 32x7x7"
    forward = {
        "xcos_ext": xcos_ext.grid_cosine,
        "eager": eager_grid,
        "torch.compile": torch.compile(eager_grid, dynamic=False),
    }
    yield Case(
        "grid_cosine/forward/fp32",
        {name: lambda f=f: f(a, b) for name, f in forward.items()},
        {},
        [],
        device,
        note=note,
    )
    leaf_a, leaf_b = a.detach().requires_grad_(), b.detach().requires_grad_()
    yield Case(
        "grid_cosine/forward+backward/fp32",
        {name: with_gradients(f, leaf_a, leaf_b) for name, f in forward.items()},
        {}, [], device, note=note,
    )  # fmt: skip
