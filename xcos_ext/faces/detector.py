"""What a face detector gives, and what detectors share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from xcos_ext.io.arrays import picture_hint, refuse_masked

__all__ = ["Detector", "Face"]


@dataclass(frozen=True, eq=False)
class Face:
    """A face found in a picture.

    Attributes:
        box: (left, top, width, height) in pixels of the picture; may reach outside it.
        landmarks: fp64 [5, 2], (x, y) in pixels of the picture, in the order of
            :data:`~xcos_ext.faces.ARCFACE_TEMPLATE`; None if the detector gives only boxes.
        score: the detector's confidence in [0, 1]; not comparable between detectors.
        pose: yaw, pitch and roll in degrees, see :func:`~xcos_ext.faces.pose_of`; None if the detector does not say.

    >>> Face((10, 20, 64, 64), None, 0.9).box
    (10, 20, 64, 64)
    """

    box: tuple[float, float, float, float]
    landmarks: np.ndarray | None
    score: float
    pose: tuple[float, float, float] | None = None


@runtime_checkable
class Detector(Protocol):
    """Anything that finds faces. Detectors are not thread-safe: give every thread its own.

    >>> class Everywhere:
    ...     def detect(self, rgb):
    ...         return [Face((0, 0, rgb.shape[1], rgb.shape[0]), None, 1.0)]
    >>> isinstance(Everywhere(), Detector)
    True
    """

    def detect(self, rgb: np.ndarray) -> list[Face]:
        """Find the faces of a picture.

        Args:
            rgb: uint8 [H, W, 3].

        Returns:
            Faces, best score first; empty if there are none.
        """
        ...


def check_picture(rgb: np.ndarray) -> None:
    """What every detector accepts.

    Raises:
        ValueError: not a uint8 RGB picture with pixels in it.
        TypeError: an array with a mask.
    """
    refuse_masked(rgb=rgb)
    if not isinstance(rgb, np.ndarray) or rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        got = f"{rgb.dtype} {list(rgb.shape)}" if isinstance(rgb, np.ndarray) else type(rgb).__name__
        raise ValueError(f"rgb: expected a uint8 array [H, W, 3], got {got}{picture_hint(rgb)}")
    if rgb.size == 0:
        raise ValueError(f"rgb: expected pixels, got an empty picture {list(rgb.shape)}")


def scaled_copy(image: np.ndarray, longest: int, *, enlarge: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A copy whose longer side is ``longest``, or less if that takes more than ``enlarge`` times the picture's size.

    Returns:
        The copy, and the factors [x, y] from picture to copy; a point p (pixel centres at whole coordinates) becomes
        (p + 0.5) * factor - 0.5.
    """
    import cv2

    height, width = image.shape[:2]
    factor = min(longest / max(height, width), enlarge)
    if factor == 1:
        return image, np.ones(2)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, size, interpolation=method), np.array([size[0] / width, size[1] / height])
