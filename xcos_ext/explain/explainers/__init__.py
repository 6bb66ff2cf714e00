"""Explainers of a pair's score behind one interface: ``explainer(model, a, b) -> (similar, dissimilar)``."""

from .cells import CellMap
from .controls import CentreMap, RandomMap
from .interface import EmbeddingCosine, Explainer, PairModel, Saliency, XCosPairs, as_pair_model
from .registry import available, create

__all__ = [
    "CellMap",
    "CentreMap",
    "EmbeddingCosine",
    "Explainer",
    "PairModel",
    "RandomMap",
    "Saliency",
    "XCosPairs",
    "as_pair_model",
    "available",
    "create",
]
