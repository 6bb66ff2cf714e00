"""Faces drawn from what a model kept of them, and what its decision is about, seen in such drawings."""

from .decoder import (
    FeatureDecoder,
    fingerprint_of,
    load_decoder,
    reconstruct,
    save_decoder,
    shipped_decoders,
    without,
)
from .drawings import reconstruction_figure
from .explainer import Evidence, ReconstructionExplainer, evidence

__all__ = [
    "Evidence",
    "FeatureDecoder",
    "ReconstructionExplainer",
    "evidence",
    "fingerprint_of",
    "load_decoder",
    "reconstruct",
    "reconstruction_figure",
    "save_decoder",
    "shipped_decoders",
    "without",
]
