"""What the commands of this folder share."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xcos_ext.faces import Detector, Face
from xcos_ext.io.atomic import write_atomically

__all__ = ["Padded", "say", "write_json"]


def say(line: str) -> None:
    """A line about progress."""
    print(line, file=sys.stderr, flush=True)


def write_json(path: Path, value: Any) -> None:
    """Write a file of results; a failure leaves the one before."""

    def write(file: BinaryIO) -> None:
        file.write(f"{json.dumps(value, indent=1)}\n".encode())

    write_atomically(path, write)


class Padded:
    """A detector that sees pictures with a border of a quarter of their longer side, for crops that are too tight."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    def detect(self, rgb: np.ndarray) -> list[Face]:
        """Faces, where they are in the picture without the border."""
        border = max(rgb.shape[:2]) // 4
        padded = np.pad(rgb, ((border, border), (border, border), (0, 0)))
        return [
            replace(
                face,
                box=(face.box[0] - border, face.box[1] - border, *face.box[2:]),
                landmarks=None if face.landmarks is None else face.landmarks - border,
            )
            for face in self._detector.detect(padded)
        ]
