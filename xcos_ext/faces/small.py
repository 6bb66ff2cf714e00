"""The default detector: one small network that gives box, five points, score and pose in one pass.

The weights that come with the package were learned from YuNet's answers by ``recipes/train_detector.py``;
docs/verify.md explains and measures.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .alignment import ARCFACE_TEMPLATE, MIRRORED, apply_transform, compose, invert, similarity_transform, warp
from .detector import Face, check_picture, scaled_copy
from .network import CROP, LAYERS, MIDDLE, OUTPUTS, crop_transform, decoded, load_weights, maps, reading
from .pose import pose_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SmallDetector"]


class Search(NamedTuple):
    """One pass over the whole picture."""

    longest: int  # longer side of the copy that is searched
    border: float  # what is put around it, as a part of that side
    turns: int = 0  # quarter turns of the copy


#: Tried in this order until a face is certain: faces that fill the picture, whose surroundings the border stands for,
#: and small ones; pictures that lie or stand on their heads; small faces of large pictures.
_SEARCHES = (
    (Search(256, 0.25), Search(512, 0.0)),
    (Search(256, 0.25, 1), Search(256, 0.25, 2), Search(256, 0.25, 3)),
    (Search(1280, 0.0),),
)
_PROPOSED = 0.3  # score of a cell that proposes a face, which the second reading judges
_MOST = 32  # proposals of one search that are looked at closely
_CERTAIN = 0.9  # a score that ends the search


class SmallDetector:
    """Faces of all sizes and poses, also in pictures that lie or stand on their heads. Not thread-safe.

    Args:
        min_score: least score of a face, in (0, 1).
        weights: a file of ``recipes/train_detector.py``; None for the one that comes with the package.

    Raises:
        ModelError: the file is missing, damaged, or of another network.
        ValueError: ``min_score`` outside (0, 1).

    >>> SmallDetector().detect(np.zeros((48, 48, 3), np.uint8))
    []
    """

    def __init__(self, *, min_score: float = 0.5, weights: str | os.PathLike[str] | None = None) -> None:
        import torch

        if not 0 < min_score < 1:
            raise ValueError(f"min_score: expected a number between 0 and 1, got {min_score}")
        self._min_score = min_score
        self._weights = {
            name: torch.from_numpy(array).contiguous(memory_format=torch.channels_last)
            if array.ndim == 4
            else torch.from_numpy(array)
            for name, array in load_weights(weights).items()
        }

    def detect(self, rgb: np.ndarray) -> list[Face]:
        """See :class:`~xcos_ext.faces.Detector`."""
        check_picture(rgb)
        found = np.zeros((0, OUTPUTS))
        for searches in _SEARCHES:
            rows = [
                self._search(rgb, search)
                for search in searches
                # Of small pictures a larger copy would not show more.
                if search.border or max(rgb.shape[:2]) > _SEARCHES[0][0].longest
            ]
            proposed = _distinct(np.concatenate([np.zeros((0, OUTPUTS)), *rows]))[:_MOST]
            landmarks, scores = self.read(rgb, proposed[:, 5:15].reshape(-1, 5, 2))
            proposed[:, 0], proposed[:, 5:15] = scores, landmarks.reshape(-1, 10)
            found = np.concatenate([found, proposed[scores >= self._min_score]])
            if (found[:, 0] >= _CERTAIN).any():
                break
        faces = []
        for row in _distinct(found):
            box = (*(row[1:3] - row[3:5] / 2).tolist(), *row[3:5].tolist())
            yaw, pitch = np.rad2deg(row[15:17]).tolist()
            points = row[5:15].reshape(5, 2)
            faces.append(Face(box, points, float(row[0]), (yaw, pitch, pose_of(points)[2])))
        return faces

    def _search(self, rgb: np.ndarray, search: Search) -> np.ndarray:
        """Cells that see a face, in pixels of the picture: [N, 17] score, middle, sides, points, yaw, pitch."""
        copy, factor = scaled_copy(rgb, search.longest, enlarge=2.0)
        room = int(search.border * max(copy.shape[:2]))
        framed = np.pad(copy, ((room, room), (room, room), (0, 0)), constant_values=128)
        rows = self._seen(np.ascontiguousarray(np.rot90(framed, search.turns))[None], _PROPOSED)[0]
        back = np.eye(2, 3)
        shape = framed.shape[:2]
        for _ in range(search.turns):  # np.rot90 turns counter-clockwise: (x, y) was (width - 1 - y, x) before
            back = compose(back, np.array([[0.0, -1, shape[1] - 1], [1, 0, 0]]))
            shape = shape[::-1]
        back = compose(np.hstack([np.diag(1 / factor), ((0.5 - room) / factor - 0.5)[:, None]]), back)
        for part in (slice(1, 3), *(slice(i, i + 2) for i in range(5, 15, 2))):
            rows[:, part] = apply_transform(back, rows[:, part])
        rows[:, 3:5] = rows[:, 3:5] @ np.abs(back[:, :2]).T
        return rows

    def _run(self, what: Callable[..., Any], pictures: np.ndarray) -> Any:
        """:func:`maps` or :func:`reading` of pictures [N, H, W, 3]."""
        import torch
        import torch.nn.functional as F

        def convolution(name: str, x: Tensor, relu: bool) -> Tensor:
            _, _, kernel, stride, groups = LAYERS[name]
            weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
            y = F.conv2d(x, weight, bias, stride, kernel // 2, groups=groups)
            return y.relu_() if relu else y

        def twice(x: Tensor, like: Tensor) -> Tensor:
            return F.interpolate(x, scale_factor=2.0)[..., : like.shape[2], : like.shape[3]]

        with torch.inference_mode():
            pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(64).sub_(2)
            return what(pixels, convolution, twice)

    def _seen(self, pictures: np.ndarray, least: float) -> list[np.ndarray]:
        """Cells of each of the pictures [N, H, W, 3] that see a face, as of :func:`decoded`."""
        levels = [level.permute(0, 2, 3, 1).numpy() for level in self._run(maps, pictures)]
        return [decoded([level[i] for level in levels], least) for i in range(len(pictures))]

    def read(self, rgb: np.ndarray, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read the points of faces that are roughly known, in the upright crops that these give: twice, the second
        time in their mirror images too.

        Args:
            rgb: uint8 [H, W, 3].
            landmarks: five points (x, y) of each of N faces [N, 5, 2] in the order of
                :data:`~xcos_ext.faces.ARCFACE_TEMPLATE`.

        Returns:
            fp64 [N, 5, 2]; scores [N] in [0, 1] of its being a face.
        """
        landmarks = np.array(landmarks, np.float64).reshape(-1, 5, 2)
        scores = np.zeros(len(landmarks))
        for mirror in (False, True):
            there, matrices, crops = [], [], []
            for i, points in enumerate(landmarks):
                try:
                    matrix = compose(crop_transform(), similarity_transform(points, ARCFACE_TEMPLATE))
                except ValueError:  # all points in one place
                    continue
                there.append(i)
                matrices.append(invert(matrix))
                crops.append(warp(rgb, matrix, (CROP, CROP), extend=True))
            if not there:
                break
            seen = np.stack([*crops, *(crop[:, ::-1] for crop in crops if mirror)])
            found = self._run(reading, seen)[:, :, MIDDLE, MIDDLE].double().numpy()
            points, logits = found[:, :10].reshape(-1, 5, 2) + CROP / 2, found[:, 10]
            if mirror:
                points, mirrored = np.split(points, 2)
                points = (points + mirrored[:, MIRRORED] * (-1, 1) + (CROP - 1, 0)) / 2
                logits = logits.reshape(2, -1).mean(0)
            landmarks[there] = [apply_transform(m, p) for m, p in zip(matrices, points, strict=True)]
            scores[there] = 1 / (1 + np.exp(-logits))
        return landmarks, scores


def _distinct(rows: np.ndarray) -> np.ndarray:
    """Best first, without those that mostly cover a better one."""
    rows = rows[np.argsort(-rows[:, 0], kind="stable")]
    low, high = rows[:, 1:3] - rows[:, 3:5] / 2, rows[:, 1:3] + rows[:, 3:5] / 2
    area = rows[:, 3] * rows[:, 4]
    kept = []
    left = np.ones(len(rows), bool)
    for i in range(len(rows)):
        if left[i]:
            kept.append(i)
            sides = np.minimum(high, high[i]) - np.maximum(low, low[i])
            left &= sides.clip(0).prod(1) < 0.4 * np.minimum(area, area[i])
    return rows[kept]
