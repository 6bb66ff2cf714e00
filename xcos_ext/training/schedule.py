"""The learning rate over time."""

from __future__ import annotations

import math

__all__ = ["warmup_cosine"]


def warmup_cosine(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Factor of the learning rate: a linear rise over ``warmup`` steps, then half a cosine down to ``final``.

    (Loshchilov and Hutter, SGDR, arXiv 1608.03983, one period.)

    Args:
        step: from 0 to ``steps`` - 1.
        steps: of the whole training.
        warmup: steps of the rise; the first has factor 1 / ``warmup``.
        final: factor that the cosine ends at.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
