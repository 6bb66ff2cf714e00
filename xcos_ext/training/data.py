"""Pictures for training: looked through once, kept as one array, split by people, drawn in pairs or by person."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xcos_ext.evaluation.datasets import Pair, read_pairs
from xcos_ext.faces import PersonFolder
from xcos_ext.io.errors import PictureError, XCosError

from .settings import ConfigError

__all__ = [
    "IdentityBatches",
    "PairBatches",
    "Pictures",
    "hardest_impostors",
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
    except OSError as error:
        raise XCosError(f"data.pairs: {path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
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


# --- drawing


def _members(people: Tensor, indices: Tensor) -> list[Tensor]:
    """The chosen pictures of each of their people, by person."""
    ordered = indices[people[indices].argsort(stable=True)]
    return list(ordered.split(people[ordered].unique_consecutive(return_counts=True)[1].tolist()))


def _integers(count: int, below: Tensor | int, generator: torch.Generator) -> Tensor:
    """Uniform int64 [count] below a bound, or below each of ``count`` bounds."""
    uniform = torch.rand(count, dtype=torch.float64, generator=generator)
    bound = torch.as_tensor(below)
    return (uniform * bound).long().clamp_max(bound - 1)


class Pairs(NamedTuple):
    """Attributes: pictures of both sides int64 [n], and whether both are of one person, bool [n]."""

    first: Tensor
    second: Tensor
    genuine: Tensor


class PairBatches:
    """Pairs of pictures, half of them genuine.

    Genuine pairs: a person with two pictures or more, all such people alike, and two different pictures. Impostor
    pairs: two people, all people alike, and a picture of each; or, for a share of them, a picture and one of the most
    similar pictures of other people.

    Args:
        people: int64 [N], whose each picture is.
        indices: the pictures to draw from.
        hardest: int64 [len(indices), k] from :func:`hardest_impostors`, or None.
        hard_share: share of the impostor pairs drawn from ``hardest``.

    Raises:
        XCosError: fewer than two people, or nobody with two pictures.
    """

    def __init__(self, people: Tensor, indices: Tensor, hardest: Tensor | None = None, hard_share: float = 0.5) -> None:
        self.members = _members(people, indices)
        self.several = [own for own in self.members if len(own) > 1]
        if len(self.members) < 2 or not self.several:
            raise XCosError(
                f"data: expected at least two people, one of them with two pictures, got {len(self.members)} people, "
                f"{len(self.several)} with two pictures"
            )
        self.indices, self.hardest, self.hard_share = indices, hardest, hard_share

    def draw(self, generator: torch.Generator, count: int) -> Pairs:
        """``count`` pairs: genuine and impostor in turns."""
        genuine = (count + 1) // 2
        first = torch.empty(count, dtype=torch.int64)
        second = torch.empty(count, dtype=torch.int64)
        chosen = _integers(genuine, len(self.several), generator)
        own = [self.several[int(i)] for i in chosen]
        sizes = torch.tensor([len(pictures) for pictures in own])
        a = _integers(genuine, sizes, generator)
        b = (a + 1 + _integers(genuine, sizes - 1, generator)) % sizes
        first[0::2] = torch.stack([pictures[i] for pictures, i in zip(own, a, strict=True)])
        second[0::2] = torch.stack([pictures[i] for pictures, i in zip(own, b, strict=True)])
        impostors = count - genuine
        if impostors:
            first[1::2], second[1::2] = self._impostors(generator, impostors)
        return Pairs(first, second, torch.arange(count) % 2 == 0)

    def _impostors(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        people = len(self.members)
        a = _integers(count, people, generator)
        b = (a + 1 + _integers(count, people - 1, generator)) % people
        sides = []
        for side in (a, b):
            own = [self.members[int(i)] for i in side]
            picks = _integers(count, torch.tensor([len(pictures) for pictures in own]), generator)
            sides.append(torch.stack([pictures[i] for pictures, i in zip(own, picks, strict=True)]))
        if self.hardest is not None:
            hard = torch.rand(count, generator=generator) < self.hard_share
            row = _integers(count, len(self.indices), generator)
            column = _integers(count, self.hardest.shape[1], generator)
            sides[0] = torch.where(hard, self.indices[row], sides[0])
            sides[1] = torch.where(hard, self.hardest[row, column], sides[1])
        return sides[0], sides[1]


class IdentityBatches:
    """P people with K different pictures each, for losses over all pairs; optionally single faces of other people.

    Args:
        people: int64 [N], whose each picture is.
        indices: the pictures to draw from.
        count: P.
        pictures: K.
        others: further faces, of people with fewer than K pictures: impostors only.

    Raises:
        ConfigError: fewer than P people have K pictures, P or K is below 2, or too few others.
    """

    def __init__(self, people: Tensor, indices: Tensor, count: int, pictures: int, others: int = 0) -> None:
        if count < 2 or pictures < 2:
            raise ConfigError(f"batches: expected at least 2 people with 2 pictures each, got {count} with {pictures}")
        members = _members(people, indices)
        self.members = [own for own in members if len(own) >= pictures]
        self.rest = [own for own in members if len(own) < pictures]
        self.count, self.pictures, self.others = count, pictures, others
        if len(self.members) < count:
            raise ConfigError(
                f"batches: expected at least {count} people with {pictures} pictures or more to train on, "
                f"got {len(self.members)}"
            )
        if len(self.rest) < others:
            raise ConfigError(f"batches: expected {others} people with fewer pictures, got {len(self.rest)}")

    def __len__(self) -> int:
        """Faces in a batch."""
        return self.count * self.pictures + self.others

    def draw(self, generator: torch.Generator) -> Tensor:
        """Indices of pictures [P * K + others], a person's own side by side."""
        people = torch.randperm(len(self.members), generator=generator)[: self.count]
        chosen = [self.members[int(person)] for person in people]
        drawn = [own[torch.randperm(len(own), generator=generator)[: self.pictures]] for own in chosen]
        for person in torch.randperm(len(self.rest), generator=generator)[: self.others] if self.others else ():
            own = self.rest[int(person)]
            drawn.append(own[_integers(1, len(own), generator)])
        return torch.cat(drawn)


@torch.no_grad()
def hardest_impostors(embeddings: Tensor, people: Tensor, indices: Tensor, k: int) -> Tensor:
    """For each chosen picture the ``k`` most similar chosen pictures of other people.

    Args:
        embeddings: [N, D] at unit length, e.g. the teacher's.
        people: int64 [N].
        indices: the chosen pictures, n of them.
        k: at most the number of pictures of other people.

    Returns:
        Picture indices, int64 [n, k], most similar first.
    """
    own, whose = embeddings[indices], people[indices]
    k = min(k, len(indices) - int(torch.bincount(whose).max()))
    if k < 1:
        raise XCosError("data: expected pictures of at least two people to find hard impostors among")
    found = []
    for start in range(0, len(indices), 1024):
        part = slice(start, start + 1024)
        cosines = own[part] @ own.T
        cosines.masked_fill_(whose[part, None] == whose[None], -torch.inf)
        found.append(indices[cosines.topk(k, 1).indices])
    return torch.cat(found)
