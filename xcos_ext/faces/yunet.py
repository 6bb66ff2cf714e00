"""YuNet, a small face detection network with landmarks, through OpenCV's ``FaceDetectorYN``."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import Any

import numpy as np

from xcos_ext.io.errors import ModelError
from xcos_ext.io.optional import MissingPackageError, need
from xcos_ext.io.shipped import readable_file
from xcos_ext.io.text import display_name
from xcos_ext.onnx.files import read_onnx

from .alignment import ARCFACE_TEMPLATE, MIRRORED, apply_transform, compose, invert, similarity_transform, warp
from .detector import Face, check_picture, scaled_copy
from .pose import pose_of

__all__ = ["YuNetDetector"]

# Longer side of the copy that is searched: the network knows faces from about 10 to 300 pixels.
_SEARCH = (640, 1280)
# The landmarks are read again from upright crops of this size with this many pixels between the eyes,
# mirrored too, and averaged.
_CROP = 320
_EYE_DISTANCES = (36.0, 64.0, 80.0)
_REFINED = 16  # largest faces of a picture that get this second reading; a crowd would take seconds


class YuNetDetector:
    """Faces and five landmarks by YuNet (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", MIR 2023).

    The network is not shipped; OpenCV's model zoo has it (``face_detection_yunet_*.onnx``, MIT licence). Not
    thread-safe.

    Args:
        path: the network.
        min_score: least confidence of a face, in (0, 1).

    Raises:
        ModelError: the file is missing, or not such a network.
        ValueError: ``min_score`` outside (0, 1).

    >>> YuNetDetector("yunet.onnx")
    Traceback (most recent call last):
    xcos_ext.io.errors.ModelError: yunet.onnx: no such file
    """

    def __init__(self, path: str | os.PathLike[str], *, min_score: float = 0.6) -> None:
        if not 0 < min_score < 1:
            raise ValueError(f"min_score: expected a number between 0 and 1, got {min_score}")
        self._made_from = os.path.abspath(path), min_score
        file = readable_file(path, "a YuNet .onnx file")
        # OpenCV's reader ends the process on some damaged graphs. Where onnx is not installed, it is left to that.
        try:
            with contextlib.suppress(MissingPackageError):
                read_onnx(file)
        except ModelError as error:
            why = str(error).removeprefix(f"{file}: ")
            raise ModelError(f"{display_name(path)}: not a YuNet network: {why}") from error
        try:
            network = np.frombuffer(file.read_bytes(), np.uint8)
        except OSError as error:
            raise ModelError(f"{display_name(path)}: cannot be read: {error.strerror or error}") from error
        cv2 = need("cv2", "face detection")
        level = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns of its own defaults
        try:
            create = cv2.FaceDetectorYN.create
            # From memory, so that names that are not UTF-8 work.
            self._net: Any = create("onnx", network, np.empty(0, np.uint8), (_CROP, _CROP), min_score)
            self._run(np.zeros((_CROP, _CROP, 3), np.uint8))  # other networks load, and fail here
        except cv2.error as error:
            raise ModelError(
                f"{display_name(path)}: not a YuNet network that OpenCV {cv2.__version__} can run"
            ) from error
        finally:
            cv2.utils.logging.setLogLevel(level)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also in another process, reads the file for itself."""
        path, min_score = self._made_from
        return partial(type(self), path, min_score=min_score), ()

    def _run(self, bgr: np.ndarray) -> np.ndarray:
        self._net.setInputSize((bgr.shape[1], bgr.shape[0]))
        found = self._net.detect(np.ascontiguousarray(bgr))[1]
        return np.zeros((0, 15)) if found is None else found.astype(np.float64)

    def detect(self, rgb: np.ndarray) -> list[Face]:
        """See :class:`~xcos_ext.faces.Detector`."""
        check_picture(rgb)
        for longest in _SEARCH:
            copy, factor = scaled_copy(rgb, longest, enlarge=3.0 if longest == _SEARCH[0] else 1.0)
            # A border, because faces that fill the picture are found by what is around them.
            border = longest // 4
            framed = np.zeros((copy.shape[0] + 2 * border, copy.shape[1] + 2 * border, 3), np.uint8)
            framed[border:-border, border:-border] = copy[:, :, ::-1]
            rows = self._run(framed)
            if len(rows) or max(rgb.shape[:2]) <= longest:
                break
        faces = []
        refined = set(np.argsort(-rows[:, 2] * rows[:, 3], kind="stable")[:_REFINED].tolist())
        for i, row in enumerate(rows):
            corner = (row[:2] - border + 0.5) / factor - 0.5
            landmarks = (row[4:14].reshape(5, 2) - border + 0.5) / factor - 0.5
            box = (float(corner[0]), float(corner[1]), float(row[2] / factor[0]), float(row[3] / factor[1]))
            if i in refined:
                landmarks = self._refine(rgb, landmarks)
            faces.append(Face(box, landmarks, float(np.clip(row[14], 0, 1)), pose_of(landmarks)))
        return sorted(faces, key=lambda face: -face.score)

    def _refine(self, rgb: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """Mean of the landmarks over upright crops of several scales and their mirror images."""
        try:
            upright = similarity_transform(landmarks, ARCFACE_TEMPLATE)
        except ValueError:
            return landmarks
        eye_distance = ARCFACE_TEMPLATE[1, 0] - ARCFACE_TEMPLATE[0, 0]
        middle = ARCFACE_TEMPLATE.mean(0)
        readings = []
        for distance in _EYE_DISTANCES:
            zoom = distance / eye_distance
            centring = np.array([[zoom, 0, _CROP / 2 - zoom * middle[0]], [0, zoom, _CROP / 2 - zoom * middle[1]]])
            matrix = compose(centring, upright)
            crop = warp(rgb, matrix, (_CROP, _CROP), extend=True)[:, :, ::-1]
            expected = apply_transform(matrix, landmarks)
            for mirror in (False, True):
                rows = self._run(crop[:, ::-1] if mirror else crop)
                if not len(rows):
                    continue
                points = rows[:, 4:14].reshape(-1, 5, 2)
                if mirror:
                    points = points[:, MIRRORED]
                    points[:, :, 0] = _CROP - 1 - points[:, :, 0]
                error = np.linalg.norm(points - expected, axis=2).mean(1)
                best = int(error.argmin())
                if error[best] < distance / 3:  # the same face, not a neighbour
                    readings.append(apply_transform(invert(matrix), points[best]))
        return np.mean(readings, 0) if readings else landmarks
