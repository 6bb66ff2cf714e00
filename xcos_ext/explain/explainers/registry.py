"""Explainers by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .cells import CellMap
from .controls import CentreMap, RandomMap
from .interface import Explainer

__all__ = ["available", "create"]

_EXPLAINERS: dict[str, Callable[..., Explainer]] = {
    "xcos": partial(CellMap, "contribution"),
    "xcos-similarity": partial(CellMap, "similarity"),
    "xcos-attention": partial(CellMap, "attention"),
    "random": RandomMap,
    "centre": CentreMap,
}


def available() -> tuple[str, ...]:
    """Names that :func:`create` accepts: xCos's own maps first, controls last."""
    return tuple(_EXPLAINERS)


def create(name: str, **options: Any) -> Explainer:
    """An explainer.

    Args:
        name: one of :func:`available`.
        **options: of its class.

    Raises:
        ValueError: no such name.
    """
    factory = _EXPLAINERS.get(name)
    if factory is None:
        raise ValueError(f"name: expected one of {', '.join(available())}, got {name!r}")
    return factory(**options)
