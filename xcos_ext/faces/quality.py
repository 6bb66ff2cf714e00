"""How far a face can be relied on: its size, sharpness, pose and light, and how much it looks like one."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from .detector import Face, check_picture

__all__ = ["Quality", "doubts", "face_quality"]

_LUMA = np.array([0.299, 0.587, 0.114])
#: From which values on a verdict is doubted; docs/verify.md says how often that happens to ordinary photographs.
SMALL, BLURRED, TURNED, DARK, BRIGHT, FLAT, ONE_SIDED = 40.0, 0.025, 35.0, 45.0, 215.0, 12.0, 0.8


@dataclass(frozen=True)
class Quality:
    """What a face's picture is like.

    Attributes:
        size: side of a square as large as the face's box, in pixels of the picture; None: not known (an aligned crop).
        sharpness: mean absolute difference between a pixel and the mean of its four neighbours, over the standard
            deviation of the face's brightness, in the aligned crop; 0.03 to 0.15 in ordinary pictures.
        yaw, pitch, roll: degrees, see :func:`~xcos_ext.faces.pose_of`; None: not known.
        brightness: mean of the face's pixels, 0 to 255.
        contrast: their standard deviation.
        side_light: difference between the halves' mean brightness over the mean, 0 to 2.
        likelihood: how much it looks like a face, in [0, 1]: the detector's score, or
            :func:`~xcos_ext.faces.face_likelihood`; None: nobody looked.
    """

    size: float | None
    sharpness: float
    yaw: float | None
    pitch: float | None
    roll: float | None
    brightness: float
    contrast: float
    side_light: float
    likelihood: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Plain values, rounded."""
        return {name: None if value is None else round(value, 3) for name, value in asdict(self).items()}

    def faults(self) -> list[str]:
        """What is wrong with it, in words; empty: nothing.

        >>> face_quality(np.full((112, 112, 3), 20, np.uint8)).faults()
        ['too dark (brightness 20 of 255)', 'without contrast']
        """
        said = []
        if self.size is not None and self.size < SMALL:
            said.append(f"only {self.size:.0f} pixels large")
        if self.contrast >= FLAT and self.sharpness < BLURRED:
            said.append("blurred")
        if self.brightness < DARK:
            said.append(f"too dark (brightness {self.brightness:.0f} of 255)")
        if self.brightness > BRIGHT:
            said.append(f"too bright (brightness {self.brightness:.0f} of 255)")
        if self.contrast < FLAT:
            said.append("without contrast")
        elif self.side_light > ONE_SIDED:
            said.append("lit from one side")
        return said


def face_quality(crop: np.ndarray, face: Face | None = None, likelihood: float | None = None) -> Quality:
    """Measure a face.

    Args:
        crop: the aligned face, uint8 RGB [height, width, 3].
        face: where it was found, for its size and pose.
        likelihood: of an aligned crop; None: the detector's score, if there is a face.

    Raises:
        ValueError: another shape or type.

    >>> face_quality(np.full((112, 112, 3), 90, np.uint8)).brightness
    90.0
    """
    check_picture(crop)
    grey = crop @ _LUMA
    height, width = grey.shape
    # The middle of an aligned crop, in which there is neither hair nor background.
    inner = grey[int(0.3 * height) : int(0.9 * height), int(0.2 * width) : int(0.8 * width)]
    around = (inner[:-2, 1:-1] + inner[2:, 1:-1] + inner[1:-1, :-2] + inner[1:-1, 2:]) / 4
    detail = float(np.abs(inner[1:-1, 1:-1] - around).mean())
    brightness, contrast = float(inner.mean()), float(inner.std())
    half = inner.shape[1] // 2
    sides = float(abs(inner[:, :half].mean() - inner[:, -half:].mean()))
    yaw, pitch, roll = (None, None, None) if face is None or face.pose is None else face.pose
    return Quality(
        None if face is None else float(np.sqrt(max(face.box[2] * face.box[3], 0.0))),
        detail / max(contrast, 1e-9),
        yaw,
        pitch,
        roll,
        brightness,
        contrast,
        sides / max(brightness, 1.0),
        face.score if likelihood is None and face is not None else likelihood,
    )


def doubts(a: Quality | None, b: Quality | None, names: tuple[str, str]) -> str | None:
    """One sentence where a verdict about two faces should not be relied on; None: it may.

    >>> dark = face_quality(np.full((112, 112, 3), 20, np.uint8))
    >>> doubts(dark, None, ("a.jpg", "b.jpg"))
    'Do not rely on this verdict: the face of a.jpg is too dark (brightness 20 of 255) and without contrast.'
    """
    said = []
    for quality, name in zip((a, b), names, strict=True):
        faults = [] if quality is None else quality.faults()
        if faults:
            said.append(f"the face of {name} is {' and '.join(faults)}")
    yaws = [quality.yaw for quality in (a, b) if quality is not None and quality.yaw is not None]
    if len(yaws) == 2 and abs(yaws[0] - yaws[1]) > TURNED and max(map(abs, yaws)) > TURNED:
        said.append(f"one head is turned by {abs(yaws[0] - yaws[1]):.0f} degrees against the other")
    return f"Do not rely on this verdict: {'; '.join(said)}." if said else None
