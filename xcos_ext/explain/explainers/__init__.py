"""Explainers of a pair's score behind one interface: ``explainer(model, a, b) -> (similar, dissimilar)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .comparison import explainers_figure
from .gradients import FGGB, XSSAB, GradCAM
from .interface import EmbeddingCosine, Explainer, PairModel, Saliency, XCosPairs, as_pair_model
from .masking import CorrRISE, Occlusion
from .simple import CellMap, CentreMap, RandomMap

__all__ = [
    "FGGB",
    "XSSAB",
    "CellMap",
    "CentreMap",
    "CorrRISE",
    "EmbeddingCosine",
    "Explainer",
    "GradCAM",
    "Occlusion",
    "PairModel",
    "RandomMap",
    "Saliency",
    "XCosPairs",
    "as_pair_model",
    "available",
    "create",
    "explainers_figure",
]


def _reconstruction(**options: Any) -> Explainer:
    from xcos_ext.explain.reconstruction import ReconstructionExplainer  # it builds on this package

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
    """Names that :func:`create` accepts: xCos's own maps first, controls last.

    >>> available()[:4]
    ('xcos', 'xcos-similarity', 'xcos-attention', 'corrrise')
    """
    return tuple(_EXPLAINERS)


def create(name: str, **options: Any) -> Explainer:
    """An explainer; ValueError if there is none of that name.

    >>> create("corrrise", masks=100).name
    'corrrise'

    Args:
        name: one of :func:`available`.
        **options: of its class.
    """
    if name not in _EXPLAINERS:
        raise ValueError(f"name: expected one of {', '.join(_EXPLAINERS)}, got {name!r}")
    return _EXPLAINERS[name](**options)
