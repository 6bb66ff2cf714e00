"""A drawn face that the cascades take for one: detection is tested without anybody's photograph."""

from __future__ import annotations

import cv2
import numpy as np

from xcos_ext.faces import ARCFACE_TEMPLATE, Face

#: Where the drawing's eyes, nose and corners of the mouth are, for a face of width 200 centred at (0, 0).
LANDMARKS = np.array([[-42.0, -28.0], [42.0, -28.0], [0.0, 22.0], [-34.0, 70.0], [34.0, 70.0]])


def draw_face(
    canvas: np.ndarray, centre: tuple[float, float], width: float, degrees: float = 0.0, tint: float = 1.0
) -> np.ndarray:
    """Paint a face on a picture.

    Args:
        canvas: uint8 RGB [H, W, 3]; changed in place.
        centre: (x, y) of the face.
        width: of the head, pixels.
        degrees: roll, clockwise.
        tint: brightness of the skin, to make another face of it.

    Returns:
        Landmarks [5, 2] in pixels of the canvas.
    """
    side = 480
    face = np.full((side, side, 3), 0, np.float32)
    mask = np.zeros((side, side), np.float32)
    middle = side // 2

    def at(x: float, y: float) -> tuple[int, int]:
        return int(middle + x), int(middle + y)

    def blob(x: float, y: float, rx: float, ry: float, colour: tuple[float, float, float], soft: float) -> None:
        layer = np.zeros((side, side), np.float32)
        cv2.ellipse(layer, at(x, y), (int(rx), int(ry)), 0, 0, 360, 1.0, -1, cv2.LINE_AA)
        layer = cv2.GaussianBlur(layer, (0, 0), soft)[:, :, None]
        face[:] = face * (1 - layer) + layer * np.array(colour, np.float32)

    skin = np.array([205, 170, 150], np.float32) * tint
    cv2.ellipse(mask, at(0, 5), (105, 145), 0, 0, 360, 1.0, -1, cv2.LINE_AA)
    blob(0, -10, 118, 160, (60, 42, 34), 3)  # hair
    blob(0, 18, 92, 124, tuple(skin), 6)
    blob(0, -70, 70, 34, tuple(skin * 1.12), 14)  # forehead
    for side_of in (-1, 1):
        blob(side_of * 42, -30, 32, 20, tuple(skin * 0.66), 8)  # socket
        blob(side_of * 46, 28, 24, 20, tuple(skin * 1.14), 10)  # cheek
        blob(side_of * 42, -52, 27, 5, (64, 46, 40), 2.5)  # brow
        blob(side_of * 42, -28, 18, 9, (225, 220, 215), 1.5)
        blob(side_of * 42, -28, 9, 9, (38, 28, 26), 1.2)
        blob(side_of * 42, -37, 20, 3, (50, 36, 34), 1.5)  # lid
        blob(side_of * 10, 30, 5, 4, tuple(skin * 0.5), 2)  # nostril
    blob(0, -8, 8, 34, tuple(skin * 1.15), 6)
    blob(0, 34, 18, 5, tuple(skin * 0.72), 4)
    blob(0, 70, 34, 10, (150, 82, 80), 2.5)
    blob(0, 69, 30, 2, (88, 44, 44), 1.5)
    blob(0, 92, 24, 5, tuple(skin * 0.8), 5)
    mask = cv2.GaussianBlur(mask, (0, 0), 2)
    scale = width / 200
    radians = np.deg2rad(degrees)
    linear = scale * np.array([[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]])
    matrix = np.hstack([linear, (np.array(centre) - linear @ [middle, middle])[:, None]])
    size = (canvas.shape[1], canvas.shape[0])
    if scale < 0.7:  # no jagged small faces
        blurred = 0.35 / scale
        face, mask = cv2.GaussianBlur(face, (0, 0), blurred), cv2.GaussianBlur(mask, (0, 0), blurred)
    painted = cv2.warpAffine(face, matrix, size, flags=cv2.INTER_LINEAR)
    alpha = cv2.warpAffine(mask, matrix, size, flags=cv2.INTER_LINEAR)[:, :, None]
    canvas[:] = np.clip(canvas * (1 - alpha) + painted * alpha, 0, 255).astype(np.uint8)
    return LANDMARKS @ linear.T + np.array(centre)


def background(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A dull wall, uint8 RGB [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(128, 12, (4, 5, 3)).astype(np.float32)
    wall = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(wall, 0, 255).astype(np.uint8)


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
