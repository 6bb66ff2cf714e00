"""Labeled Faces in the Wild: the pairs of its View 2 and the pictures that they name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xcos_ext.faces.folders import PersonFolder
from xcos_ext.io.text import few

from .pairs import PairList

__all__ = ["LFW", "Pair", "read_pairs"]


class Pair(NamedTuple):
    """One comparison of the protocol; pictures are named by person and number (from 1)."""

    person_a: str
    number_a: int
    person_b: str
    number_b: int
    genuine: bool
    fold: int


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Read a pairs file in LFW's format.

    The first line gives the number of folds and the number of pairs per kind; then every fold lists its
    genuine pairs (``person number number``) and its impostor pairs (``person number person number``),
    separated by tabs or blanks.

    Returns:
        Pairs in file order, folds numbered from 0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that does not fit; the message names file and line.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file ({error.reason})") from error
    rows = [(number, line.split("\t") if "\t" in line else line.split()) for number, line in enumerate(lines, 1)]
    rows = [(number, fields) for number, fields in rows if any(fields)]
    try:
        (_, header), body = rows[0], rows[1:]
        folds, per_kind = (1, int(header[0])) if len(header) == 1 else (int(header[0]), int(header[1]))
        if folds < 1 or per_kind < 1:
            raise ValueError
    except (IndexError, ValueError) as error:
        first = " ".join(rows[0][1]) if rows else "nothing"
        raise ValueError(f"{file}, line 1: expected '<folds> <pairs per kind>', got {first!r}") from error
    if len(body) != 2 * folds * per_kind:
        raise ValueError(
            f"{file}: expected {2 * folds * per_kind} pairs ({folds} folds of {per_kind} genuine and "
            f"{per_kind} impostor pairs), got {len(body)}"
        )
    pairs: list[Pair] = []
    for index, (number, fields) in enumerate(body):
        fold, within = divmod(index, 2 * per_kind)
        genuine = within < per_kind
        try:
            if genuine:
                person, first_number, second_number = fields
                pair = Pair(person, int(first_number), person, int(second_number), True, fold)
            else:
                person_a, number_a, person_b, number_b = fields
                pair = Pair(person_a, int(number_a), person_b, int(number_b), False, fold)
        except ValueError as error:
            expected = "person number number" if genuine else "person number person number"
            raise ValueError(f"{file}, line {number}: expected '{expected}', got {' '.join(fields)!r}") from error
        pairs.append(pair)
    return pairs


class LFW(PairList):
    """The LFW verification protocol: View 2, or sub-sets of it.

    Args:
        pictures: folder or zip archive of ``<person>/<person>_NNNN.<suffix>``.
        pairs: pairs file, see :func:`read_pairs`.
        folds: use only these folds (numbered from 0), or all.

    Attributes:
        pictures: the pictures.
        pairs: the pairs used; the other attributes are those of :class:`PairList`.

    Raises:
        FileNotFoundError: a path is missing.
        ValueError: a malformed pairs file, an unknown fold, or pairs that name pictures that are not there.
    """

    format = "lfw"

    def __init__(
        self,
        pictures: str | os.PathLike[str],
        pairs: str | os.PathLike[str],
        *,
        folds: Sequence[int] | None = None,
    ) -> None:
        self.pictures = PersonFolder(pictures)
        everything = read_pairs(pairs)
        known = {pair.fold for pair in everything}
        if folds is not None and not set(folds) <= known:
            raise ValueError(f"folds: expected some of {sorted(known)}, got {sorted(folds)}")
        self.pairs = [pair for pair in everything if folds is None or pair.fold in set(folds)]
        self._paired = {person for pair in everything for person in (pair.person_a, pair.person_b)}
        missing: list[str] = []

        def key(person: str, number: int) -> str:
            found = self.pictures.numbered(person, number)
            if found is None:
                missing.append(f"{person}_{number:04d}")
                return ""
            return found

        named = [(key(p.person_a, p.number_a), key(p.person_b, p.number_b)) for p in self.pairs]
        if missing:
            raise ValueError(f"{pairs}: {len(missing)} pictures are not in {self.pictures.path}: {few(missing, 3)}")
        super().__init__(
            named,
            [pair.genuine for pair in self.pairs],
            [pair.fold for pair in self.pairs],
            lambda key: key.split("/", 1)[0],
        )

    def read(self, key: str) -> NDArray[np.uint8]:
        """As :meth:`PairList.read`."""
        return self.pictures.read(key)

    def people_in_no_pair(self) -> tuple[str, ...]:
        """People with pictures here who appear in no pair of the file, in any fold; sorted.

        Whatever is estimated from their pictures (means, axes, thresholds) is independent of the protocol's
        figures.
        """
        return tuple(person for person in self.pictures.people if person not in self._paired)
