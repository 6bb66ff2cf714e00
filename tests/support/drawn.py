"""Drawn portraits: detection is tested without anybody's photograph."""

from __future__ import annotations

import numpy as np

from recipes.scenes import LANDMARKS, background, draw_face
from xcos_ext.faces import ARCFACE_TEMPLATE, Face

__all__ = ["LANDMARKS", "TwoFaces", "background", "draw_face", "portrait"]


def portrait(
    height: int = 360, width: int = 320, face: float = 150, degrees: float = 0.0, tint: float = 1.0
) -> np.ndarray:
    """One face in the middle of a wall, uint8 RGB."""
    canvas = background(height, width)
    draw_face(canvas, (width / 2, height / 2), face, degrees, tint)
    return canvas


class TwoFaces:
    """A detector that finds two faces in every picture: all of it, aligned already, and a small one."""

    def detect(self, rgb: np.ndarray) -> list[Face]:
        """Both."""
        points = np.array(ARCFACE_TEMPLATE)
        return [Face((0, 0, 112, 112), points, 0.9), Face((0, 0, 20, 20), points / 5, 0.9)]
