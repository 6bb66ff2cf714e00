"""Face detection and alignment with the Haar cascades that come with OpenCV 4: nothing to download.

Cascades give boxes, not landmarks, and their eyes come and go. So every cue that can be had from a face (its
box by three cascades and their mirror images, each eye, the mouth) votes, with the precision that was
measured for it, in one weighted least-squares fit of the similarity transform to the ArcFace template; what
is missing is left to the box. The constants were fitted by ``examples/fit_cascade_alignment.py``;
docs/faces.md explains and measures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from xcos_ext.errors import XCosError

from ._optional import need
from .alignment import ARCFACE_TEMPLATE, apply_transform, compose, invert, similarity_transform, warp
from .detector import Face, check_picture, overlap, scaled_copy

__all__ = ["CascadeAlignment", "CascadeDetector"]

_FRONTAL = ("frontalface_alt2", "frontalface_alt", "frontalface_default")
_EYES = ("eye", "eye_tree_eyeglasses")
# Cascades for the eye of one side; asked where the others found nothing.
_SPLITS = ("righteye_2splits", "lefteye_2splits")
_MOUTH = "smile"
# Thresholds of the frontal cascades' last stages, from their files: a detection's weight less this is its margin.
_LAST_STAGE = {
    "frontalface_alt2": 53.7555694580,
    "frontalface_alt": 105.7611007690,
    "frontalface_default": -2.9928278923,
}


class Search(NamedTuple):
    """One way of going over the whole picture."""

    cascade: str
    longest: int  # longer side of the copy that is searched
    smallest: int  # face box in that copy
    rolls: tuple[float, ...]  # degrees by which the copy is turned


# Tried in this order until a face is certain: the usual case first; then other cascades, turned heads, small faces in
# large pictures, pictures that have lost their EXIF rotation.
_SEARCHES = (
    Search("frontalface_alt2", 640, 24, (0.0,)),
    Search("frontalface_default", 640, 30, (0.0,)),
    Search("frontalface_alt2", 480, 36, (-20.0, 20.0)),
    Search("frontalface_alt2", 1280, 24, (0.0,)),
    Search("frontalface_alt2", 480, 36, (-40.0, 40.0)),
    Search("frontalface_alt2", 480, 36, (-90.0, 90.0)),
    Search("frontalface_alt2", 480, 36, (180.0,)),
)
_CERTAIN = 0.9  # a score that ends the search
_HOPELESS = 0.02  # not worth a second look
_MOST = 24  # boxes of one search that are looked at closely

# Cues are sought in a square crop in which the template's unit is this many pixels.
_CROP = 256
_ZOOM = 1.6
_CENTRE = np.array([56.0, 63.5])  # of a face box, on the template
_TO_CROP = np.array(
    [[_ZOOM, 0.0, (_CROP - 1) / 2 - _ZOOM * _CENTRE[0]], [0.0, _ZOOM, (_CROP - 1) / 2 - _ZOOM * _CENTRE[1]]]
)


@dataclass(frozen=True)
class CascadeAlignment:
    """Where cues lie on the template and how far they scatter, in template pixels unless said otherwise.

    Attributes:
        box_width: width of a face box, by cascade.
        box_y: height of its centre, by cascade (x is 56 by symmetry).
        eye: (outwards, down) from the template's eye to the centre of an eye box, by cascade.
        mouth_y: height of the centre of a mouth box (x is 56).
        box_sd: scatter (x, y) of the box centre, averaged over cascades and mirror images.
        scale_sd: scatter of the box's width, relative.
        roll_sd: prior scatter of the head's roll, radians. Wider than in posed portraits, so that eyes can
        correct it.
        eye_sd: scatter (x, y) of an eye found by one cascade, and by two or more.
        mouth_sd: scatter (x, y) of the mouth.
        confidence: log-odds that it is a face: constant, and weights of the three cascades' margins (mean over mirror
            images), of the number of eye detections (0 to 4) and of mouth detections (0 to 2).
    """

    box_width: Mapping[str, float] = field(
        default_factory=lambda: {"frontalface_alt2": 95.6, "frontalface_alt": 96.1, "frontalface_default": 98.9}
    )
    box_y: Mapping[str, float] = field(
        default_factory=lambda: {"frontalface_alt2": 62.4, "frontalface_alt": 62.4, "frontalface_default": 63.0}
    )
    eye: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {
            "eye": (0.1, 0.4),
            "eye_tree_eyeglasses": (0.5, 0.9),
            "righteye_2splits": (0.4, -1.9),
            "lefteye_2splits": (1.2, -0.8),
        }
    )
    mouth_y: float = 94.7
    box_sd: tuple[float, float] = (0.9, 1.4)
    scale_sd: float = 0.058
    roll_sd: float = 0.12
    eye_sd: tuple[tuple[float, float], tuple[float, float]] = ((2.9, 2.3), (1.8, 1.7))
    mouth_sd: tuple[float, float] = (1.7, 2.4)
    confidence: tuple[float, ...] = (-12.8, 1.3, 1.8, 0.5, 0.9, 0.6)


class Cues(NamedTuple):
    """What was found around one face, in template coordinates and not yet corrected by :class:`CascadeAlignment`."""

    boxes: list[tuple[str, np.ndarray, float, float]]  # cascade, centre, width, margin over its last stage
    eyes: tuple[list[tuple[str, np.ndarray]], list[tuple[str, np.ndarray]]]  # left and right: cascade, centre
    mouth: list[np.ndarray]


class CascadeDetector:
    """Upright and moderately rolled frontal faces, by OpenCV's bundled cascades. Not thread-safe.

    Landmarks are the template's five points mapped back by the fitted transform, so aligning by them gives
    exactly that transform; they are not five separate measurements. ``score`` is the share of cues that
    confirmed the face.

    Args:
        min_score: least score of a face, in [0, 1].
        alignment: other constants, e.g. fitted to other photographs.

    Raises:
        XCosError: this OpenCV comes without cascades (OpenCV 5), or they cannot be read.
        MissingPackageError: OpenCV is not installed.
        ValueError: ``min_score`` outside [0, 1].
    """

    def __init__(self, *, min_score: float = 0.3, alignment: CascadeAlignment | None = None) -> None:
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score: expected a number between 0 and 1, got {min_score}")
        self._min_score = min_score
        self._alignment = alignment or CascadeAlignment()
        self._cascades = {name: _load(name) for name in (*_FRONTAL, *_EYES, *_SPLITS, _MOUTH)}

    # --- finding

    def detect(self, rgb: np.ndarray) -> list[Face]:
        """See :class:`~xcos_ext.faces.Detector`."""
        check_picture(rgb)
        cv2 = need("cv2", "face detection")
        grey = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
        faces: list[Face] = []
        for search in _SEARCHES:
            if search.longest > _SEARCHES[0].longest and max(grey.shape) <= _SEARCHES[0].longest:
                continue  # it would not show more
            for roll in search.rolls:
                faces.extend(self._search(grey, search, roll))
            if any(face.score >= _CERTAIN for face in faces):
                break
        return _distinct(faces)

    def _search(self, grey: np.ndarray, search: Search, roll: float) -> Iterator[Face]:
        for start in self.candidates(grey, search, roll):
            cues = self.cues(grey, start)
            if self.confidence(cues) < _HOPELESS:
                continue
            fit = compose(self.fit(cues), start)
            # Once more from upright: eyes of a rolled head are found where they were missed before.
            cues = self.cues(grey, fit)
            fit = compose(self.fit(cues), fit)
            score = self.confidence(cues)
            if score < self._min_score:
                continue
            landmarks = apply_transform(invert(fit), ARCFACE_TEMPLATE)
            fit = similarity_transform(landmarks, ARCFACE_TEMPLATE)  # rounded sizes leave it a hair off one
            centre = apply_transform(invert(fit), _CENTRE[None])[0]
            side = self._alignment.box_width[_FRONTAL[0]] / float(np.sqrt(np.linalg.det(fit[:, :2])))
            box = (float(centre[0] - side / 2), float(centre[1] - side / 2), side, side)
            yield Face(box, apply_transform(invert(fit), ARCFACE_TEMPLATE), score)

    def candidates(self, grey: np.ndarray, search: Search = _SEARCHES[0], roll: float = 0.0) -> Iterator[np.ndarray]:
        """Rough transforms [2, 3] from the picture to the template, one for each box of the search.

        Args:
            grey: the picture, uint8 [H, W].
            search: how to go over it.
            roll: degrees by which to turn it.
        """
        import cv2

        copy, factor = scaled_copy(grey, search.longest, enlarge=2.0)
        height, width = copy.shape
        # A border, because faces that fill the picture are found by what is around them; and room to turn in.
        border = max(height, width) // 8
        radians = np.deg2rad(roll)
        cosine, sine = float(np.cos(radians)), float(np.sin(radians))
        out_w = int(abs(cosine) * width + abs(sine) * height) + 2 * border
        out_h = int(abs(sine) * width + abs(cosine) * height) + 2 * border
        turn = np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
        turn[:, 2] = np.array([(out_w - 1) / 2, (out_h - 1) / 2]) - turn[:, :2] @ [(width - 1) / 2, (height - 1) / 2]
        turned = cv2.warpAffine(copy, turn, (out_w, out_h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        shrink = np.array([[factor[0], 0, (factor[0] - 1) / 2], [0, factor[1], (factor[1] - 1) / 2]])
        to_turned = compose(turn, shrink)
        boxes, weights = self._run(search.cascade, turned, 1.08, 3, search.smallest, max(out_w, out_h))
        strongest = np.argsort(-weights * boxes[:, 2], kind="stable")[:_MOST]
        for box in boxes[strongest]:
            yield compose(self._from_box(search.cascade, box), to_turned)

    def _from_box(self, name: str, box: np.ndarray) -> np.ndarray:
        scale = self._alignment.box_width[name] / box[2]
        centre = box[:2] + (box[2:] - 1) / 2
        target = np.array([56.0, self._alignment.box_y[name]])
        return np.array([[scale, 0, target[0] - scale * centre[0]], [0, scale, target[1] - scale * centre[1]]])

    def _run(
        self, name: str, image: np.ndarray, step: float, neighbours: int, smallest: int, largest: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, 4] and the last stage's margins [N]."""
        boxes, _, weights = self._cascades[name].detectMultiScale3(
            image, step, neighbours, 0, (smallest, smallest), (largest, largest), outputRejectLevels=True
        )
        return np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(weights, np.float64).reshape(-1)

    # --- aligning

    def cues(self, grey: np.ndarray, matrix: np.ndarray) -> Cues:
        """Everything that the cascades find around one face.

        Args:
            grey: the picture, uint8 [H, W].
            matrix: roughly from the picture to the template, [2, 3].
        """
        crop = warp(grey, compose(_TO_CROP, matrix), (_CROP, _CROP), extend=True)
        back = invert(_TO_CROP)
        boxes: list[tuple[str, np.ndarray, float, float]] = []
        mouth: list[np.ndarray] = []
        for mirror in (False, True):
            image = np.ascontiguousarray(crop[:, ::-1]) if mirror else crop
            for name in _FRONTAL:
                nominal = self._alignment.box_width[name] * _ZOOM
                found, weights = self._run(name, image, 1.04, 2, int(0.7 * nominal), int(1.4 * nominal))
                for box in _best(found, weights):
                    margin = float(weights.max()) - _LAST_STAGE[name]
                    boxes.append((name, _centre(box, (0, 0), back, mirror), box[2] / _ZOOM, margin))
            for part, box in self._in_region(_MOUTH, image, (26, 78, 86, 118), 3, 18, 70):
                mouth.append(_centre(box, part, back, mirror))
        eyes: tuple[list[tuple[str, np.ndarray]], list[tuple[str, np.ndarray]]] = ([], [])
        for side in (0, 1):
            for name in _EYES:
                eyes[side].extend(self._eyes(name, crop, side))
            if not eyes[side]:
                eyes[side].extend(self._eyes(_SPLITS[side], crop, side))
        return Cues(boxes, eyes, mouth)

    def _eyes(self, name: str, crop: np.ndarray, side: int) -> Iterator[tuple[str, np.ndarray]]:
        region = (12, 26, 60, 78) if side == 0 else (52, 26, 100, 78)
        for part, box in self._in_region(name, crop, region, 2, 14, 36):
            yield name, _centre(box, part, invert(_TO_CROP), False)

    def _in_region(
        self,
        name: str,
        crop: np.ndarray,
        region: tuple[int, int, int, int],
        neighbours: int,
        smallest: int,
        largest: int,
    ) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """The strongest box within a region (left, top, right, bottom; template coordinates, as are the sizes)."""
        corners = apply_transform(_TO_CROP, np.array(region, np.float64).reshape(2, 2))
        (left, top), (right, bottom) = np.clip(np.rint(corners), 0, _CROP).astype(int).tolist()
        part = np.ascontiguousarray(crop[top:bottom, left:right])
        found, weights = self._run(name, part, 1.05, neighbours, int(smallest * _ZOOM), int(largest * _ZOOM))
        for box in _best(found, weights):
            yield (left, top), box

    def fit(self, cues: Cues) -> np.ndarray:
        """The similarity transform that takes the cues to the template.

        Minimises the sum of squared residuals over their scatter, reweighted against outliers (Cauchy).
        Unknowns are (a, b, x, y) of (u, v) -> (a u - b v + x, b u + a v + y), so a prior on scale and roll is
        one on a and b.

        Returns:
            [2, 3], close to the identity if the crop already was aligned.
        """
        c = self._alignment
        rows: list[tuple[float, float, float, float]] = []
        values: list[float] = []
        scatter: list[float] = []

        def point(at: np.ndarray, target: tuple[float, float], sd: tuple[float, float]) -> None:
            rows.extend([(at[0], -at[1], 1, 0), (at[1], at[0], 0, 1)])
            values.extend(target)
            scatter.extend(sd)

        def prior(row: tuple[float, float, float, float], value: float, sd: float) -> None:
            rows.append(row)
            values.append(value)
            scatter.append(sd)

        if cues.boxes:
            offsets = [centre - [0.0, c.box_y[name] - _CENTRE[1]] for name, centre, *_ in cues.boxes]
            centre = np.median(offsets, 0)
            scale = float(np.median([c.box_width[name] / width for name, _, width, _ in cues.boxes]))
            loose = 1.0
        else:  # only the search's box is known: what it gave, less precisely
            centre, scale, loose = _CENTRE, 1.0, 1.5
        point(centre, (_CENTRE[0], _CENTRE[1]), (c.box_sd[0] * loose, c.box_sd[1] * loose))
        prior((1, 0, 0, 0), scale, c.scale_sd * loose)
        prior((0, 1, 0, 0), 0.0, c.roll_sd)
        for side, found in enumerate(cues.eyes):
            if found:
                outwards = -1 if side == 0 else 1
                at = np.mean([p - np.array(c.eye[name]) * [outwards, 1] for name, p in found], 0)
                target = ARCFACE_TEMPLATE[side]
                point(at, (target[0], target[1]), c.eye_sd[min(len(found), 2) - 1])
        if cues.mouth:
            point(np.mean(cues.mouth, 0), (_CENTRE[0], c.mouth_y), c.mouth_sd)
        design, wanted, sd = np.array(rows, np.float64), np.array(values), np.array(scatter)
        # From the boxes alone: a false eye must not have its way in the first step already.
        solution = np.array([scale, 0.0, _CENTRE[0] - scale * centre[0], _CENTRE[1] - scale * centre[1]])
        for _ in range(10):
            residuals = (design @ solution - wanted) / sd
            weights = 1 / (sd * np.sqrt(1 + (residuals / 2.5) ** 2))
            solution = np.linalg.lstsq(design * weights[:, None], wanted * weights, rcond=None)[0]
        a, b, x, y = solution
        return np.array([[a, -b, x], [b, a, y]])

    def confidence(self, cues: Cues) -> float:
        """Probability that the cues come from a face; logistic in :func:`evidence`."""
        log_odds = float(np.dot(self._alignment.confidence, evidence(cues)))
        return float(1 / (1 + np.exp(-np.clip(log_odds, -30, 30))))


def evidence(cues: Cues) -> np.ndarray:
    """What :attr:`CascadeAlignment.confidence` weighs, [6]: 1, three margins, eyes, mouths."""
    margins = [sum(margin for at, _, _, margin in cues.boxes if at == name) / 2 for name in _FRONTAL]
    return np.array([1.0, *margins, sum(len(found) for found in cues.eyes), len(cues.mouth)])


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


def _best(boxes: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    return [boxes[int(weights.argmax())]] if len(boxes) else []


def _centre(box: np.ndarray, part: tuple[int, int], back: np.ndarray, mirror: bool) -> np.ndarray:
    """Centre of a box found in a part of the crop, in template coordinates."""
    at = box[:2] + (box[2:] - 1) / 2 + part
    if mirror:
        at[0] = _CROP - 1 - at[0]
    return apply_transform(back, at[None])[0]


def _distinct(faces: list[Face]) -> list[Face]:
    """Best first, without those that mostly cover a better one."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda f: -f.score):
        if all(overlap(np.array(face.box), np.array(other.box)) < 0.5 for other in kept):
            kept.append(face)
    return kept
