"""The default detector: one small network that gives box, five points, score and pose in one pass.

The weights that come with the package were learned from YuNet's answers by ``recipes/train_detector.py``;
docs/verify.md explains and measures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .alignment import ARCFACE_TEMPLATE, MIRRORED, apply_transform, compose, invert, similarity_transform, warp
from .detector import Face, check_picture, scaled_copy
from .network import CROP, LAYERS, MIDDLE, OUTPUTS, crop_transform, decoded, load_weights, maps, reading
from .pose import pose_of

if TYPE_CHECKING:
    from torch import Tensor

    from .network import Convolution, Repetition

__all__ = ["SmallDetector", "on_torch"]


_LIKELY = 0.6  # a score of the first reading that is enough to look closely at small faces, of which there are many


class Search(NamedTuple):
    """One pass over the whole picture."""

    longest: int  # longer side of the copy that is searched
    border: float  # what is put around it, as a part of that side
    turns: int = 0  # quarter turns of the copy
    least: float = 0.3  # score of a cell that proposes a face, which the second reading judges


#: Tried in this order until a face is certain: faces that fill the picture, whose surroundings the border stands for;
#: small ones; pictures that lie or stand on their heads; small faces of large pictures.
_SEARCHES = (
    (Search(128, 0.25), Search(256, 0.25)),
    (Search(512, 0.0, least=_LIKELY),),
    (Search(128, 0.25, 1), Search(128, 0.25, 2), Search(128, 0.25, 3)),
    (Search(256, 0.25, 1), Search(256, 0.25, 2), Search(256, 0.25, 3), Search(1280, 0.0, least=_LIKELY)),
)
_MOST = 16  # proposals of one search that are looked at closely
_CERTAIN = 0.9  # a score that ends the search
_SURE = 2.0  # a logit with which no other start is tried

#: Points of an upright face, of one that looks to the picture's right and of one that looks to its left, from the
#: middle of its box, in sides of a square as large as the box: medians over the faces that were trained on.
_SHAPES = np.array(
    [
        [(-0.20, -0.14), (0.20, -0.14), (0.0, 0.08), (-0.17, 0.27), (0.17, 0.27)],
        [(0.07, -0.17), (0.34, -0.17), (0.36, 0.05), (0.08, 0.29), (0.29, 0.29)],
        [(-0.34, -0.17), (-0.07, -0.17), (-0.36, 0.05), (-0.29, 0.29), (-0.08, 0.29)],
    ]
)


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
                if search.border or max(rgb.shape[:2]) > 256  # of small pictures a larger copy would not show more
            ]
            proposed = _distinct(np.concatenate([np.zeros((0, OUTPUTS)), *rows]))[:_MOST]
            landmarks, scores = self._judged(rgb, proposed)
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
        rows = self._seen(np.ascontiguousarray(np.rot90(framed, search.turns)), search.least)
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

        with torch.inference_mode():
            pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(64).sub_(2)
            return what(pixels, *on_torch(self._weights))

    def _seen(self, picture: np.ndarray, least: float) -> np.ndarray:
        """Cells of a picture [H, W, 3] that see a face, as of :func:`decoded`."""
        return decoded([level[0].permute(1, 2, 0).numpy() for level in self._run(maps, picture[None])], least)

    def _judged(self, rgb: np.ndarray, proposed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points and scores of proposed faces: from their own points or, where none of these leads to a face, from
        those that an upright face, one that looks to the right or one that looks to the left has in such a box."""
        landmarks = proposed[:, 5:15].reshape(-1, 5, 2)
        landmarks, logits = self._step("read", rgb, self._step("rough", rgb, landmarks)[0])
        for shape in _SHAPES:
            if (logits >= _SURE).any():
                break
            starts = proposed[:, None, 1:3] + shape * np.sqrt(proposed[:, 3] * proposed[:, 4])[:, None, None]
            points, found = self._step("read", rgb, self._step("rough", rgb, starts)[0])
            better = found > logits
            logits[better], landmarks[better] = found[better], points[better]
        last = np.flatnonzero(logits > -_SURE)
        landmarks[last], logits[last] = self._step("read", rgb, landmarks[last], mirror=True)
        return landmarks, 1 / (1 + np.exp(-logits))

    def read(self, rgb: np.ndarray, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read the points of faces that are roughly known, in the upright crops that these give.

        Args:
            rgb: uint8 [H, W, 3].
            landmarks: five points (x, y) of each of N faces [N, 5, 2] in the order of
                :data:`~xcos_ext.faces.ARCFACE_TEMPLATE`.

        Returns:
            fp64 [N, 5, 2]; scores [N] in [0, 1] of its being a face.
        """
        landmarks = self._step("rough", rgb, np.array(landmarks, np.float64).reshape(-1, 5, 2))[0]
        landmarks, logits = self._step("read", rgb, self._step("read", rgb, landmarks)[0], mirror=True)
        return landmarks, 1 / (1 + np.exp(-logits))

    def _step(
        self, layer: str, rgb: np.ndarray, landmarks: np.ndarray, mirror: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """One reading: points [N, 5, 2] and logits [N]; with ``mirror`` the mean with that of the mirror image."""
        landmarks, logits = landmarks.copy(), np.full(len(landmarks), -np.inf)
        there, matrices, crops = [], [], []
        for i, points in enumerate(landmarks):
            try:
                matrix = compose(crop_transform(), similarity_transform(points, ARCFACE_TEMPLATE))
            except ValueError:  # all points in one place
                continue
            there.append(i)
            matrices.append(invert(matrix))
            crops.append(warp(rgb, matrix, (CROP, CROP), extend=True))
        if there:
            seen = np.stack([*crops, *(crop[:, ::-1] for crop in crops if mirror)])
            found = self._run(partial(reading, layer), seen)[:, :, MIDDLE, MIDDLE].double().numpy()
            read, verdicts = found[:, :10].reshape(-1, 5, 2) + CROP / 2, found[:, 10:].sum(1)
            if mirror:
                read, mirrored = np.split(read, 2)
                read = (read + mirrored[:, MIRRORED] * (-1, 1) + (CROP - 1, 0)) / 2
                verdicts = verdicts.reshape(2, -1).mean(0)
            landmarks[there] = [apply_transform(m, p) for m, p in zip(matrices, read, strict=True)]
            logits[there] = verdicts
        return landmarks, logits


def on_torch(weights: Mapping[str, Tensor]) -> tuple[Convolution, Repetition]:
    """The layers of the network on torch, pictures [N, C, H, W]."""
    import torch.nn.functional as F

    def convolution(name: str, x: Tensor, relu: bool) -> Tensor:
        _, _, kernel, stride, groups = LAYERS[name]
        y = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, kernel // 2, groups=groups)
        return y.relu_() if relu else y

    def twice(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0)[..., : like.shape[2], : like.shape[3]]

    return convolution, twice


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
