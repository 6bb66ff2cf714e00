"""Explainers by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .gradients import FGGB, XSSAB, GradCAM
from .interface import Explainer
from .masking import CorrRISE, Occlusion
from .simple import CellMap, CentreMap, RandomMap

__all__ = ["available", "create"]


def _reconstruction(**options: Any) -> Explainer:
    from xcos_ext.explain.reconstruction import ReconstructionExplainer  # it imports this package's interface

    return ReconstructionExplainer(**options)


_EXPLAINERS: dict[str, Callable[..., Explainer]] = {
    "xcos": partial(CellMap, "contribution"),
    "xcos-similarity": partial(CellMap, "similarity"),
    "xcos-attention": partial(CellMap, "attention"),
    "corrrise": CorrRISE,
    "fggb": FGGB,
    "xssab": XSSAB,
    "occlusion": Occlusion,
    "gradcam": GradCAM,
    "reconstruction": _reconstruction,
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
