"""Celebrities in Frontal-Profile in the Wild: its frontal-frontal and frontal-profile pairs."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from xcos_ext.faces.folders import PictureTree
from xcos_ext.io.text import few

from .pairs import PairList

__all__ = ["CFP"]

# Split folder -> the lists that the first and the second number of a line point into.
_LISTS = {"FF": ("F", "F"), "FP": ("F", "P")}


class CFP(PairList):
    """The CFP protocol as it is distributed.

    ``Protocol/Split/FF`` (or ``FP``) has a folder per fold with ``same.txt`` and ``diff.txt``, lines ``i,j``;
    ``Protocol/Pair_list_F.txt`` and ``Pair_list_P.txt`` say which picture has which number:
    ``17 ../Data/Images/002/frontal/07.jpg``. The person is the folder above ``frontal`` and ``profile``.

    Args:
        root: folder or zip archive that holds ``Data/Images``; paths start there.
        split: the folder ``FF`` or ``FP``.

    Raises:
        FileNotFoundError: a path is missing.
        ValueError: another folder, a line that does not fit, or pictures that are not there.
    """

    format = "cfp"

    def __init__(self, root: str | os.PathLike[str], split: str | os.PathLike[str]) -> None:
        folder = Path(split)
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder")
        kind = folder.resolve().name.upper()
        if kind not in _LISTS or not folder.is_dir():
            raise ValueError(f"{folder}: expected CFP's folder Split/FF or Split/FP")
        self.pictures = PictureTree(root)
        missing: list[str] = []
        lists = {name: self._list(folder / f"../../Pair_list_{name}.txt", missing) for name in set(_LISTS[kind])}
        if missing:
            raise ValueError(f"{folder}: {len(missing)} pictures are not in {self.pictures.path}: {few(missing, 3)}")
        first, second = (lists[name] for name in _LISTS[kind])
        named: list[tuple[str, str]] = []
        genuine: list[bool] = []
        folds: list[int] = []
        parts = sorted(part for part in folder.iterdir() if part.is_dir())
        if not parts:
            raise ValueError(f"{folder}: expected a folder per fold (01, 02, ...) with same.txt and diff.txt")
        for fold, part in enumerate(parts):
            for name, same in (("same.txt", True), ("diff.txt", False)):
                for number, line in _lines(part / name):
                    try:
                        a, b = (int(field) for field in line.split(","))
                        named.append((first[a], second[b]))
                    except (KeyError, ValueError) as error:
                        raise ValueError(
                            f"{part / name}, line {number}: expected two numbers of the pair lists, got {line!r}"
                        ) from error
                    genuine.append(same)
                    folds.append(fold)
        super().__init__(named, genuine, folds, lambda key: PurePosixPath(key).parts[-3])

    def _list(self, file: Path, missing: list[str]) -> dict[int, str]:
        found: dict[int, str] = {}
        for line_number, line in _lines(file):
            try:
                number, path = line.split(maxsplit=1)
                index = int(number)
            except ValueError as error:
                raise ValueError(f"{file}, line {line_number}: expected 'number path', got {line!r}") from error
            inside = path.replace("\\", "/")
            while inside.startswith("../"):
                inside = inside[3:]
            name = self.pictures.find(inside)
            if name is None or len(PurePosixPath(name).parts) < 3:
                missing.append(inside)
            else:
                found[index] = name
        return found

    def read(self, key: str) -> NDArray[np.uint8]:
        """As :meth:`PairList.read`."""
        return self.pictures.read(key)


def _lines(file: Path) -> list[tuple[int, str]]:
    """Numbered lines with something on them."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file ({error.reason})") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
