"""Aligned faces as a camera may also have seen them: turned, covered, small, compressed, lit from one side.

What is drawn here leaves the person the same; :mod:`xcos_ext.training.augment` moves and recolours.
"""

from __future__ import annotations

import math
from functools import cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xcos_ext.faces.alignment import apply_transform, similarity_transform, template_for

__all__ = ["LENSES", "MASK", "compressed", "covered", "cut", "shaded", "shrunk", "turned"]

_SIDE = 112

# --- turned: over an average head, in pixels of the aligned crop (about 1.8 mm each)

_CENTRE = 56.0, 62.0  # of the head
_RADII = 45.0, 74.0, 54.0  # half its width, height, depth
_TURNS = 48  # different turns
_YAW = 20.0, 80.0  # degrees, either way
_PITCH = 12.0  # degrees at most, either way
_OVERSAMPLED = 4


def _depth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the skin in front of the head's axis; NaN where there is no head."""
    (cx, cy), (rx, ry, rz) = _CENTRE, _RADII
    u, v = (x - cx) / rx, (y - cy) / ry
    inside = 1 - u**2 - v**2
    z = rz * np.sqrt(np.where(inside > 0, inside, np.nan))
    nose = 12 * np.exp(-(((x - cx) / 6) ** 2)) * np.clip((y - 50) / 21, 0, 1) * (1 / (1 + np.exp((y - 76) / 1.5)))
    eyes = sum(4 * np.exp(-(((x - ex) / 8) ** 2) - ((y - 51.6) / 5) ** 2) for ex in (38.3, 73.5))
    mouth = 3 * np.exp(-(((x - cx) / 13) ** 2) - ((y - 92) / 6) ** 2)
    return z + nose - eyes + mouth


def _looked_up(yaw: float, pitch: float) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of a turned face was in the face, [112, 112, 2], and whether the head is there."""
    steps = (np.arange(_SIDE * _OVERSAMPLED) + 0.5) / _OVERSAMPLED - 0.5
    x, y = (a.ravel() for a in np.meshgrid(steps, steps))
    z = _depth(x, y)
    x, y, z = (a[np.isfinite(z)] for a in (x, y, z))
    cx, cy = _CENTRE

    def rotated(px: np.ndarray, py: np.ndarray, pz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c, s = math.cos(yaw), math.sin(yaw)
        qx, qz = (px - cx) * c + pz * s, pz * c - (px - cx) * s
        c, s = math.cos(pitch), math.sin(pitch)
        qy, qz = (py - cy) * c + qz * s, qz * c - (py - cy) * s
        return np.stack((qx + cx, qy + cy), 1), qz

    template = np.asarray(template_for((_SIDE, _SIDE)), np.float64)
    landmarks = rotated(template[:, 0], template[:, 1], _depth(template[:, 0], template[:, 1]))[0]
    places, height = rotated(x, y, z)
    places = apply_transform(similarity_transform(landmarks, template), places)
    column, row = np.rint(places).astype(int).T
    seen = (column >= 0) & (column < _SIDE) & (row >= 0) & (row < _SIDE)
    order = np.argsort(height[seen], kind="stable")  # what is in front comes last and stays
    found = np.full((_SIDE, _SIDE, 2), np.nan)
    found[row[seen][order], column[seen][order]] = np.stack((x, y), 1)[seen][order]
    empty = np.isnan(found[..., 0])
    filled = cv2.morphologyEx((~empty).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)).astype(bool)
    _, labels = cv2.distanceTransformWithLabels(empty.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    values = np.zeros((labels.max() + 1, 2))
    values[labels[~empty]] = found[~empty]
    return values[labels], filled


@cache
def _turns() -> tuple[Tensor, Tensor]:
    """Grids to sample turned faces by [T, 112, 112, 2], and the head's place in them [T, 1, 112, 112]."""
    random = np.random.default_rng(0)
    grids, heads = [], []
    for number in range(_TURNS):
        yaw = math.radians(random.uniform(*_YAW)) * (-1 if number % 2 else 1)
        where, head = _looked_up(yaw, math.radians(random.uniform(-_PITCH, _PITCH)))
        grids.append(torch.from_numpy((2 * where + 1) / _SIDE - 1).float())
        heads.append(torch.from_numpy(head.astype(np.float32))[None])
    return torch.stack(grids), F.avg_pool2d(torch.stack(heads), 3, 1, 1)


def turned(images: Tensor, generator: torch.Generator) -> Tensor:
    """Faces turned to one side, aligned anew as a detector would; what is beside the head is blurred.

    Args:
        images: frontal faces [N, 3, 112, 112], floating-point.
        generator: of the draws, on the CPU.
    """
    grids, heads = _turns()
    chosen = torch.randint(_TURNS, (len(images),), generator=generator)
    made = F.grid_sample(images, grids[chosen], padding_mode="border", align_corners=False)
    beside = F.interpolate(F.avg_pool2d(images, 28), size=images.shape[2:], mode="bilinear")
    head = heads[chosen]
    return head * made + (1 - head) * beside


# --- covered: what people wear, drawn where it is on an aligned face

#: Outlines on an aligned crop, (x, y) in pixels: of a mask, and of the two glasses of sunglasses.
MASK = ((16, 64), (34, 70), (56, 63), (78, 70), (96, 64), (92, 92), (78, 112), (56, 118), (34, 112), (20, 92))
LENSES = tuple(
    tuple((x if side else 111 - x, y) for x, y in ((22, 44), (52, 43), (51, 58), (40, 64), (26, 60))) for side in (1, 0)
)
_HAT = ((-4, -4), (116, -4), (116, 26), (96, 34), (56, 30), (16, 34), (-4, 26))
_KINDS = 4


