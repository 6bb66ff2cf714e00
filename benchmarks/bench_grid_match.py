"""Cases of grid_match: best and soft, forward, forward and backward, beside shifts and unfold in torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from harness import Case
from peers import matched_by_shifts, matched_by_unfold, with_gradients
from torch import Tensor

import xcos_ext


def cases(device: str, pairs: int | None = None) -> Iterator[Case]:
    """Every case for a device; 1,024 pairs on a CPU and 65,536 on a GPU unless told otherwise."""
    pairs = min(pairs or 65_536, 65_536 if device == "cuda" else 1_024)
    a, b = (torch.randn(pairs, 32, 7, 7, device=device) for _ in range(2))
    leaves = [t.detach().requires_grad_() for t in (a, b)]
    for radius, match in ((1, "best"), (2, "best"), (1, "soft")):

        def shifts(x: Tensor, y: Tensor, radius: int = radius, match: str = match) -> Tensor:
            return matched_by_shifts(x, y, radius, match)

        functions = {
            "xcos_ext": partial(xcos_ext.grid_match, radius=radius, match=match),
            "eager": shifts,
            "torch.compile": torch.compile(shifts, dynamic=False),
            "unfold": partial(matched_by_unfold, radius=radius, match=match),
        }
        made = {"forward": {name: partial(f, a, b) for name, f in functions.items()}}
        functions.pop("unfold")
        if radius == 1:
            made["forward+backward"] = {name: with_gradients(f, *leaves) for name, f in functions.items()}
        for name, contenders in made.items():
            case = f"grid_match/{match}-{radius}/{name}/fp32"
            yield Case(case, contenders, device=device, note=f"{pairs} pairs of 32x7x7")
