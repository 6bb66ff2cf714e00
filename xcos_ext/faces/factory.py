"""Which detectors there are, by the name that a user writes."""

from __future__ import annotations

import os

from .cascade import CascadeDetector
from .detector import Detector
from .yunet import YuNetDetector

__all__ = ["create_detector"]


def create_detector(spec: str | os.PathLike[str] = "cascade") -> Detector:
    """The detector for a setting as a user writes it.

    Args:
        spec: ``"cascade"`` for :class:`CascadeDetector`, or the path of a YuNet network (``.onnx``) for
            :class:`YuNetDetector`.

    Raises:
        ModelError: the file cannot be used as a YuNet detector.
        ValueError: neither of the two.
    """
    if spec == "cascade":
        return CascadeDetector()
    if str(spec).lower().endswith(".onnx"):
        return YuNetDetector(spec)
    raise ValueError(f"detector: expected 'cascade' or the path of a YuNet .onnx file, got {str(spec)!r}")
