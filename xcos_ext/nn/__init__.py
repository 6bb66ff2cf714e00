"""Attention, heads, margin heads, models, the closed-form plug-in, and loading."""

from xcos_ext.calibration import Calibration, FMRAtScore, FMRCurve
from xcos_ext.fingerprint import fingerprint_weights

from .attention import XCosAttention
from .cells import CellMatrices, cell_matrices
from .compiled import CompiledModel, compile_for_inference
from .head import ClosedFormHead, XCosHead
from .inference import for_inference
from .loading import load_model, load_recogniser, save_model
from .margin import ArcFaceHead, CosFaceHead
from .model import Preprocessing, XCosModel
from .plugin import DEFAULT_SPREAD, plug, plug_statistics
from .projection import CellProjection
from .statistics import Form, PlugStatistics, find_statistics
from .trials import Trial

__all__ = [
    "DEFAULT_SPREAD",
    "ArcFaceHead",
    "Calibration",
    "CellMatrices",
    "CellProjection",
    "ClosedFormHead",
    "CompiledModel",
    "CosFaceHead",
    "FMRAtScore",
    "FMRCurve",
    "Form",
    "PlugStatistics",
    "Preprocessing",
    "Trial",
    "XCosAttention",
    "XCosHead",
    "XCosModel",
    "cell_matrices",
    "compile_for_inference",
    "find_statistics",
    "fingerprint_weights",
    "for_inference",
    "load_model",
    "load_recogniser",
    "plug",
    "plug_statistics",
    "save_model",
]
