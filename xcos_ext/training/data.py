"""Data for training: pictures looked through once and split by people; a frozen network's maps of them."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from xcos_ext.backbones import Recogniser
from xcos_ext.evaluation.datasets import Pair, read_pairs
from xcos_ext.faces import PersonFolder
from xcos_ext.io.errors import PictureError, XCosError
from xcos_ext.io.fingerprint import fingerprint_weights

__all__ = [
    "Maps",
    "Pictures",
    "cached_maps",
    "file_lock",
    "normalised",
    "pairs_of_file",
    "people_of_folds",
    "people_of_list",
    "people_of_share",
    "read_pictures",
]

_NAMED = 5  # pictures named in a report before "..."


@dataclass
class Pictures:
    """Aligned pictures of people, all of one size.

    Attributes:
        images: uint8 RGB [N, 3, H, W].
        people: int64 [N], numbers of the people, from 0, in the order of ``names``.
        names: the people.
        keys: N names of pictures.
        oddities: kind of oddity -> keys of the pictures, or names of the people, that have it.
        fingerprint: of names and contents, 16 hex digits.
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
        return [
            f"{len(found)} {kind}: {', '.join(found[:_NAMED])}{', ...' if len(found) > _NAMED else ''}"
            for kind, found in self.oddities.items()
            if found
        ]

    def of_people(self, chosen: Iterable[str]) -> Tensor:
        """Indices of the pictures of some people, int64, ascending."""
        wanted = set(chosen)
        keep = torch.tensor([name in wanted for name in self.names], dtype=torch.bool)
        return torch.nonzero(keep[self.people]).flatten()


# Kinds of oddities; the first three are left out.
_BROKEN = "left out, cannot be decoded"
_TINY = "left out, smaller than half the wanted size"
_TWICE = "left out, the same file as another picture"
_RESIZED = "resized"
_GREY = "grey, made RGB"
_CMYK = "CMYK, made RGB"
_SINGLE = "people with one picture, used in impostor pairs only"
_KINDS = (_BROKEN, _TINY, _TWICE, _RESIZED, _GREY, _CMYK, _SINGLE)


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
    another size, grey or CMYK are converted and reported.

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
    from PIL import Image

    try:
        folder = PersonFolder(path)
    except (OSError, ValueError) as error:
        raise PictureError(str(error)) from error
    height, width = size
    oddities: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    names = [name for name in folder.people if chosen is None or chosen(name)]
    keys = [(name, key) for name in names for key in folder.of(name)]
    images = np.empty((len(keys), height, width, 3), np.uint8)
    kept: list[tuple[str, str]] = []
    seen: dict[bytes, str] = {}
    digest = hashlib.sha256(f"{height}x{width}".encode())
    for done, (name, key) in enumerate(keys, 1):
        try:
            contents = folder.contents(key)
            with Image.open(io.BytesIO(contents)) as picture:
                mode, (w, h) = picture.mode, picture.size
                rgb = picture.convert("RGB")
        except (OSError, SyntaxError, ValueError, zipfile.BadZipFile, Image.DecompressionBombError):
            oddities[_BROKEN].append(key)
            continue
        own = hashlib.sha256(contents).digest()
        if 2 * h < height or 2 * w < width:
            oddities[_TINY].append(key)
        elif own in seen:
            oddities[_TWICE].append(f"{key} (as {seen[own]})")
        else:
            seen[own] = key
            if (h, w) != (height, width):
                oddities[_RESIZED].append(f"{key} ({w}x{h})")
                rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
            if mode in ("L", "1", "LA", "I", "I;16", "F"):
                oddities[_GREY].append(key)
            elif mode == "CMYK":
                oddities[_CMYK].append(key)
            images[len(kept)] = np.asarray(rgb)
            kept.append((name, key))
            digest.update(f"|{key}|".encode() + own)
        if progress is not None:
            progress(done, len(keys))
    if not kept:
        raise PictureError(f"{folder.path}: expected usable pictures, got none among {len(keys)}")
    present = tuple(dict.fromkeys(name for name, _ in kept))
    numbers = {name: number for number, name in enumerate(present)}
    counts = Counter(name for name, _ in kept)
    oddities[_SINGLE] = [name for name in present if counts[name] == 1]
    return Pictures(
        images=torch.from_numpy(np.ascontiguousarray(images[: len(kept)].transpose(0, 3, 1, 2))),
        people=torch.tensor([numbers[name] for name, _ in kept], dtype=torch.int64),
        names=present,
        keys=tuple(key for _, key in kept),
        oddities={kind: found for kind, found in oddities.items() if found},
        fingerprint=digest.hexdigest()[:16],
    )


# --- splits by people


def people_of_share(names: Sequence[str], share: float, seed: int = 0) -> set[str]:
    """About a share of the people, chosen by their names alone: who else is there does not matter."""

    def position(name: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:8], "big") / 2**64

    return {name for name in names if position(name) < share}


def pairs_of_file(path: str | os.PathLike[str]) -> list[Pair]:
    """Pairs of an LFW pairs file, for an experiment's ``data.pairs``.

    Raises:
        XCosError: a missing or malformed file.
    """
    try:
        return read_pairs(path)
    except (OSError, ValueError) as error:
        raise XCosError(f"data.pairs: {error}") from error


def people_of_folds(pairs: str | os.PathLike[str], folds: Sequence[int]) -> set[str]:
    """People in the pairs of some folds (numbered from 1) of an LFW pairs file.

    Raises:
        XCosError: a missing or malformed file, or an unknown fold.
    """
    rows = pairs_of_file(pairs)
    known = {row.fold + 1 for row in rows}
    if not set(folds) <= known:
        raise XCosError(f"data.folds: expected some of {sorted(known)}, got {sorted(folds)}")
    return {person for row in rows if row.fold + 1 in set(folds) for person in (row.person_a, row.person_b)}


def people_of_list(path: str | os.PathLike[str]) -> set[str]:
    """People named in a text file, one a line.

    Raises:
        XCosError: it cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise XCosError(f"{path}: cannot be read as a list of people ({error})") from error
    return {line.strip() for line in lines if line.strip()}


# --- maps of a frozen network, computed once and kept on disk


def file_lock(folder: Path) -> FileLock:
    """A lock of a folder between processes and threads: what one of them computes, the others then find."""
    folder.mkdir(parents=True, exist_ok=True)
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
        with file_lock(folder):
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
    temporaries = [file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in files]
    recogniser.to(device)
    embeddings = []
    try:
        shape = (views, count, *recogniser.grid_shape)
        grids = np.lib.format.open_memmap(temporaries[0], mode="w+", dtype=np.float16, shape=shape)
        for view in range(views):
            for start in range(0, count, batch_size):
                images = pictures.images[start : start + batch_size].to(device)
                grid = recogniser.grid(normalised(recogniser, images.flip(3) if view else images))
                grids[view, start : start + len(grid)] = grid.half().cpu().numpy()
                if recogniser.embedding_size is not None:
                    embeddings.append(F.normalize(recogniser.embed(grid).float()).cpu())
                if progress is not None:
                    progress(view * count + start + len(grid), total)
        grids.flush()
        if embeddings:
            with temporaries[1].open("wb") as stream:
                np.save(stream, torch.cat(embeddings).view(views, count, -1).numpy())
            os.replace(temporaries[1], files[1])
        os.replace(temporaries[0], files[0])  # last: it says that the others are there
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
