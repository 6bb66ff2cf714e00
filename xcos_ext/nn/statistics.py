"""What the closed-form plug-in has to know about faces in general, kept in a small file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.errors import ModelError

from .cells import CellMatrices
from .files import StrPath, read_safetensors, write_safetensors

__all__ = ["Calibration", "PlugStatistics", "compute_statistics", "find_statistics"]

_FORMAT = "xcos_ext.plug_statistics"
_VERSION = "1"
_DATA = Path(__file__).resolve().parent.parent / "data"

Faces = Iterable[Any]


@dataclass(frozen=True)
class Calibration:
    """Thresholds for one form of the closed-form score.

    Attributes:
        threshold: the decision threshold; same person if score >= threshold.
        rule: how ``threshold`` was chosen, in words.
        fmr: false match rate -> smallest threshold that keeps it, on the calibration's impostor pairs.
        impostor_pairs: number of impostor pairs behind the figures.
        genuine_pairs: number of genuine pairs behind the figures; 0 if none was used.
    """

    threshold: float
    rule: str
    fmr: Mapping[float, float] = field(default_factory=dict)
    impostor_pairs: int = 0
    genuine_pairs: int = 0

    def _to_json(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "rule": self.rule,
            "fmr": {repr(rate): threshold for rate, threshold in self.fmr.items()},
            "impostor_pairs": self.impostor_pairs,
            "genuine_pairs": self.genuine_pairs,
        }

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> Calibration:
        threshold = float(data["threshold"])
        fmr = {float(rate): float(t) for rate, t in dict(data["fmr"]).items()}
        if not all(map(math.isfinite, (threshold, *fmr.values()))):
            raise ValueError("a threshold is not finite")
        return cls(threshold, str(data["rule"]), fmr, int(data["impostor_pairs"]), int(data["genuine_pairs"]))


@dataclass(frozen=True)
class PlugStatistics:
    """Mean cell features of one recogniser over many faces, and what was derived from them.

    Attributes:
        fingerprint: :func:`~xcos_ext.nn.fingerprint.fingerprint_weights` of the recogniser.
        mean: mean of e_ij = M_ij x_ij, [D, H, W] fp32.
        basis: per-cell principal axes [H * W, K, D] fp32 (orthonormal rows, strongest first), or None.
        calibrations: thresholds for the forms ``"centred"``, ``"uncentred"`` and ``"projected"``.
        faces: number of pictures behind ``mean``.
        note: where the pictures came from, in words.
    """

    fingerprint: str
    mean: Tensor
    basis: Tensor | None = None
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    faces: int = 0
    note: str = ""

    def save(self, path: StrPath) -> None:
        """Write to a safetensors file (fp32), atomically.

        Raises:
            ModelError: the file cannot be written.
        """
        tensors = {"mean": self.mean.float()}
        if self.basis is not None:
            tensors["basis"] = self.basis.float()
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "faces": str(self.faces),
            "note": self.note,
            "calibrations": json.dumps({k: c._to_json() for k, c in self.calibrations.items()}),
        }
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: StrPath) -> PlugStatistics:
        """Read a file written by :meth:`save` (fp16 and fp32 tensors are accepted).

        Raises:
            ModelError: missing, damaged, or not a statistics file of this version.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != _FORMAT:
            raise ModelError(f"{path}: not a plug-in statistics file (format {metadata.get('format')!r})")
        if metadata.get("version") != _VERSION:
            raise ModelError(
                f"{path}: statistics format {metadata.get('version')!r}, this version of xcos_ext reads {_VERSION!r}"
            )
        unexpected = set(tensors) - {"mean", "basis"}
        if "mean" not in tensors or unexpected:
            raise ModelError(f"{path}: expected the tensors mean and, optionally, basis, got {sorted(tensors)}")
        mean, basis = tensors["mean"].float(), tensors.get("basis")
        basis = None if basis is None else basis.float()
        if mean.dim() != 3 or not torch.isfinite(mean).all():
            raise ModelError(f"{path}: mean: expected finite [D, H, W], got {list(mean.shape)}")
        if basis is not None:
            dim, height, width = mean.shape
            if basis.dim() != 3 or basis.shape[0] != height * width or basis.shape[2] != dim:
                raise ModelError(
                    f"{path}: basis: expected [{height * width}, K, {dim}], got {list(basis.shape)}"
                )
            if not torch.isfinite(basis).all():
                raise ModelError(f"{path}: basis: values are not finite")
        try:
            calibrations = {
                str(name): Calibration._from_json(data)
                for name, data in json.loads(metadata.get("calibrations", "{}")).items()
            }
            faces = int(metadata.get("faces", "0"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: damaged metadata ({error})") from error
        return cls(
            metadata.get("fingerprint", ""), mean, basis, calibrations, faces, metadata.get("note", "")
        )


@cache
def _shipped() -> dict[str, Path]:
    """Fingerprint -> file of the statistics that come with the package."""
    found: dict[str, Path] = {}
    for file in sorted(_DATA.glob("*.safetensors")):
        statistics = PlugStatistics.load(file)
        found[statistics.fingerprint] = file
    return found


def find_statistics(fingerprint: str) -> PlugStatistics | None:
    """The statistics that come with the package for a recogniser's weights, or None."""
    file = _shipped().get(fingerprint)
    return None if file is None else PlugStatistics.load(file)


def iterate_batches(recogniser: Recogniser, faces: Faces, batch_size: int) -> Iterator[Tensor]:
    """Batches of normalised images from pictures, batches of pictures, or batches already normalised.

    Args:
        recogniser: gives the preprocessing.
        faces: items are uint8 RGB [H, W, 3], uint8 RGB [N, H, W, 3], or float tensors [N, 3, H, W] (normalised).
        batch_size: single pictures are gathered into batches of this size.

    Raises:
        TypeError: an item of another kind.
        ValueError: an item of another shape.
    """
    height, width = recogniser.preprocessing.size
    waiting: list[np.ndarray] = []
    for item in faces:
        if isinstance(item, Tensor):
            if not item.is_floating_point() or item.dim() != 4 or item.shape[1:] != (3, height, width):
                raise ValueError(
                    f"faces: expected floating-point batches [N, 3, {height}, {width}], got {item.dtype} "
                    f"{list(item.shape)}"
                )
            yield item.float()
        elif isinstance(item, np.ndarray):
            waiting.extend(item if item.ndim == 4 else [item])
            while len(waiting) >= batch_size:
                yield recogniser.preprocessing(waiting[:batch_size])
                del waiting[:batch_size]
        else:
            raise TypeError(f"faces: expected NumPy arrays or tensors, got {type(item).__name__}")
    if waiting:
        yield recogniser.preprocessing(waiting)


@torch.no_grad()
def compute_statistics(
    recogniser: Recogniser,
    cells: CellMatrices,
    faces: Faces,
    *,
    fingerprint: str,
    project: int | None = None,
    batch_size: int = 32,
    note: str = "",
) -> PlugStatistics:
    """Mean and, on request, principal axes of every cell's feature over a set of faces.

    Args:
        recogniser: the network, in evaluation mode.
        cells: its :func:`~xcos_ext.nn.cells.cell_matrices`.
        faces: aligned pictures, as in :func:`iterate_batches`; a few hundred different people are enough.
        fingerprint: the recogniser's fingerprint.
        project: number of principal axes K per cell, or None.
        batch_size: pictures per forward pass.
        note: where the pictures came from.

    Raises:
        ValueError: no faces, or too few for ``project`` axes.
    """
    matrices = cells.matrices.float()
    dim, _, height, width = matrices.shape
    per_cell = matrices.flatten(2).permute(2, 0, 1).contiguous()  # [P, D, C]
    device = next(iter(recogniser.parameters())).device
    count = 0
    total = torch.zeros(height * width, dim, dtype=torch.float64)
    second = torch.zeros(height * width, dim, dim, dtype=torch.float64) if project else None
    shift: Tensor | None = None  # about the first batch's mean, so that the covariance does not cancel
    for images in iterate_batches(recogniser, faces, batch_size):
        grid = recogniser.grid(images.to(device)).to("cpu", torch.float32)
        e = torch.bmm(grid.flatten(2).permute(2, 0, 1), per_cell.transpose(1, 2)).double()  # [P, N, D]
        if shift is None:
            shift = e.mean(1)
        e = e - shift[:, None]
        total += e.sum(1)
        if second is not None:
            second += torch.bmm(e.transpose(1, 2), e)
        count += images.shape[0]
    if count == 0 or shift is None:
        raise ValueError("faces: expected at least one picture, got none")
    if project is not None and not 1 <= project <= dim:
        raise ValueError(f"project: expected 1..{dim}, got {project}")
    if project is not None and count <= project:
        raise ValueError(f"faces: {project} axes need more than {project} pictures, got {count}")
    offset = total / count
    mean = shift + offset
    basis: Tensor | None = None
    if second is not None and project is not None:
        covariance = second / count - offset[:, :, None] * offset[:, None, :]
        _, vectors = torch.linalg.eigh(covariance)  # ascending
        basis = vectors[:, :, -project:].flip(2).transpose(1, 2)
        # Eigenvectors have no sign of their own; fix it, so that a file can be computed again.
        largest = basis.gather(2, basis.abs().argmax(2, keepdim=True))
        basis = (basis * largest.sign()).float().contiguous()
    return PlugStatistics(
        fingerprint=fingerprint,
        mean=mean.T.reshape(dim, height, width).float().contiguous(),
        basis=basis,
        faces=count,
        note=note,
    )


def load_or_pass(statistics: PlugStatistics | StrPath) -> tuple[PlugStatistics, str]:
    """Statistics from an object or a file, with a name for error messages."""
    if isinstance(statistics, PlugStatistics):
        return statistics, "statistics"
    if isinstance(statistics, (str, os.PathLike)):
        return PlugStatistics.load(statistics), os.fspath(statistics)
    raise TypeError(f"statistics: expected a path or PlugStatistics, got {type(statistics).__name__}")
