"""What the commands of this folder share."""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xcos_ext.evaluation.datasets import CFP, PairList
from xcos_ext.faces import Detector, Face
from xcos_ext.io.atomic import write_atomically

__all__ = ["Padded", "cfp_lists", "say", "write_json"]


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


def cfp_lists(archive: Path, folds: Sequence[int] | None = None) -> dict[str, PairList]:
    """CFP's pairs, frontal with frontal (``FF``) and with profile (``FP``), from an archive in CFP's layout.

    Args:
        archive: with ``Protocol`` and ``Data``.
        folds: numbered from 1; None: all that are there.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as opened:
        opened.extractall(folder, [name for name in opened.namelist() if name.startswith("Protocol/")])
        lists = {kind: CFP(archive, Path(folder, "Protocol/Split", kind)) for kind in ("FF", "FP")}
    if folds is None:
        return dict(lists)
    return {kind: pairs.of_folds([fold - 1 for fold in folds]) for kind, pairs in lists.items()}
