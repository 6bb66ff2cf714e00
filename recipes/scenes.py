"""Drawn faces and generated pictures of nothing: to train the detector on, and for tests without a photograph."""

from __future__ import annotations

import functools

import cv2
import numpy as np

__all__ = ["LANDMARKS", "background", "draw_face", "drawn_scene", "nothing", "texture"]

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
    face, mask = _drawn(round(tint, 2))
    middle = len(mask) // 2
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


@functools.lru_cache(maxsize=32)
def _drawn(tint: float) -> tuple[np.ndarray, np.ndarray]:
    """A face of width 200 in the middle of a square [480, 480, 3], and where it is."""
    side = 480
    face: np.ndarray = np.zeros((side, side, 3), np.float32)
    mask: np.ndarray = np.zeros((side, side), np.float32)
    middle = side // 2

    def at(x: float, y: float) -> tuple[int, int]:
        return int(middle + x), int(middle + y)

    def blob(x: float, y: float, rx: float, ry: float, colour: tuple[float, float, float], soft: float) -> None:
        layer: np.ndarray = np.zeros((side, side), np.float32)
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
    return face, mask


def background(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A dull wall, uint8 RGB [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(128, 12, (4, 5, 3)).astype(np.float32)
    wall = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(wall, 0, 255).astype(np.uint8)


def drawn_scene(side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One to three drawn faces on a wall or a texture: uint8 [side, side, 3] and faces [F, 15] as of a detector: box,
    five points, score."""
    canvas = background(side, side, int(rng.integers(1 << 30))) if rng.random() < 0.5 else nothing(side, rng)
    found: list[np.ndarray] = []
    for _ in range(int(rng.integers(1, 4))):
        width = float(np.exp(rng.uniform(np.log(14), np.log(0.62 * side))))
        centre = rng.uniform(0.4 * width, side - 0.4 * width, 2)
        if any(np.hypot(*(centre - (f[:2] + f[2:4] / 2))) < 0.8 * (width + f[2]) for f in found):
            continue
        points = draw_face(
            canvas,
            (float(centre[0]), float(centre[1])),
            width,
            float(rng.normal(0, 15)),
            float(rng.choice([0.5, 0.65, 0.8, 0.9, 1.0, 1.1])),
        )
        box = [centre[0] - 0.42 * width, centre[1] - 0.5 * width, 0.84 * width, 1.15 * width]
        found.append(np.concatenate([box, points.reshape(-1), [1.0]]).astype(np.float32))
    return canvas, np.array(found, np.float32).reshape(-1, 15)


def texture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth coloured noise of all scales: full of blobs."""
    total = np.zeros((height, width, 3), np.float32)
    fall = float(rng.uniform(0.4, 1.4))
    for octave in range(1, int(rng.integers(4, 8))):
        noise = rng.standard_normal((2**octave, 2**octave, 3 if rng.random() < 0.5 else 1), dtype=np.float32)
        total += (
            cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, -1) / octave**fall
        )
    total = (total - total.min()) / (np.ptp(total) + 1e-6)
    colours = rng.uniform(0, 255, (2, 3))
    return np.clip(colours[0] + (colours[1] - colours[0]) * total, 0, 255).astype(np.uint8)


def nothing(side: int, rng: np.random.Generator) -> np.ndarray:
    """A picture without a face, uint8 [side, side, 3]: one of eight kinds of noise, patterns and drawings."""
    kind = int(rng.integers(8))
    colours = rng.integers(0, 256, (64, 3))
    at = np.arange(side, dtype=np.float32)
    if kind == 0:
        return texture(side, side, rng)
    if kind == 1:  # noise for each pixel, of some grain
        grain = max(1, side // int(2 ** rng.uniform(0, 5)))
        noise = rng.normal(128, rng.uniform(5, 90), (grain, grain, 3)).astype(np.float32)
        return np.clip(cv2.resize(noise, (side, side), interpolation=int(rng.integers(3))), 0, 255).astype(np.uint8)
    if kind == 2:  # waves
        angle, frequency = rng.uniform(0, np.pi, 3), rng.uniform(0.02, 0.8, 3)
        waves = sum(
            np.sin(f * (np.cos(a) * at[None] + np.sin(a) * at[:, None])) for a, f in zip(angle, frequency, strict=True)
        )
        shade = (waves / 6 + 0.5)[:, :, None]
        return np.clip(colours[0] * shade + colours[1] * (1 - shade), 0, 255).astype(np.uint8)
    canvas = texture(side, side, rng) if rng.random() < 0.3 else np.full((side, side, 3), colours[0], np.uint8)
    for i in range(int(rng.integers(3, 40))):
        colour = tuple(int(v) for v in colours[i + 1])
        x, y = (int(v) for v in rng.integers(0, side, 2))
        r, q = (int(v) for v in rng.integers(1, max(2, side // 4), 2))
        if kind == 3:
            cv2.circle(canvas, (x, y), r, colour, -1, cv2.LINE_AA)
        elif kind == 4:
            cv2.ellipse(canvas, (x, y), (r, q), float(rng.uniform(0, 180)), 0, 360, colour, int(rng.choice([-1, 1, 3])))
        elif kind == 5:
            cv2.rectangle(canvas, (x, y), (x + r, y + q), colour, int(rng.choice([-1, 1, 2])))
        elif kind == 6:
            text = "".join(chr(c) for c in rng.integers(33, 123, int(rng.integers(1, 12))))
            cv2.putText(
                canvas,
                text,
                (x - side // 3, y),
                int(rng.integers(8)),
                float(rng.uniform(0.3, 3)),
                colour,
                int(rng.integers(1, 4)),
                cv2.LINE_AA,
            )
        else:
            cv2.line(canvas, (x, y), tuple(int(v) for v in rng.integers(0, side, 2)), colour, int(rng.integers(1, 9)))
    return canvas
