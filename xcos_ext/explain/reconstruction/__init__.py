"""Faces drawn from what a model kept of them, and what its decision is about, seen in such drawings."""

from .drawings import reconstruction_figure
from .explainer import Evidence, ReconstructionExplainer, evidence
from .files import load_decoder, save_decoder, shipped_decoders
from .network import FeatureDecoder
from .sets import fingerprint_of, reconstruct, without

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