def _drawn(kind: int, random: np.random.Generator) -> np.ndarray:
    """Where one thing is, 0..1 [112, 112]."""
    canvas = np.zeros((_SIDE, _SIDE), np.uint8)

    def polygon(points: object) -> None:
        moved = np.array(points, np.float64)
        moved += random.normal(0, 2, moved.shape) + random.normal(0, 3, 2)
        cv2.fillPoly(canvas, [np.rint(moved * 8).astype(np.int32)], 255, cv2.LINE_AA, 3)

    if kind == 0:
        polygon(MASK)
    elif kind == 1:
        for lens in LENSES:
            polygon(lens)
        y = int(random.integers(44, 54))
        cv2.line(canvas, (4, y), (108, y), 255, int(random.integers(2, 5)), cv2.LINE_AA)
    elif kind == 2:
        polygon(_HAT)
    else:  # a hand, a microphone, somebody's shoulder
        centre, axes = random.uniform(10, 102, 2), random.uniform(10, 30, 2)
        cv2.ellipse(canvas, (tuple(centre), tuple(2 * axes), float(random.uniform(0, 180))), 255, -1, cv2.LINE_AA)
    return canvas.astype(np.float32) / 255


def covered(images: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Faces, some of them behind a mask, sunglasses, a hat or something else.

    Args:
        images: [N, 3, 112, 112], floating-point, 0..255.
        share: of the faces that are covered.
        generator: of the draws, on the CPU.

    Returns:
        The faces, and how much of each cell is still seen [N, 7, 7].
    """
    chosen = torch.nonzero(torch.rand(len(images), generator=generator) < share).flatten()
    seen = torch.ones(len(images), 7, 7)
    images = images.clone()
    random = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
    for face in chosen.tolist():
        kind = int(random.integers(_KINDS))
        over = torch.from_numpy(_drawn(kind, random))
        dark = kind == 1 and random.random() < 0.7
        colour = torch.from_numpy(random.uniform(0, 60 if dark else 255, (3, 1, 1)).astype(np.float32))
        folds = torch.from_numpy(random.normal(0, 1, (1, 1, 7, 7)).astype(np.float32)) * float(random.uniform(0, 25))
        cloth = colour + F.interpolate(folds, size=(_SIDE, _SIDE), mode="bicubic", align_corners=False)[0]
        over = over * float(random.uniform(0.75, 1) if kind == 1 else 1)
        images[face] = over * cloth + (1 - over) * images[face]
        seen[face] = 1 - F.avg_pool2d(over[None, None], _SIDE // 7)[0, 0]
    return images, seen


# --- the photograph's edge: beyond it an aligned crop is black

_BLACK = 12.0  # brightest of what counts as black, of 255
_NOTHING = 0.7  # share of a cell that is black where it shows nothing
_BANDS = ((0.7, 40), (0.15, 24), (0.3, 32), (0.3, 32))  # above, below, left, right: how often, and pixels at most


def cut(images: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Faces, some of them cut off by the edge of their photograph.

    Args:
        images: [N, 3, 112, 112], floating-point, 0..255.
        share: of the faces that are cut; others may be so already.
        generator: of the draws, on the CPU.

    Returns:
        The faces, and which cells show anything [N, 7, 7], 0 or 1.
    """
    count = len(images)
    often, most = torch.tensor(_BANDS).T
    there = (torch.rand(count, 1, generator=generator) < share) & (torch.rand(count, 4, generator=generator) < often)
    above, below, left, right = (there * most * torch.rand(count, 4, generator=generator)).T[:, :, None]
    places = torch.arange(_SIDE)
    rows = (places >= above) & (places < _SIDE - below)
    columns = (places >= left) & (places < _SIDE - right)
    images = images * (rows[:, None, :, None] & columns[:, None, None, :])
    black = (images.amax(1, keepdim=True) < _BLACK).float()
    return images, (F.avg_pool2d(black, _SIDE // 7)[:, 0] <= _NOTHING).float()


# --- what cameras and networks of computers do


def shrunk(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Faces, a share of which was 16 to 64 pixels wide for a moment."""
    images = images.clone()
    for face in torch.nonzero(torch.rand(len(images), generator=generator) < share).flatten().tolist():
        side = int(torch.randint(16, 65, (1,), generator=generator))
        once = F.interpolate(images[face : face + 1], size=side, mode="bilinear", antialias=True)
        images[face] = F.interpolate(once, size=images.shape[2:], mode="bicubic")[0]
    return images


def shaded(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Faces, a share of which is dark on one side."""
    count, _, height, width = images.shape
    angle, strength = 2 * math.pi * torch.rand(count, generator=generator), torch.rand(count, generator=generator)
    dark = (0.9 * strength * (torch.rand(count, generator=generator) < share)).view(-1, 1, 1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    ramp = torch.sigmoid(4 * (angle.cos().view(-1, 1, 1) * x + angle.sin().view(-1, 1, 1) * y))
    return images * (1 - dark * ramp)[:, None]


def compressed(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """uint8 faces [N, 3, H, W], a share of which was a JPEG file of quality 10 to 60."""
    images = images.clone()
    for face in torch.nonzero(torch.rand(len(images), generator=generator) < share).flatten().tolist():
        quality = int(torch.randint(10, 61, (1,), generator=generator))
        bgr = images[face].permute(1, 2, 0).numpy()[..., ::-1]
        _, coded = cv2.imencode(".jpg", np.ascontiguousarray(bgr), [cv2.IMWRITE_JPEG_QUALITY, quality])
        decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
        assert decoded is not None
        images[face] = torch.from_numpy(np.ascontiguousarray(decoded[..., ::-1])).permute(2, 0, 1)
    return images
