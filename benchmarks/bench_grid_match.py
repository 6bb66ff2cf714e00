"""Cases of grid_match: best and soft, forward, forward and backward, beside shifts and unfold in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from harness import Case
from peers import matched_by_shifts, matched_by_unfold, with_gradients
from torch import Tensor

import xcos_ext


def cases(device: str, pairs: int | None = None) -> Iterator[Case]:
    """Every case for a device; 1,024 pairs on a CPU and 65,536 on a GPU unless told otherwise."""
    pairs = min(pairs or 65_536, 65_536 if device == "cuda" else 1_024)
    a, b = (torch.randn(pairs, 32, 7, 7, device=device) for _ in range(2))
    note = f"{pairs} pairs of 32x7x7"
    for radius, match in ((1, "best"), (2, "best"), (1, "soft")):

        def ours(x: Tensor, y: Tensor, radius: int = radius, match: Any = match) -> Tensor:
            return xcos_ext.grid_match(x, y, radius=radius, match=match)

        def shifts(x: Tensor, y: Tensor, radius: int = radius, match: str = match) -> Tensor:
            return matched_by_shifts(x, y, radius, match)

        def unfold(x: Tensor, y: Tensor, radius: int = radius, match: str = match) -> Tensor:
            return matched_by_unfold(x, y, radius, match)

        peers = {"eager": shifts, "torch.compile": torch.compile(shifts, dynamic=False), "unfold": unfold}
        yield Case(
            f"grid_match/{match}-{radius}/forward/fp32",
            {name: lambda f=f: f(a, b) for name, f in {"xcos_ext": ours, **peers}.items()},
            device=device,
            note=note,
        )
        if radius == 1:
            leaf_a, leaf_b = a.detach().requires_grad_(), b.detach().requires_grad_()
            peers.pop("unfold")
            yield Case(
                f"grid_match/{match}-{radius}/forward+backward/fp32",
                {name: with_gradients(f, leaf_a, leaf_b) for name, f in {"xcos_ext": ours, **peers}.items()},
                device=device,
                note=note,
            )
