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
    leaves = [t.detach().requires_grad_() for t in (a, b)]
    functions = {
        "xcos_ext": xcos_ext.grid_cosine,
        "eager": eager_grid,
        "torch.compile": torch.compile(eager_grid, dynamic=False),
    }
    forward = {name: lambda f=f: f(a, b) for name, f in functions.items()}
    both = {name: with_gradients(f, *leaves) for name, f in functions.items()}
    for name, contenders in (("forward", forward), ("forward+backward", both)):
        yield Case(f"grid_cosine/{name}/fp32", contenders, device=device, note=f"{pairs} pairs of 32x7x7")
