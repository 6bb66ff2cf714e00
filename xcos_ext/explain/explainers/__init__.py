"""Explainers of a pair's score behind one interface: ``explainer(model, a, b) -> (similar, dissimilar)``."""

from .cells import CellMap
from .comparison import explainers_figure
from .controls import CentreMap, RandomMap
from .corrrise import CorrRISE
from .fggb import FGGB
from .gradcam import GradCAM
from .interface import EmbeddingCosine, Explainer, PairModel, Saliency, XCosPairs, as_pair_model
from .occlusion import Occlusion
from .registry import available, create
from .xssab import XSSAB

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
