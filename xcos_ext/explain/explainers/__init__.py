"""Explainers of a pair's score behind one interface: ``explainer(model, a, b) -> (similar, dissimilar)``."""

from .comparison import explainers_figure
from .gradients import FGGB, XSSAB, GradCAM
from .interface import EmbeddingCosine, Explainer, PairModel, Saliency, XCosPairs, as_pair_model
from .masking import CorrRISE, Occlusion
from .registry import available, create
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
