"""Attention, heads, margin heads, models, the closed-form plug-in, and loading."""

from .attention import XCosAttention
from .cells import CellMatrices, cell_matrices
from .head import ClosedFormHead, XCosHead
from .loading import load_model, load_recogniser, save_model
from .margin import ArcFaceHead, CosFaceHead
from .model import XCosModel
from .plugin import DEFAULT_SPREAD, plug, plug_statistics
from .projection import CellProjection
from .statistics import Form, PlugStatistics, find_statistics

__all__ = [
    "DEFAULT_SPREAD",
    "ArcFaceHead",
    "CellMatrices",
    "CellProjection",
    "ClosedFormHead",
    "CosFaceHead",
    "Form",
    "PlugStatistics",
    "XCosAttention",
    "XCosHead",
    "XCosModel",
    "cell_matrices",
    "find_statistics",
    "load_model",
    "load_recogniser",
    "plug",
    "plug_statistics",
    "save_model",
]
