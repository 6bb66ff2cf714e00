"""Which of several faces is meant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xcos_ext.io.errors import PictureError

from .detector import Face

__all__ = ["POLICIES", "choose_face"]

#: ``prominent``: large and near the middle; ``largest``; ``centre``: nearest to the middle; ``only``: refuse to choose.
POLICIES = ("prominent", "largest", "centre", "only")


def choose_face(
    faces: Sequence[Face], shape: tuple[int, int], policy: str = "prominent", *, name: str = "picture"
) -> Face:
    """Pick one face.

    Args:
        faces: what a detector found, at least one.
        shape: (height, width) of the picture.
        policy: one of :data:`POLICIES`. ``prominent`` takes the greatest area * exp(-(d / r)^2 / 2) * score,
            d being the distance of the box from the picture's middle and r a quarter of its diagonal.
        name: of the picture, for the message.

    Raises:
        PictureError: several faces under the policy ``only``.
        ValueError: another policy, or no faces.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    if not faces:
        raise ValueError("faces: expected at least one face, got none")
    if policy == "only" and len(faces) > 1:
        raise PictureError(
            f"{name}: expected one face, found {len(faces)}; crop the picture, or choose with "
            "--face largest or --face centre"
        )
    boxes = np.array([face.box for face in faces], np.float64)
    area = boxes[:, 2] * boxes[:, 3]
    middle = np.array([shape[1], shape[0]]) / 2
    distance = np.linalg.norm(boxes[:, :2] + boxes[:, 2:] / 2 - middle, axis=1)
    if policy == "centre":
        merit = -distance
    elif policy == "prominent":
        radius = np.hypot(*shape) / 4
        merit = area * np.exp(-((distance / radius) ** 2) / 2) * [face.score for face in faces]
    else:
        merit = area
    return faces[int(merit.argmax())]
