"""What several recognisers say of pictures, cell by cell, and the grid feature that they teach together.

Every teacher's output block is affine over its 7x7 map, so its embedding is a sum over cells, e = c + sum_ij M_ij x_ij
(docs/models.md). The cells of all teachers, each divided by the length of its own embedding, stand one behind the
other; neighbours share, and each cell keeps its principal axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.sface import SFace
from xcos_ext.backbones import Recogniser
from xcos_ext.io.errors import XCosError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.model import load_recogniser
from xcos_ext.model.cells import cell_matrices, spread_matrix
from xcos_ext.training.data import Pictures, file_lock, normalised

__all__ = ["Answers", "TargetSpace", "ask", "joined", "open_teacher"]

_BLOCK = 32  # pictures of one forward pass
_NOTED = 20  # blocks between two notes of how far it is
_RIDGE = 1e-6  # least length of an embedding that is divided by


def open_teacher(path: str) -> Recogniser:
    """A recogniser from a file of weights, or SFace from its ONNX file, in evaluation mode and without gradients."""
    made = SFace(path).eval() if path.endswith(".onnx") else load_recogniser(path)
    return made.requires_grad_(False)


class Answers(NamedTuple):
    """What teachers say of pictures, as they are and mirrored.

    Attributes:
        cells: for each teacher M_ij x_ij / |e|, fp16 [2, N, P, D], memory-mapped.
        embeddings: for each teacher, fp32 [2, N, D], at unit length.
    """

    cells: list[Tensor]
    embeddings: list[Tensor]


@torch.no_grad()
def ask(
    teachers: Sequence[str],
    pictures: Pictures,
    folder: Path,
    *,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> Answers:
    """The answers of teachers: read where they are, else computed and written; what was interrupted is taken up again.

    Args:
        teachers: files, as :func:`open_teacher` takes them.
        pictures: of the size that they expect.
        folder: of the files, 25 kB a picture and teacher for 128 numbers a cell.
        device: that the teachers run on.
        progress: called with the teacher, views of pictures done, and in all.

    Raises:
        XCosError: the folder cannot be written, or a teacher's output block is not affine.
    """
    answers = Answers([], [])
    for path in teachers:
        name, place = Path(path).name, None
        try:
            recogniser = open_teacher(path)
            place = folder / f"{fingerprint_weights(recogniser)}-{pictures.fingerprint}"
            with file_lock(place):
                tell = None if progress is None else partial(progress, name)
                files = _made(recogniser, pictures, place, device, tell)
        except OSError as error:
            raise XCosError(f"{place or path}: cannot be written or read: {error.strerror or error}") from error
        views = 2, len(pictures)
        answers.cells.append(torch.from_numpy(np.load(files[0], mmap_mode="c")).unflatten(0, views))
        answers.embeddings.append(torch.from_numpy(np.load(files[1])).unflatten(0, views))
    return answers


def _made(
    recogniser: Recogniser, pictures: Pictures, place: Path, device: str, progress: Callable[[int, int], None] | None
) -> tuple[Path, Path]:
    files = place / "cells.npy", place / "embeddings.npy"
    note, total = place / "done", 2 * len(pictures)
    place.mkdir(parents=True, exist_ok=True)
    done = int(note.read_text()) if note.is_file() else 0
    if done == total:
        return files
    matrices = cell_matrices(recogniser).matrices.float()
    per_cell = matrices.flatten(2).permute(2, 1, 0).contiguous().to(device)  # [P, C, D]
    recogniser = recogniser.to(device)
    shapes = (total, per_cell.shape[0], per_cell.shape[2]), (total, per_cell.shape[2])
    mode = "r+" if done else "w+"
    cells, embeddings = (
        np.lib.format.open_memmap(file, mode, dtype, shape)
        for file, dtype, shape in zip(files, (np.float16, np.float32), shapes, strict=True)
    )
    for number, start in enumerate(range(done, total, _BLOCK)):
        places = torch.arange(start, min(start + _BLOCK, total))
        images = pictures.images[places % len(pictures)]
        images = torch.where((places >= len(pictures))[:, None, None, None], images.flip(3), images)
        grid = recogniser.grid(normalised(recogniser, images.to(device))).float()
        embedding = recogniser.embed(grid).float()
        length = embedding.norm(dim=1, keepdim=True).clamp_min(_RIDGE)
        made = torch.bmm(grid.flatten(2).permute(2, 0, 1), per_cell).permute(1, 0, 2)  # [N, P, D]
        cells[start : start + len(places)] = (made / length[:, :, None]).half().cpu().numpy()
        embeddings[start : start + len(places)] = (embedding / length).cpu().numpy()
        if number % _NOTED == _NOTED - 1 or start + len(places) == total:
            cells.flush()
            embeddings.flush()
            note.write_text(str(start + len(places)))
        if progress is not None:
            progress(start + len(places), total)
    return files


def joined(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Teachers' embeddings, at unit length each, one behind the other with their weights, at unit length."""
    return F.normalize(torch.cat([w * e for w, e in zip(weights, embeddings, strict=True)], -1), dim=-1)


class TargetSpace(NamedTuple):
    """From teachers' cells to the grid feature they teach: F_i = B_i (sum_k G_ik e_k - mean_i).

    Attributes:
        weights: of the teachers.
        sharing: G [P, P] (to, from).
        mean: [P, D], of shared cells.
        basis: B [P, K, D], principal axes, all times one number: F has variance 1 over all its elements. Scores do not
            depend on it; the rate at which a head can learn does.
    """

    weights: tuple[float, ...]
    sharing: Tensor
    mean: Tensor
    basis: Tensor

    @classmethod
    def fit(
        cls, cells: Sequence[Tensor], weights: Sequence[float], size: tuple[int, int], spread: float, channels: int
    ) -> TargetSpace:
        """Axes of some faces.

        Args:
            cells: for each teacher [N, P, D], one face of each person.
            weights: of the teachers.
            size: of the grid.
            spread: of G, in cells.
            channels: K.
        """
        whole = _side_by_side(cells, weights)
        sharing = spread_matrix(size, spread)
        sharing = torch.eye(whole.shape[1]) if sharing is None else sharing.float()
        mean = sharing @ whole.mean(0)
        basis, kept = [], 0.0
        for cell in range(whole.shape[1]):
            shared = torch.einsum("k,nkd->nd", sharing[cell], whole) - mean[cell]
            values, vectors = torch.linalg.eigh((shared.T @ shared).double())
            basis.append(vectors[:, -channels:].flip(1).T.float())
            kept += float(values[-channels:].sum())
        scale = (whole.shape[0] * whole.shape[1] * channels / max(kept, 1e-30)) ** 0.5
        return cls(tuple(weights), sharing, mean, scale * torch.stack(basis))

    def side_by_side(self, cells: Sequence[Tensor]) -> Tensor:
        """Teachers' cells [N, P, D] as one, fp32."""
        return _side_by_side(cells, self.weights)

    def features(self, cells: Tensor, size: tuple[int, int] = (7, 7)) -> Tensor:
        """Cells [N, P, D] of all teachers -> grid feature [N, K, h, w]."""
        shared = torch.matmul(self.sharing, cells) - self.mean
        return torch.einsum("pkd,npd->nkp", self.basis, shared).unflatten(2, size)


def _side_by_side(cells: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.cat([w * c.float() for w, c in zip(weights, cells, strict=True)], -1)
