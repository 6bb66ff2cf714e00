"""Pairs listed in a CSV file."""

from __future__ import annotations

import csv
import os
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from xcos_ext.faces.folders import PictureTree
from xcos_ext.io.text import few

from .pairs import PairList

__all__ = ["CSVPairs"]

_GENUINE = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class CSVPairs(PairList):
    """Pairs from a CSV file with a header: columns ``a``, ``b``, ``genuine`` (or ``same``) and, optionally, ``fold``.

    ``a`` and ``b`` are paths from the root (or from the only folder in it), ``genuine`` is 1 or 0 (also true, yes,
    false, no), ``fold`` an integer. Other columns are ignored. Where every pair is genuine exactly if both pictures
    lie in the same folder, a picture's folder is taken for its person.

    Args:
        root: folder or zip archive that the paths start from.
        path: the CSV file.

    Raises:
        FileNotFoundError: a path is missing.
        ValueError: a line that does not fit (the message names file and line), or pictures that are not there.
    """

    format = "csv"

    def __init__(self, root: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        self.pictures = PictureTree(root)
        file = Path(path)
        named: list[tuple[str, str]] = []
        genuine: list[bool] = []
        folds: list[int] = []
        missing: list[str] = []

        def key(written: str) -> str:
            found = self.pictures.find(written)
            if found is None:
                missing.append(written)
                return ""
            return found

        try:
            with file.open(encoding="utf-8-sig", newline="") as stream:
                rows = csv.DictReader(stream)
                columns = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
                kind = columns.get("genuine", columns.get("same"))
                if not {"a", "b"} <= set(columns) or kind is None:
                    got = ", ".join(map(repr, rows.fieldnames or ())) or "nothing"
                    raise ValueError(f"{file}, line 1: expected a header with the columns a, b and genuine, got {got}")
                for row in rows:
                    where = f"{file}, line {rows.line_num}"
                    a, b = (str(row[columns[name]] or "").strip() for name in ("a", "b"))
                    label = str(row[kind] or "").strip()
                    if not a or not b or label.lower() not in _GENUINE:
                        raise ValueError(
                            f"{where}: expected two pictures and genuine 1 or 0, got {a!r}, {b!r}, {label!r}"
                        )
                    if "fold" in columns:
                        try:
                            folds.append(int(row[columns["fold"]]))
                        except (TypeError, ValueError) as error:
                            raise ValueError(
                                f"{where}: fold: expected an integer, got {row[columns['fold']]!r}"
                            ) from error
                    named.append((key(a), key(b)))
                    genuine.append(_GENUINE[label.lower()])
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not a text file ({error.reason})") from error
        except csv.Error as error:
            raise ValueError(f"{file}: not a CSV file ({error})") from error
        if missing:
            raise ValueError(f"{file}: {len(missing)} pictures are not in {self.pictures.path}: {few(missing, 3)}")
        if not named:
            raise ValueError(f"{file}: no pairs in it")
        folders = all((_folder(a) == _folder(b)) == same for (a, b), same in zip(named, genuine, strict=True))
        super().__init__(named, genuine, folds or None, _folder if folders else None)

    def read(self, key: str) -> NDArray[np.uint8]:
        """As :meth:`PairList.read`."""
        return self.pictures.read(key)


def _folder(name: str) -> str:
    return str(PurePosixPath(name).parent)
