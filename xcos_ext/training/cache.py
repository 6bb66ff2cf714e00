"""A frozen network's maps of all pictures, computed once and kept on disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xcos_ext.backbones import Recogniser
from xcos_ext.io.atomic import write_atomically
from xcos_ext.io.errors import XCosError
from xcos_ext.io.fingerprint import fingerprint_weights

from .data import Pictures

__all__ = ["Maps", "alone", "cached_maps", "normalised"]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process or thread is inside for the same folder: what one computes, the others then find."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)  # the folder is its own lock, so none lies about
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@dataclass
class Maps:
    """Attributes:
    grids: fp16 [V, N, C, H, W], memory-mapped; V views of each picture: as it is and, where asked for, flipped.
    embeddings: fp32 [V, N, D] at unit length, or None for a network without an output block.
    """

    grids: Tensor
    embeddings: Tensor | None


def normalised(recogniser: Recogniser, images: Tensor) -> Tensor:
    """uint8 RGB [N, 3, H, W] -> what the network expects, fp32, on the images' device."""
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in (recogniser.preprocessing.mean, recogniser.preprocessing.std)
    )
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def cached_maps(
    recogniser: Recogniser,
    pictures: Pictures,
    folder: Path,
    *,
    flipped: bool = False,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Maps:
    """The maps and embeddings of all pictures: read from ``folder`` if they are there, else computed and written.

    Files are named by the fingerprints of the network's weights and of the pictures, so they are never another's;
    an interrupted computation leaves no file of that name. Of several processes one computes, the others wait.

    Args:
        recogniser: the frozen network, in evaluation mode.
        pictures: of the size that it expects.
        folder: of the files: 50 kB a picture and view for 512 x 7 x 7.
        flipped: also the mirrored pictures.
        device: where to compute.
        batch_size: pictures per forward pass.
        progress: called with pictures done and pictures in all.

    Raises:
        XCosError: the folder cannot be written.
    """
    if recogniser.training:
        raise ValueError("recogniser: expected evaluation mode, got training mode")
    views = 2 if flipped else 1
    stem = f"{fingerprint_weights(recogniser)}-{pictures.fingerprint}-{views}"
    files = folder / f"{stem}.maps.npy", folder / f"{stem}.embeddings.npy"
    try:
        with alone(folder):
            if not files[0].is_file():
                _compute(recogniser, pictures, files, views, torch.device(device), batch_size, progress)
    except OSError as error:
        raise XCosError(f"{folder}: maps cannot be written: {error.strerror or error}") from error
    grids = torch.from_numpy(np.load(files[0], mmap_mode="c"))  # copy-on-write: torch wants writable memory
    embeddings = torch.from_numpy(np.load(files[1])) if files[1].is_file() else None
    return Maps(grids, embeddings)


def _compute(
    recogniser: Recogniser,
    pictures: Pictures,
    files: tuple[Path, Path],
    views: int,
    device: torch.device,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    count, total = len(pictures), views * len(pictures)
    recogniser.to(device)
    embeddings = []

    def write(stream: BinaryIO) -> None:
        shape = (views, count, *recogniser.grid_shape)
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for view in range(views):
            for start in range(0, count, batch_size):
                images = pictures.images[start : start + batch_size].to(device)
                grid = recogniser.grid(normalised(recogniser, images.flip(3) if view else images))
                stream.write(grid.half().cpu().numpy().tobytes())
                if recogniser.embedding_size is not None:
                    embeddings.append(F.normalize(recogniser.embed(grid).float()).cpu())
                if progress is not None:
                    progress(view * count + start + len(grid), total)
        if embeddings:
            values = torch.cat(embeddings).view(views, count, -1).numpy()
            write_atomically(files[1], lambda file: np.save(file, values))

    write_atomically(files[0], write)  # takes its name last: it says that the others are there
