"""Face detection with nothing to download: boxes by the Haar cascades that come with OpenCV 4, five landmarks and the
verdict whether it is a face by the small network that comes with this package.

docs/verify.md explains and measures.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from xcos_ext.io.errors import XCosError
from xcos_ext.io.optional import need

from .alignment import ARCFACE_TEMPLATE, apply_transform, compose, invert, similarity_transform
from .detector import Face, check_picture, scaled_copy
from .landmarks import LandmarkReader

__all__ = ["CascadeDetector"]


class Search(NamedTuple):
    """One way of going over the whole picture."""

    cascade: str
    longest: int  # longer side of the copy that is searched
    enlarge: float  # at most so many times the picture's own size
    step: float  # from one size of boxes to the next
    smallest: int  # face box in that copy
    rolls: tuple[float, ...]  # degrees by which the copy is turned


#: Tried in this order until a face is certain: the usual case first, in a fifth of the others' time; then small faces,
#: another cascade, turned heads, small faces in large pictures, pictures that have lost their EXIF rotation.
SEARCHES = (
    Search("frontalface_alt2", 640, 1.0, 1.15, 24, (0.0,)),
    Search("frontalface_alt2", 640, 2.0, 1.08, 24, (0.0,)),
    Search("frontalface_default", 640, 2.0, 1.08, 30, (0.0,)),
    Search("frontalface_alt2", 480, 2.0, 1.08, 36, (-20.0, 20.0)),
    Search("frontalface_alt2", 1280, 2.0, 1.08, 24, (0.0,)),
    Search("frontalface_alt2", 480, 2.0, 1.08, 36, (-40.0, 40.0)),
    Search("frontalface_alt2", 480, 2.0, 1.08, 36, (-90.0, 90.0)),
    Search("frontalface_alt2", 480, 2.0, 1.08, 36, (180.0,)),
)
_CERTAIN = 0.9  # a score that ends the search
_MOST = 24  # boxes of one search that are looked at closely

# Where each cascade puts its box, in template pixels: width, and height of its centre (x is 56 by symmetry). Medians
# over faces that YuNet had found.
_BOXES = {"frontalface_alt2": (95.6, 62.4), "frontalface_default": (98.9, 63.0)}
#: Side and centre of the box of a face that was found.
_BOX_SIDE, _BOX_CENTRE = 95.6, np.array([56.0, 63.5])


class CascadeBoxes:
    """Boxes around what OpenCV's bundled cascades take for faces. Not thread-safe.

    Raises:
        XCosError: this OpenCV comes without cascades (OpenCV 5), or they cannot be read.
        MissingPackageError: OpenCV is not installed.
    """

    def __init__(self) -> None:
        self._cascades = {name: _load(name) for name in _BOXES}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also in another process, loads OpenCV's objects for itself."""
        return type(self), ()

    def find(self, grey: np.ndarray, search: Search, roll: float = 0.0) -> np.ndarray:
        """Rough transforms from the picture to the template, one for each box, [N, 2, 3].

        Args:
            grey: the picture, uint8 [H, W].
            search: how to go over it.
            roll: degrees by which to turn it.
        """
        import cv2

        copy, factor = scaled_copy(grey, search.longest, enlarge=search.enlarge)
        size = np.array(copy.shape[::-1])
        cosine, sine = np.cos(np.deg2rad(roll)), np.sin(np.deg2rad(roll))
        rotation = np.array([[cosine, -sine], [sine, cosine]])
        # A border, because faces that fill the picture are found by what is around them; and room to turn in.
        room = (np.abs(rotation) @ size).astype(int) + 2 * (max(copy.shape) // 8)
        turn = np.hstack([rotation, ((room - 1) / 2 - rotation @ ((size - 1) / 2))[:, None]])
        turned = cv2.warpAffine(copy, turn, room.tolist(), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        to_turned = compose(turn, np.hstack([np.diag(factor), (factor[:, None] - 1) / 2]))
        smallest, largest = search.smallest, int(room.max())
        found, _, weights = self._cascades[search.cascade].detectMultiScale3(
            turned, search.step, 3, 0, (smallest, smallest), (largest, largest), outputRejectLevels=True
        )
        boxes = np.asarray(found, np.float64).reshape(-1, 4)
        strongest = np.argsort(-np.asarray(weights, np.float64).reshape(-1) * boxes[:, 2], kind="stable")[:_MOST]
        starts = [compose(_from_box(search.cascade, box), to_turned) for box in boxes[strongest]]
        return np.array(starts).reshape(-1, 2, 3)


class CascadeDetector:
    """Upright and rolled frontal faces: boxes by OpenCV's bundled cascades, landmarks by the bundled network. Not
    thread-safe.

    ``score`` is the network's probability that it is a face.

    Args:
        min_score: least score of a face, in [0, 1].
        landmarks: other weights of the network, see :class:`~xcos_ext.faces.LandmarkReader`.

    Raises:
        XCosError: this OpenCV comes without cascades (OpenCV 5), or they cannot be read.
        ModelError: the network's weights are missing, damaged, or of another network.
        MissingPackageError: OpenCV is not installed.
        ValueError: ``min_score`` outside [0, 1].

    >>> CascadeDetector().detect(np.zeros((48, 48, 3), np.uint8))
    []
    """

    def __init__(self, *, min_score: float = 0.5, landmarks: str | os.PathLike[str] | None = None) -> None:
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score: expected a number between 0 and 1, got {min_score}")
        self._min_score = min_score
        self._boxes = CascadeBoxes()
        self._reader = LandmarkReader(landmarks)

    def detect(self, rgb: np.ndarray) -> list[Face]:
        """See :class:`~xcos_ext.faces.Detector`."""
        import cv2

        check_picture(rgb)
        grey = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
        faces: list[Face] = []
        for search in SEARCHES:
            if search.longest > SEARCHES[0].longest and max(grey.shape) <= SEARCHES[0].longest:
                continue  # it would not show more
            for roll in search.rolls:
                landmarks, scores = self._reader.read(grey, self._boxes.find(grey, search, roll))
                faces.extend(
                    Face(_box(points), points, float(score))
                    for points, score in zip(landmarks, scores, strict=True)
                    if score >= self._min_score
                )
            if any(face.score >= _CERTAIN for face in faces):
                break
        return _distinct(faces)


def _from_box(name: str, box: np.ndarray) -> np.ndarray:
    """From the searched copy to the template, by a cascade's box (left, top, width, height)."""
    side, y = _BOXES[name]
    scale = side / box[2]
    centre = box[:2] + (box[2:] - 1) / 2
    return np.array([[scale, 0, 56.0 - scale * centre[0]], [0, scale, y - scale * centre[1]]])


def _box(landmarks: np.ndarray) -> tuple[float, float, float, float]:
    """Where a cascade would put the box of an upright face with these landmarks."""
    back = invert(similarity_transform(landmarks, ARCFACE_TEMPLATE))
    x, y = apply_transform(back, _BOX_CENTRE[None])[0]
    side = _BOX_SIDE * float(np.sqrt(np.linalg.det(back[:, :2])))
    return (float(x - side / 2), float(y - side / 2), side, side)


def _load(name: str) -> Any:
    cv2 = need("cv2", "face detection")
    folder = getattr(getattr(cv2, "data", None), "haarcascades", None)
    path = None if folder is None else os.path.join(folder, f"haarcascade_{name}.xml")
    if path is None or not hasattr(cv2, "CascadeClassifier") or not os.path.isfile(path):
        raise XCosError(
            f"this OpenCV ({cv2.__version__}) comes without face cascades; the default detector needs them: "
            "pip install 'opencv-python-headless>=4.10,<5', or use a YuNet network"
        )
    cascade = cv2.CascadeClassifier(path)
    if cascade.empty():
        raise XCosError(f"{path}: OpenCV {cv2.__version__} cannot read its own cascade; reinstall it")
    return cascade


def _distinct(faces: list[Face]) -> list[Face]:
    """Best first, without those that mostly cover a better one."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda f: -f.score):
        if all(_overlap(np.array(face.box), np.array(other.box)) < 0.5 for other in kept):
            kept.append(face)
    return kept


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection of two boxes (left, top, width, height) over the smaller one's area."""
    sides = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    return float(np.prod(np.maximum(sides, 0)) / max(min(a[2] * a[3], b[2] * b[3]), 1e-9))
