"""Lists of pairs in CSV files, and the pictures that they name."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from xcos_ext.faces import MAX_PIXELS, PictureTree, decode_picture, read_picture
from xcos_ext.faces.pictures import is_system_file, named_as_picture
from xcos_ext.io.errors import PictureError, XCosError
from xcos_ext.io.tables import csv_rows
from xcos_ext.io.text import composed, printable

__all__ = ["PairsFile", "PairsFileError", "ReportPair", "pictures_below"]

# With a point as programs write whole numbers beside empty cells.
_GENUINE = dict.fromkeys(("1", "1.0", "true", "yes"), True) | dict.fromkeys(("0", "0.0", "false", "no"), False)


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

    ``genuine`` is 1 or 0 (also 1.0, true, yes, 0.0, false, no), or empty where it is not known. The other columns are
    shown on the page. It is read as :func:`~xcos_ext.io.tables.csv_rows` does, also as spreadsheets write it, once to
    check it, and again whenever it is iterated; it is never held in memory.

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
        rows = csv_rows(self._place, PairsFileError, name=self._name)
        line, header = next(rows)
        places = self._places(header, line)
        for line, row in rows:
            yield self._pair(row, header, places, line)

    def _places(self, header: list[str], line: int) -> tuple[int, int, int | None]:
        lower = [column.lower() for column in header]
        doubled = [column for column, count in Counter(lower).items() if column and count > 1]
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
        a, b = row[places[0]], row[places[1]]
        if not a or not b:
            raise PairsFileError(f"{where}: expected two pictures, got {a!r} and {b!r}")
        genuine = None
        if places[2] is not None:
            said = row[places[2]].lower()
            if said and said not in _GENUINE:
                raise PairsFileError(f"{where}: {header[places[2]]}: expected 1, 0 or nothing, got {said!r}")
            genuine = _GENUINE.get(said)
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
        entries = [entry for entry in os.scandir(folder) if not is_system_file(entry.name)]
        tops = [entry for entry in entries if entry.is_dir() or named_as_picture(entry.name)]
        inner = folder / tops[0].name if len(tops) == 1 and tops[0].is_dir() else folder
        return partial(_from_folder, folder, inner, limit)
    name = printable(str(root))
    try:
        tree = PictureTree(root)
    except (OSError, ValueError) as error:
        raise PictureError(f"{name}: expected a folder or a zip archive with the pictures ({error})") from error
    return partial(_from_archive, tree, name, limit)


def _from_folder(folder: Path, inner: Path, limit: int, path: str) -> np.ndarray:
    # As in an archive, which is looked through as a whole: names that look the same are the same.
    spellings = [path, path.replace("\\", "/"), composed(path), unicodedata.normalize("NFD", path)]
    places = [start / spelling for spelling in spellings for start in (folder, inner)]
    place = next((place for place in places if os.path.lexists(place)), places[0])
    # A page that goes elsewhere need not tell where the pictures lay here.
    return read_picture(place, max_pixels=limit, name=printable(path))


def _from_archive(tree: PictureTree, name: str, limit: int, path: str) -> np.ndarray:
    key = tree.find(path)
    if key is None:
        raise PictureError(f"{path}: not in {name}")
    return decode_picture(tree.contents(key, max_pixels=limit), printable(path), max_pixels=limit)
