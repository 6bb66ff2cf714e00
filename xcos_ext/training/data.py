"""Data for training: pictures looked through once and split by people; a frozen network's maps of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from xcos_ext.backbones import Recogniser
from xcos_ext.evaluation.datasets import read_pairs
from xcos_ext.faces import PersonFolder
from xcos_ext.faces.pictures import decode_with_mode
from xcos_ext.io.atomic import local_path, write_atomically
from xcos_ext.io.errors import PictureError, XCosError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.io.optional import need
from xcos_ext.io.several import several
from xcos_ext.io.text import few

__all__ = [
    "Maps",
    "Pictures",
    "cached_maps",
    "file_lock",
    "normalised",
    "people_of_folds",
    "people_of_share",
    "read_pictures",
]

_BATCH = 64  # pictures of a forward pass


@dataclass
class Pictures:
    """Aligned pictures of people, all of one size.

    Attributes:
        images: uint8 RGB [N, 3, H, W].
        people: int64 [N], numbers of the people, from 0, in the order of ``names``.
        names: the people.
        keys: N names of pictures.
        oddities: kind of oddity -> keys of the pictures, or names of the people, that have it.
        fingerprint: of names and pixels, 16 hex digits.
    """

    images: Tensor
    people: Tensor
    names: tuple[str, ...]
    keys: tuple[str, ...]
    oddities: dict[str, list[str]] = field(default_factory=dict)
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    def report(self) -> list[str]:
        """One line for each kind of oddity."""
        return [f"{len(found)} {kind}: {few(found, 5)}" for kind, found in self.oddities.items()]

    def of_people(self, chosen: Iterable[str]) -> Tensor:
        """Indices of the pictures of some people, int64, ascending."""
        wanted = set(several(chosen, "chosen"))
        keep = torch.tensor([name in wanted for name in self.names], dtype=torch.bool)
        return torch.nonzero(keep[self.people]).flatten()


def read_pictures(
    path: str | os.PathLike[str],
    size: tuple[int, int] = (112, 112),
    *,
    chosen: Callable[[str], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pictures:
    """Read all pictures of a folder or zip archive ``<person>/<picture>`` into memory.

    Whatever is wrong with a picture is found here, not in the middle of a training: pictures that cannot be decoded,
    are smaller than half the wanted size, or are the same file as an earlier one are left out and reported; those of
    another size, grey or CMYK are converted and reported. So is what is no picture, or in no person's folder.

    Args:
        path: aligned crops.
        size: (height, width) that the network expects.
        chosen: which people to read; None: all.
        progress: called with pictures done and pictures in all.

    Returns:
        :class:`Pictures`, sorted by person and file name.

    Raises:
        PictureError: no such folder, or no usable picture in it.
    """
    image = need("PIL.Image", "reading pictures")
    try:
        folder = PersonFolder(path)
    except (OSError, ValueError) as error:
        raise PictureError(str(error)) from error
    height, width = size
    oddities: dict[str, list[str]] = {}

    def odd(kind: str, what: str) -> None:
        oddities.setdefault(kind, []).append(what)

    for left, why in folder.left_out.items():
        odd(f"left out, {why}", left)
    names = [name for name in folder.people if chosen is None or chosen(name)]
    found = [(name, key) for name in names for key in folder.of(name)]
    images = np.empty((len(found), height, width, 3), np.uint8)
    kept: list[tuple[str, str]] = []
    seen: dict[bytes, str] = {}
    digest = hashlib.sha256(f"{height}x{width}".encode())
    for done, (name, key) in enumerate(found, 1):
        try:
            contents = folder.contents(key)
            rgb, mode = decode_with_mode(contents, key)
        except PictureError:
            odd("left out, cannot be decoded", key)
            continue
        h, w = rgb.shape[:2]
        own = hashlib.sha256(contents).digest()
        if 2 * h < height or 2 * w < width:
            odd("left out, smaller than half the wanted size", key)
        elif own in seen:
            odd("left out, the same file as another picture", f"{key} (as {seen[own]})")
        else:
            seen[own] = key
            if (h, w) != (height, width):
                odd("resized", f"{key} ({w}x{h})")
                rgb = np.asarray(image.fromarray(rgb).resize((width, height), image.Resampling.BILINEAR))
            if mode in ("L", "1", "LA", "La", "F") or mode.startswith("I"):
                odd("grey, made RGB", key)
            elif mode == "CMYK":
                odd("CMYK, made RGB", key)
            images[len(kept)] = rgb
            digest.update(f"|{key}|".encode() + hashlib.sha256(images[len(kept)]).digest())
            kept.append((name, key))
        if progress is not None:
            progress(done, len(found))
    if not kept:
        raise PictureError(f"{folder.path}: expected usable pictures, got none among {len(found)}")
    people, keys = zip(*kept, strict=True)
    present, numbers, counts = np.unique(people, return_inverse=True, return_counts=True)
    for name in present[counts == 1]:
        odd("people with one picture, used in impostor pairs only", str(name))
    return Pictures(
        images=torch.from_numpy(np.ascontiguousarray(images[: len(kept)].transpose(0, 3, 1, 2))),
        people=torch.from_numpy(numbers),
        names=tuple(present.tolist()),
        keys=keys,
        oddities=oddities,
        fingerprint=digest.hexdigest()[:16],
    )


# --- splits by people


def people_of_share(names: Sequence[str], share: float) -> set[str]:
    """About a share of the people, chosen by their names alone: who else is there does not matter.

    >>> sorted(people_of_share(["Ann", "Bob", "Cid", "Dan"], 0.5))
    ['Ann', 'Bob']
    """

    def position(name: str) -> float:
        return int.from_bytes(hashlib.sha256(f"0|{name}".encode()).digest()[:8], "big") / 2**64

    return {name for name in several(names, "names") if position(name) < share}


def people_of_folds(pairs: str | os.PathLike[str], folds: Sequence[int]) -> set[str]:
    """People in the pairs of some folds (numbered from 1) of an LFW pairs file.

    Raises:
        XCosError: a missing or malformed file, or an unknown fold.
    """
    several(folds, "folds", "numbers")
    try:
        rows = read_pairs(pairs)
    except (OSError, ValueError) as error:
        raise XCosError(f"data.pairs: {error}") from error
    known = {row.fold + 1 for row in rows}
    if not set(folds) <= known:
        raise XCosError(f"data.folds: expected some of {sorted(known)}, got {sorted(folds)}")
    return {person for row in rows if row.fold + 1 in folds for person in (row.person_a, row.person_b)}


# --- maps of a frozen network, computed once and kept on disk


def file_lock(folder: Path) -> FileLock:
    """A lock of a folder between processes and threads: what one of them computes, the others then find."""
    local_path(folder).mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock")


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
        progress: called with pictures done and pictures in all.

    Raises:
        XCosError: the folder cannot be written.
    """
    if recogniser.training:
        raise ValueError("recogniser: expected evaluation mode, got training mode")
    views, count = 2 if flipped else 1, len(pictures)
    stem = f"{fingerprint_weights(recogniser)}-{pictures.fingerprint}-{views}"
    maps, embeddings = folder / f"{stem}.maps.npy", folder / f"{stem}.embeddings.npy"

    def compute(file: BinaryIO) -> None:
        shape = (views, count, *recogniser.grid_shape)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        made = []
        for view in range(views):
            for start in range(0, count, _BATCH):
                images = pictures.images[start : start + _BATCH]
                grid = recogniser.grid(normalised(recogniser, images.flip(3) if view else images))
                file.write(grid.half().numpy().tobytes())
                if recogniser.embedding_size is not None:
                    made.append(F.normalize(recogniser.embed(grid).float()))
                if progress is not None:
                    progress(view * count + start + len(grid), views * count)
        if made:  # before the maps get their name, which says that both are there
            whole = torch.cat(made).view(views, count, -1).numpy()
            write_atomically(embeddings, lambda stream: np.save(stream, whole))

    try:
        if not maps.is_file():  # a folder that is complete need not be writable
            with file_lock(folder):
                if not maps.is_file():
                    write_atomically(maps, compute)
    except OSError as error:
        raise XCosError(f"{folder}: maps cannot be written: {error.strerror or error}") from error
    return Maps(
        torch.from_numpy(np.load(maps, mmap_mode="c")),  # copy-on-write: torch wants writable memory
        torch.from_numpy(np.load(embeddings)) if embeddings.is_file() else None,
    )
