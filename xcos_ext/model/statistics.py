"""What the closed-form plug-in has to know about faces in general, kept in a small file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.card.calibration import Calibration
from xcos_ext.io.errors import ModelError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.io.several import several
from xcos_ext.io.shipped import DATA
from xcos_ext.io.weights import StrPath, read_safetensors, write_safetensors

from .cells import CellMatrices, spread_matrix

__all__ = ["Form", "PlugStatistics", "compute_statistics", "find_statistics"]

_FORMAT = "xcos_ext.plug_statistics"
_VERSION = "1"
_BATCH = 32  # pictures of a forward pass

Faces = Iterable[Any]


class Form(NamedTuple):
    """A form of the closed-form score.

    Attributes:
        centre: whether the cells are centred.
        spread: sharing between neighbouring cells, in cells.
        project: number of axes per cell, or None.
    """

    centre: bool
    spread: float
    project: int | None


@dataclass(frozen=True)
class PlugStatistics:
    """Mean cell features of one recogniser over many faces, and what was derived from them.

    Attributes:
        fingerprint: :func:`~xcos_ext.io.fingerprint.fingerprint_weights` of the recogniser.
        mean: mean of e_ij = M_ij x_ij, [D, H, W] fp32.
        basis: per-cell principal axes [H * W, K, D] fp32 (orthonormal rows, strongest first) of cells after
            sharing with ``basis_spread``, or None.
        basis_spread: the spread that ``basis`` was computed with.
        calibrations: form of the score -> its thresholds and false match rates.
        faces: number of pictures behind ``mean``.
        note: where the pictures came from, in words.

    >>> statistics = PlugStatistics("0123456789abcdef", torch.zeros(128, 7, 7), calibrations={
    ...     Form(centre=True, spread=0.7, project=None): Calibration(0.3, "by hand")})
    >>> statistics.calibration(centre=True, spread=0.7, project=None).threshold
    0.3
    """

    fingerprint: str
    mean: Tensor
    basis: Tensor | None = None
    basis_spread: float = 0.0
    calibrations: Mapping[Form, Calibration] = field(default_factory=dict)
    faces: int = 0
    note: str = ""

    def calibration(self, *, centre: bool, spread: float, project: int | None) -> Calibration | None:
        """The calibration of exactly this form, or None."""
        return self.calibrations.get(Form(centre, spread, project))

    def save(self, path: StrPath) -> None:
        """Write to a safetensors file (fp32), atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors = {"mean": self.mean.float()}
        if self.basis is not None:
            tensors["basis"] = self.basis.float()
        metadata = {
            "xcos_format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "faces": str(self.faces),
            "note": self.note,
            "basis_spread": repr(self.basis_spread),
            "calibrations": json.dumps([form._asdict() | c.as_dict() for form, c in self.calibrations.items()]),
        }
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: StrPath) -> PlugStatistics:
        """Read a file written by :meth:`save` (fp16 and fp32 tensors are accepted).

        Raises:
            ModelError: missing, damaged, or not a statistics file of this version.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("xcos_format") != _FORMAT:
            raise ModelError(f"{path}: not a plug-in statistics file (format {metadata.get('xcos_format')!r})")
        if metadata.get("version") != _VERSION:
            raise ModelError(f"{path}: format {metadata.get('version')!r}; this version of xcos_ext reads {_VERSION!r}")
        unexpected = set(tensors) - {"mean", "basis"}
        if "mean" not in tensors or unexpected:
            raise ModelError(f"{path}: expected the tensors mean and, optionally, basis, got {sorted(tensors)}")
        mean, basis = tensors["mean"].float(), tensors.get("basis")
        if mean.dim() != 3 or not torch.isfinite(mean).all():
            raise ModelError(f"{path}: mean: expected finite [D, H, W], got {list(mean.shape)}")
        if basis is not None:
            basis, (dim, height, width) = basis.float(), mean.shape
            if basis.dim() != 3 or (basis.shape[0], basis.shape[2]) != (height * width, dim):
                raise ModelError(f"{path}: basis: expected [{height * width}, K, {dim}], got {list(basis.shape)}")
            if not torch.isfinite(basis).all():
                raise ModelError(f"{path}: basis: values are not finite")
        try:
            return cls(
                metadata.get("fingerprint", ""),
                mean,
                basis,
                basis_spread=float(metadata.get("basis_spread", "0")),
                calibrations={
                    _form(entry): Calibration.from_dict(entry)
                    for entry in json.loads(metadata.get("calibrations", "[]"))
                },
                faces=int(metadata.get("faces", "0")),
                note=metadata.get("note", ""),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path}: damaged metadata ({error})") from error


def _form(entry: Mapping[str, Any]) -> Form:
    project = entry["project"]
    return Form(bool(entry["centre"]), float(entry["spread"]), None if project is None else int(project))


@cache
def _shipped() -> dict[str, Path]:
    """Fingerprint -> file of the statistics that come with the package."""
    found: dict[str, Path] = {}
    for file in sorted(DATA.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:  # the header alone: the folder holds weights too
            metadata = opened.metadata() or {}
        if metadata.get("xcos_format") == _FORMAT:
            found[metadata["fingerprint"]] = file
    return found


def find_statistics(fingerprint: str) -> PlugStatistics | None:
    """The statistics that come with the package for a recogniser's weights, or None.

    >>> find_statistics("0123456789abcdef") is None
    True
    """
    file = _shipped().get(fingerprint)
    return None if file is None else PlugStatistics.load(file)


def _grids(recogniser: Recogniser, faces: Faces) -> Iterator[Tensor]:
    """The network's maps, fp32 on the CPU: of pictures in any form, or as they were given.

    Args:
        recogniser: the network.
        faces: items are uint8 RGB [H, W, 3], gathered into batches; uint8 RGB [N, H, W, 3]; or float tensors
            [N, 3, H, W] (normalised) or [N, *grid_shape].

    Raises:
        TypeError: an item of another kind.
        ValueError: an item of another shape.
    """
    height, width = recogniser.preprocessing.size
    parameter = next(iter(recogniser.parameters()))
    waiting: list[np.ndarray] = []

    def maps(batch: Tensor) -> Tensor:
        given = tuple(batch.shape[1:]) == recogniser.grid_shape
        grid = batch if given else recogniser.grid(batch.to(parameter.device, parameter.dtype))
        return grid.to("cpu", torch.float32)

    for item in several(faces, "faces", "pictures"):
        if isinstance(item, Tensor):
            shapes = ((3, height, width), recogniser.grid_shape)
            if not item.is_floating_point() or item.dim() != 4 or tuple(item.shape[1:]) not in shapes:
                raise ValueError(
                    f"faces: expected floating-point batches [N, 3, {height}, {width}], got {item.dtype} "
                    f"{list(item.shape)}"
                )
            yield maps(item)
        elif isinstance(item, np.ndarray):
            waiting.extend(item if item.ndim == 4 else [item])
            while len(waiting) >= _BATCH:
                yield maps(recogniser.preprocessing(waiting[:_BATCH]))
                del waiting[:_BATCH]
        else:
            raise TypeError(f"faces: expected NumPy arrays or tensors, got {type(item).__name__}")
    if waiting:
        yield maps(recogniser.preprocessing(waiting))


@torch.no_grad()
def compute_statistics(
    recogniser: Recogniser, cells: CellMatrices, faces: Faces, *, project: int | None, spread: float, note: str = ""
) -> PlugStatistics:
    """What :func:`~xcos_ext.model.plug_statistics` computes, with the :func:`~xcos_ext.model.cells.cell_matrices` of
    the recogniser, which is in evaluation mode."""
    matrices = cells.matrices.float()
    dim, _, height, width = matrices.shape
    per_cell = matrices.flatten(2).permute(2, 0, 1).contiguous()  # [P, D, C]
    sharing = spread_matrix((height, width), spread)
    sharing = None if sharing is None else sharing.float()
    count = 0
    total = torch.zeros(height * width, dim, dtype=torch.float64)
    # Second moments are taken about the first batch's mean, so that the covariance does not cancel.
    shift: Tensor | None = None
    offset = torch.zeros(height * width, dim, dtype=torch.float64)
    second = torch.zeros(height * width, dim, dim, dtype=torch.float64) if project else None
    for grid in _grids(recogniser, faces):
        e = torch.bmm(grid.flatten(2).permute(2, 0, 1), per_cell.transpose(1, 2))  # [P, N, D]
        total += e.double().sum(1)
        if second is not None:
            shared = e if sharing is None else torch.einsum("pq,qnd->pnd", sharing, e)
            if shift is None:
                shift = shared.mean(1)
            deviation = (shared - shift[:, None]).double()
            offset += deviation.sum(1)
            second += torch.bmm(deviation.transpose(1, 2), deviation)
        count += grid.shape[0]
    if count == 0:
        raise ValueError("faces: expected at least one picture, got none")
    if project is not None and not 1 <= project <= dim:
        raise ValueError(f"project: expected 1..{dim}, got {project}")
    if project is not None and count <= project:
        raise ValueError(f"faces: {project} axes need more than {project} pictures, got {count}")
    mean = total / count
    basis: Tensor | None = None
    if second is not None and project is not None:
        offset /= count
        covariance = second / count - offset[:, :, None] * offset[:, None, :]
        _, vectors = torch.linalg.eigh(covariance)  # ascending
        basis = vectors[:, :, -project:].flip(2).transpose(1, 2)
        # Eigenvectors have no sign of their own; fix it, so that a file can be computed again.
        largest = basis.gather(2, basis.abs().argmax(2, keepdim=True))
        basis = (basis * largest.sign()).float().contiguous()
    return PlugStatistics(
        fingerprint=fingerprint_weights(recogniser),
        mean=mean.T.reshape(dim, height, width).float().contiguous(),
        basis=basis,
        basis_spread=spread if basis is not None else 0.0,
        faces=count,
        note=note,
    )
