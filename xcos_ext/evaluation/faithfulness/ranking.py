"""The order in which a map's pixels or cells are taken."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEVELS", "kept_pixels", "ranks"]

#: Shares of the pixels that are deleted or kept: 0, 10, ..., 100 %.
LEVELS = tuple(step / 10 for step in range(11))


def ranks(maps: Tensor, generator: torch.Generator) -> Tensor:
    """The place of every value of a map in its order, the largest first; equal values in random order.

    Without the draw a constant map would be taken row by row, which is a pattern.

    Args:
        maps: [N, ...], floating point.
        generator: on the CPU; one permutation is drawn for all maps of the call.

    Returns:
        int64 [N, K], from 0.
    """
    values = maps.flatten(1)
    mixed = torch.randperm(values.shape[1], generator=generator).to(values.device)
    order = mixed[values[:, mixed].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def kept_pixels(places: Tensor, level: float, mode: str) -> Tensor:
    """Which pixels keep their value.

    Args:
        places: [N, K], from :func:`ranks`.
        level: share of the K.
        mode: ``"deletion"``: all but the first; ``"insertion"``: only the first.

    Returns:
        bool [N, K].
    """
    first = places < round(level * places.shape[1])
    return first if mode == "insertion" else ~first
