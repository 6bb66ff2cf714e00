"""From a picture to one aligned face: which detector, which of several faces, and the crop."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from xcos_ext.io.errors import PictureError
from xcos_ext.io.models import fetch, place_of
from xcos_ext.io.text import display_name, shorten

from .alignment import align_face, apply_transform, similarity_transform, template_for
from .detector import Detector, Face, check_picture
from .likeness import LIKELY, face_likelihood
from .pictures import MAX_PIXELS, read_picture
from .quality import Quality, face_quality
from .small import SmallDetector
from .yunet import YuNetDetector

__all__ = [
    "POLICIES",
    "AlignedFace",
    "choice_in_words",
    "choose_face",
    "create_detector",
    "detector_maker",
    "extract_face",
    "read_face",
]

#: ``prominent``: large and near the middle; ``largest``; ``centre``: nearest to the middle; ``only``: refuse to choose.
POLICIES = ("prominent", "largest", "centre", "only")
_PLAIN = {"prominent": "most prominent", "largest": "largest", "centre": "most central", "only": "only one"}


@dataclass(frozen=True, eq=False)
class AlignedFace:
    """A face, ready for a recogniser.

    Attributes:
        rgb: uint8 [height, width, 3].
        name: of the picture, printable.
        face: where it was found; None if the picture already was an aligned crop.
        found: number of faces in the picture; above 1, one was chosen; 0: an aligned crop that does not look like a
            face.
        likelihood: how much an aligned crop looks like a face, in [0, 1]; None: it was found by a detector, or nobody
            looked.

    >>> AlignedFace(np.zeros((112, 112, 3), np.uint8), "a.png", None, 1).name
    'a.png'
    """

    rgb: np.ndarray
    name: str
    face: Face | None
    found: int
    likelihood: float | None = None

    @property
    def landmarks_in_crop(self) -> np.ndarray | None:
        """Where the points that the face was cut out by lie in the crop [5, 2]; None: not known."""
        if self.face is None or self.face.landmarks is None:
            return None
        height, width, _ = self.rgb.shape
        points = self.face.landmarks
        return apply_transform(similarity_transform(points, template_for((height, width))), points)

    @functools.cached_property
    def quality(self) -> Quality:
        """Size, sharpness, pose and light."""
        return face_quality(self.rgb, self.face, self.likelihood)

    def as_dict(self) -> dict[str, Any]:
        """What is known of it beside the pixels, as plain values."""
        data: dict[str, Any] = {"faces": self.found, "quality": self.quality.as_dict()}
        if self.likelihood is not None:
            data["face_likelihood"] = self.likelihood
        if self.face is not None:
            data["box"] = list(self.face.box)
            if self.face.landmarks is not None:
                data["landmarks"] = self.face.landmarks.tolist()
            data["detection_score"] = self.face.score
        return data


def read_face(
    path: str | os.PathLike[str],
    detector: Detector | None,
    *,
    policy: str = "prominent",
    size: tuple[int, int] = (112, 112),
    strict: bool | None = False,
    max_pixels: int = MAX_PIXELS,
) -> AlignedFace:
    """Read a picture, find the face and cut it out.

    Args:
        path: the picture.
        detector, policy, size, strict: see :func:`extract_face`.
        max_pixels: see :func:`~xcos_ext.faces.read_picture`.

    Raises:
        PictureError: as :func:`~xcos_ext.faces.read_picture` and :func:`extract_face`. The message starts
            with the file's name.
        TypeError: as well.

    >>> read_face("nobody.jpg", None)
    Traceback (most recent call last):
    xcos_ext.io.errors.PictureError: nobody.jpg: no such file
    """
    rgb = read_picture(path, max_pixels=max_pixels)
    return extract_face(rgb, detector, name=display_name(path), policy=policy, size=size, strict=strict)


def extract_face(
    rgb: np.ndarray,
    detector: Detector | None,
    *,
    name: str = "picture",
    policy: str = "prominent",
    size: tuple[int, int] = (112, 112),
    strict: bool | None = False,
) -> AlignedFace:
    """Find the face of a picture and cut it out.

    Args:
        rgb: uint8 [H, W, 3].
        detector: finds the faces; None if the picture is an aligned crop of exactly ``size``.
        name: of the picture, for messages.
        policy: which of several faces; see :func:`~xcos_ext.faces.choose_face`.
        size: (height, width) of the crop.
        strict: refuse an aligned crop that does not look like a face (:func:`~xcos_ext.faces.face_likelihood`);
            False: take it, with 0 faces found; None: do not look, which saves some milliseconds.

    Raises:
        PictureError: the picture has no face, has several under the policy ``only``, or is not of the size of
            an aligned crop; or with ``strict`` does not look like a face. The message starts with ``name``.
        TypeError: a detector's name, say, where the detector is wanted.
        ValueError: no uint8 RGB picture.

    >>> extract_face(np.zeros((112, 112, 3), np.uint8), None).found  # aligned already, and black
    0
    """
    if detector is not None and (not isinstance(detector, Detector) or isinstance(detector, type)):
        raise TypeError(
            "detector: expected a detector, which create_detector() makes, or None for an aligned crop, got "
            f"{shorten(repr(detector), 80)}"
        )
    check_picture(rgb)
    height, width = rgb.shape[:2]
    if detector is None:
        if (height, width) != size:
            raise PictureError(
                f"{name}: expected an aligned crop of {size[1]} x {size[0]} pixels, got {width} x {height}; an "
                "ordinary photograph needs a detector"
            )
        if strict is None:
            return AlignedFace(rgb, name, None, 1)
        likelihood = face_likelihood(rgb)
        found = int(likelihood >= LIKELY)
        if strict and not found:
            raise PictureError(
                f"{name}: expected an aligned face, got a picture that does not look like one ({likelihood:.2f}, a "
                f"face has {LIKELY} or more)"
            )
        return AlignedFace(rgb, name, None, found, likelihood)
    faces = detector.detect(rgb)
    if not faces:
        raise PictureError(
            f"{name}: no face found in {width} x {height} pixels; try another detector (--detector yunet), or "
            "--aligned if the picture is an aligned crop"
        )
    face = choose_face(faces, (height, width), policy, name=name)
    if face.landmarks is None:
        raise PictureError(f"{name}: the detector gives no landmarks, so the face cannot be aligned")
    try:
        crop = align_face(rgb, face.landmarks, size)
    except ValueError as error:
        raise PictureError(f"{name}: the detector's {error}") from error
    return AlignedFace(crop, name, face, len(faces))


def create_detector(spec: str | os.PathLike[str] = "small") -> Detector:
    """The detector for a setting as a user writes it.

    Args:
        spec: ``"small"`` for :class:`SmallDetector`, which comes with the package; ``"yunet"``, the path or the address
            of a YuNet network (``.onnx``) for :class:`YuNetDetector`.

    Raises:
        ModelError: no such name or file, one that is no YuNet network, or one that cannot be fetched.

    >>> type(create_detector()).__name__
    'SmallDetector'
    """
    path, entry = place_of(spec, "detector")
    if entry is not None and not entry.urls:
        return SmallDetector()
    return YuNetDetector(path if entry is None else fetch(entry))


def detector_maker(spec: Any = None) -> Callable[[], Detector] | None:
    """What makes a detector for each thread, of everything that may be said about detectors.

    Args:
        spec: None: the default; as of :func:`create_detector`; ``"aligned"``: none is needed, because the pictures are
            aligned crops; a detector, which is copied; or a function that makes one.

    Raises:
        ModelError: as :func:`create_detector`: here, and not in a thread.
        TypeError: something else.

    >>> detector_maker("aligned") is None, type(detector_maker()()).__name__
    (True, 'SmallDetector')
    """
    if isinstance(spec, str) and spec == "aligned":
        return None
    if spec is None or isinstance(spec, (str, os.PathLike)):
        name: Any = "small" if spec is None else spec
        return partial(copy.copy, create_detector(name))
    if isinstance(spec, Detector) and not isinstance(spec, type):
        return partial(copy.copy, spec)
    if callable(spec):
        return cast("Callable[[], Detector]", spec)
    raise TypeError(
        "detector: expected a name, the path of a YuNet network, 'aligned', a detector, or a function that makes one, "
        f"got {type(spec).__name__}"
    )


def choice_in_words(found: int, policy: str = "prominent") -> str:
    """What is said of a picture with several faces, of which one was taken.

    >>> choice_in_words(2)
    '2 faces found, took the most prominent'
    """
    return f"{found} faces found, took the {_PLAIN[policy]}"


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

    >>> small, large = Face((40, 40, 20, 20), None, 0.9), Face((0, 0, 30, 30), None, 0.9)
    >>> choose_face([small, large], (100, 100), "largest") is large, choose_face([small, large], (100, 100)) is small
    (True, True)
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
    merit = -distance if policy == "centre" else area
    if policy == "prominent":
        radius = np.hypot(*shape) / 4
        merit = area * np.exp(-((distance / radius) ** 2) / 2) * [face.score for face in faces]
    return faces[int(merit.argmax())]
