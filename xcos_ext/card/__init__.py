"""What a model says of itself: the pixels it wants, what its scores mean, its templates (NumPy only)."""

from .calibration import Calibration, FMRAtScore, FMRCurve
from .preprocessing import ARCFACE, IMAGENET, Preprocessing

__all__ = ["ARCFACE", "IMAGENET", "Calibration", "FMRAtScore", "FMRCurve", "Preprocessing"]
