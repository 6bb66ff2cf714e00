"""Which way a head is turned, by its five points."""

from __future__ import annotations

import numpy as np

__all__ = ["pose_of"]

# Eyes, tip of the nose and corners of the mouth of an average head in millimetres: right and down in a frontal picture,
# and towards the camera. Distances of the template at 63 mm between the pupils; the nose so that the median pitch of
# LFW's and CFP's frontal faces is 1 degree, and depths by ordinary proportions.
_HEAD = np.array([[-31.5, 0, 0], [31.5, 0, 0], [0, 40, 30], [-26, 73, 8], [26, 73, 8]], np.float64)
_SOLVE = np.linalg.pinv(_HEAD - _HEAD.mean(0))


def pose_of(landmarks: np.ndarray) -> tuple[float, float, float]:
    """Yaw, pitch and roll of a head in degrees, by an average head seen from afar (weak perspective).

    Args:
        landmarks: five points (x, y) [5, 2] in the order of :data:`~xcos_ext.faces.ARCFACE_TEMPLATE`.

    A full profile, whose far eye a detector can only guess, comes out at about 60 degrees of yaw.

    Returns:
        yaw: positive if the nose points to the picture's right; pitch: positive if it points down; roll: positive if
        the head leans clockwise. 0 for points that all coincide.

    >>> from xcos_ext.faces import ARCFACE_TEMPLATE
    >>> [abs(round(angle)) < 10 for angle in pose_of(ARCFACE_TEMPLATE)]
    [True, True, True]
    """
    points = np.asarray(landmarks, np.float64)
    seen = (_SOLVE @ (points - points.mean(0))).T  # [2, 3]: right, down and towards the camera, as they are seen
    left, scale, right = np.linalg.svd(seen, full_matrices=False)
    if scale[0] <= 0:
        return 0.0, 0.0, 0.0
    axes = left @ right  # the nearest orthonormal rows
    # The head's own down, as it is seen, tells the roll; the rest is turned back by it.
    x, y = axes[:, 1]
    roll = float(np.arctan2(-x, y))
    cosine, sine = np.cos(roll), np.sin(roll)
    towards = np.array([[cosine, sine], [-sine, cosine]]) @ axes[:, 2]
    yaw, pitch = np.rad2deg(np.arcsin(towards.clip(-1, 1))).tolist()
    return yaw, pitch, float(np.rad2deg(roll))
