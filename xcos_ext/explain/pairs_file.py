"""Lists of pairs in CSV files, and the pictures that they name."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from xcos_ext.faces import MAX_PIXELS, PictureTree, read_picture
from xcos_ext.io.errors import PictureError, XCosError
from xcos_ext.io.text import printable

__all__ = ["PairsFile", "PairsFileError", "ReportPair", "pictures_below"]

_GENUINE = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": None}


class PairsFileError(XCosError, ValueError):
    """A list of pairs that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class ReportPair:
    """One line of the list.

    Attributes:
        a, b: pictures, as the list names them.
        genuine: whether both show one person; None: not said.
        labels: values of the list's other columns.
        line: of the list, from 1 for its header; 0: no list.
    """

    a: str
    b: str
    genuine: bool | None = None
    labels: tuple[str, ...] = ()
    line: int = 0


class PairsFile:
    """Pairs from a CSV file with a header: columns ``a``, ``b``, optionally ``genuine`` (or ``same``), and any others.

    ``genuine`` is 1 or 0 (also true, yes, false, no), or empty where it is not known. The other columns are shown on
    the page. The file is read through once to check it, and again whenever it is iterated; it is never held in memory.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     print("a,b,genuine", "1.jpg,2.jpg,yes", sep="\\n", file=file, flush=True)
    ...     list(PairsFile(file.name))
    [ReportPair(a='1.jpg', b='2.jpg', genuine=True, labels=(), line=2)]

    Args:
        path: the file, UTF-8.

    Attributes:
        label_names: the other columns.

    Raises:
        PairsFileError: not such a file; the message names the line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._name = printable(self.path)
        self._place = Path(path).absolute()  # it is read again later, wherever os.chdir has gone
        self.label_names: tuple[str, ...] = ()
        self._count = 0
        for _ in self:
            self._count += 1
        if not self._count:
            raise PairsFileError(f"{self._name}: no pairs in it")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ReportPair]:
        name = self._name
        line = 0
        try:
            if not stat.S_ISREG(os.stat(self._place).st_mode):
                raise PairsFileError(f"{name}: expected a CSV file, got something that is not a regular file")
            with open(self._place, encoding="utf-8-sig", newline="") as stream:
                rows = csv.reader(stream, strict=True)
                try:
                    header = [column.strip() for column in next(rows, [])]
                    line = rows.line_num
                    places = self._places(header, max(line, 1))
                    for row in rows:
                        line = rows.line_num
                        if row:
                            yield self._pair(row, header, places, line)
                except csv.Error as error:
                    raise PairsFileError(f"{name}, line {rows.line_num}: not CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise PairsFileError(f"{name}, after line {line}: expected text in UTF-8 ({error.reason})") from error
        except (OSError, ValueError) as error:
            if isinstance(error, PairsFileError):
                raise
            raise PairsFileError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error

    def _places(self, header: list[str], line: int) -> tuple[int, int, int | None]:
        lower = [column.lower() for column in header]
        doubled = sorted({column for column in lower if column and lower.count(column) > 1})
        if "a" not in lower or "b" not in lower or doubled:
            got = ", ".join(repr(column) for column in header) or "nothing"
            raise PairsFileError(
                f"{self._name}, line {line}: expected a header with the columns a and b, each column once, got {got}"
            )
        kind = next((lower.index(column) for column in ("genuine", "same") if column in lower), None)
        places = (lower.index("a"), lower.index("b"), kind)
        self.label_names = tuple(column for i, column in enumerate(header) if i not in places)
        return places

    def _pair(self, row: list[str], header: list[str], places: tuple[int, int, int | None], line: int) -> ReportPair:
        where = f"{self._name}, line {line}"
        if len(row) != len(header):
            raise PairsFileError(f"{where}: expected {len(header)} columns as in the header, got {len(row)}")
        a, b = row[places[0]].strip(), row[places[1]].strip()
        if not a or not b:
            raise PairsFileError(f"{where}: expected two pictures, got {a!r} and {b!r}")
        genuine = None
        if places[2] is not None:
            said = row[places[2]].strip().lower()
            if said not in _GENUINE:
                raise PairsFileError(f"{where}: {header[places[2]]}: expected 1, 0 or nothing, got {said!r}")
            genuine = _GENUINE[said]
        labels = tuple(value for i, value in enumerate(row) if i not in places)
        return ReportPair(a, b, genuine, labels, line)


def pictures_below(root: str | os.PathLike[str], *, max_pixels: int | None = None) -> Callable[[str], np.ndarray]:
    """A reader of pictures by their path below a folder, or in a zip archive.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (4, 3)).save(f"{folder}/a.png")
    ...     pictures_below(folder)("a.png").shape
    (3, 4, 3)

    Args:
        root: the folder or archive. Where it holds one folder and nothing else, paths may start in that.
        max_pixels: larger files are refused; by default :data:`xcos_ext.faces.MAX_PIXELS`.

    Returns:
        A function from a path to uint8 RGB [H, W, 3]; it raises PictureError, may be called from threads, and can be
        pickled.

    Raises:
        PictureError: no such folder or archive.
    """
    folder = Path(root).absolute()
    limit = max_pixels or MAX_PIXELS
    if folder.is_dir():
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        inner = folder / entries[0].name if len(entries) == 1 and entries[0].is_dir() else folder
        return partial(_from_folder, folder, inner, limit)
    name = printable(str(root))
    try:
        tree = PictureTree(root)
    except (OSError, ValueError) as error:
        raise PictureError(f"{name}: expected a folder or a zip archive with the pictures") from error
    return partial(_from_archive, tree, name, limit)


def _from_folder(folder: Path, inner: Path, limit: int, path: str) -> np.ndarray:
    place = folder / path if os.path.lexists(folder / path) else inner / path
    # A page that goes elsewhere need not tell where the pictures lay here.
    return read_picture(place, max_pixels=limit, name=printable(path))


def _from_archive(tree: PictureTree, name: str, limit: int, path: str) -> np.ndarray:
    key = tree.find(path)
    if key is None:
        raise PictureError(f"{path}: not in {name}")
    return tree.read(key, max_pixels=limit)
