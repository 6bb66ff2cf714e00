"""Lists of pairs that name pictures in a folder or archive, and one door to every list."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from xcos_ext.explain.pairs_file import PairsFile
from xcos_ext.faces.folders import PersonFolder, PictureTree
from xcos_ext.io.several import several
from xcos_ext.io.text import composed, few

from .insightface import InsightfaceBin
from .pairs import PairList

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CFP", "FORMATS", "LFW", "CSVPairs", "Pair", "open_pairs", "read_pairs"]

#: Names of the formats, as ``open_pairs(format=...)`` takes them.
FORMATS = ("lfw", "cfp", "bin", "csv")

# CFP's split folder -> the lists that the first and the second number of a line point into.
_CFP_LISTS = {"FF": ("F", "F"), "FP": ("F", "P")}

Name = TypeVar("Name", bound=Hashable)


def _lines(file: Path) -> list[tuple[int, str]]:
    """Numbered lines with something on them; a byte order mark is none of the first."""
    try:
        text = composed(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file ({error.reason})") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _located(
    file: str | Path,
    pictures: PictureTree | PersonFolder,
    names: Iterable[Name],
    find: Callable[[Name], str | None],
    shown: Callable[[Name], str] = str,
) -> dict[Name, str]:
    """The key of every picture that a list names.

    Raises:
        ValueError: some are not there.
    """
    found = {name: find(name) for name in dict.fromkeys(names)}
    missing = [shown(name) for name, key in found.items() if key is None]
    if missing:
        raise ValueError(f"{file}: {len(missing)} pictures are not in {pictures.path}: {few(missing, 3)}")
    return {name: key for name, key in found.items() if key is not None}


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

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "pairs.txt").write_text("1 1\\nAnn 1 2\\nAnn 1 Bob 1")
    ...     read_pairs(Path(folder, "pairs.txt"))[1]
    Pair(person_a='Ann', number_a=1, person_b='Bob', number_b=1, genuine=False, fold=0)

    Returns:
        Pairs in file order, folds numbered from 0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that does not fit; the message names file and line.
    """
    file = Path(path)
    rows = [(number, line.split("\t") if "\t" in line else line.split()) for number, line in _lines(file)]
    try:
        (_, header), body = rows[0], rows[1:]
        folds, per_kind = (1, int(header[0])) if len(header) == 1 else (int(header[0]), int(header[1]))
        if folds < 1 or per_kind < 1:
            raise ValueError
    except (IndexError, ValueError) as error:
        first = " ".join(rows[0][1]) if rows else "nothing"
        raise ValueError(f"{file}, line 1: expected '<folds> <pairs per kind>', got {first!r}") from error
    if body and all(len(fields) < 3 for _, fields in body):
        raise ValueError(f"{file}: expected a list of pairs, got a list of people")
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
            a, number_a, b, number_b = [*fields[:2], *fields[:1], *fields[2:]] if genuine else fields
            pairs.append(Pair(a, int(number_a), b, int(number_b), genuine, fold))
        except ValueError as error:
            expected = "person number number" if genuine else "person number person number"
            raise ValueError(f"{file}, line {number}: expected '{expected}', got {' '.join(fields)!r}") from error
    return pairs


class LFW(PairList):
    """The LFW verification protocol: View 2, or sub-sets of it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for person, number in (("Ann", 1), ("Ann", 2), ("Bob", 1)):
    ...         Path(folder, person).mkdir(exist_ok=True)
    ...         Path(folder, person, f"{person}_{number:04d}.jpg").touch()
    ...     _ = Path(folder, "pairs.txt").write_text("1 1\\nAnn 1 2\\nAnn 1 Bob 1")
    ...     LFW(folder, Path(folder, "pairs.txt")).keys
    ('Ann/Ann_0001.jpg', 'Ann/Ann_0002.jpg', 'Bob/Bob_0001.jpg')

    Args:
        pictures: folder or zip archive of ``<person>/<person>_NNNN.<suffix>``.
        pairs: pairs file, see :func:`read_pairs`.
        folds: use only these folds (numbered from 0), or all.

    Attributes:
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
        several(() if folds is None else folds, "folds", "numbers")
        tree = PersonFolder(pictures)
        everything = read_pairs(pairs)
        known = {pair.fold for pair in everything}
        if folds is not None and not set(folds) <= known:
            raise ValueError(f"folds: expected some of {sorted(known)}, got {sorted(folds)}")
        self.pairs = [pair for pair in everything if folds is None or pair.fold in set(folds)]
        self._paired = {person for pair in everything for person in (pair.person_a, pair.person_b)}
        named = [((p.person_a, p.number_a), (p.person_b, p.number_b)) for p in self.pairs]
        keys = _located(
            os.fspath(pairs),
            tree,
            (side for both in named for side in both),
            lambda side: tree.numbered(*side),
            lambda side: f"{side[0]}_{side[1]:04d}",
        )
        super().__init__(
            [(keys[a], keys[b]) for a, b in named],
            [pair.genuine for pair in self.pairs],
            [pair.fold for pair in self.pairs],
            lambda key: key.split("/", 1)[0],
            pictures=tree,
        )

    def file(self, key: str) -> Path | None:
        """As every list's; person folders may lie deeper."""
        return super().file(self.pictures._names[key])

    def of_folds(self, folds: Sequence[int]) -> Self:
        """:meth:`PairList.of_folds`."""
        part = super().of_folds(folds)
        part.pairs = [pair for pair in self.pairs if pair.fold in set(folds)]
        return part

    def people_in_no_pair(self) -> tuple[str, ...]:
        """People with pictures here who appear in no pair of the file, in any fold; sorted.

        Whatever is estimated from their pictures (means, axes, thresholds) is independent of the protocol's
        figures.
        """
        return tuple(person for person in self.pictures.people if person not in self._paired)


class CFP(PairList):
    """The CFP protocol as it is distributed.

    ``Protocol/Split/FF`` (or ``FP``) has a folder per fold with ``same.txt`` and ``diff.txt``, lines ``i,j``;
    ``Pair_list_F.txt`` and ``Pair_list_P.txt`` (or ``image_list_F.txt`` and ``_P``), in ``Protocol``, ``Split`` or
    beside the folds, say which picture has which number: ``17 ../Data/Images/002/frontal/07.jpg``. Names of lists may
    be in small or capital letters. Folds are numbered as their folders are, 01 being 0. A picture is looked for by
    its path, or else by its last three parts whatever the suffix (aligned crops, another root). The person is the
    folder above ``frontal`` and ``profile``.

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
        if kind not in _CFP_LISTS or not folder.is_dir():
            raise ValueError(f"{folder}: expected CFP's folder Split/FF or Split/FP")
        tree = PictureTree(root)
        numbered = {name: _numbered(_cfp_list(folder, name)) for name in dict.fromkeys(_CFP_LISTS[kind])}
        tails: dict[tuple[str, ...], list[str]] = {}
        for name in tree.names:
            tails.setdefault(_tail(name), []).append(name)

        def find(path: str) -> str | None:
            alike = tails.get(_tail(path), [])
            name = tree.find(path) or (alike[0] if len(alike) == 1 else None)
            return name if name is not None and len(PurePosixPath(name).parts) >= 3 else None

        keys = _located(folder, tree, (path for paths in numbered.values() for path in paths.values()), find)
        first, second = (numbered[name] for name in _CFP_LISTS[kind])
        named: list[tuple[str, str]] = []
        genuine: list[bool] = []
        folds: list[int] = []
        parts = sorted((int(part.name), part) for part in folder.iterdir() if part.is_dir() and part.name.isdecimal())
        if not parts:
            raise ValueError(f"{folder}: expected a folder per fold (01, 02, ...) with same.txt and diff.txt")
        for fold, part in parts:
            for name, same in (("same.txt", True), ("diff.txt", False)):
                file = _in_any_case([part], [name]) or part / name
                for number, line in _lines(file):
                    try:
                        a, b = (int(field) for field in line.replace(",", " ").split())
                        named.append((keys[first[a]], keys[second[b]]))
                    except (KeyError, ValueError) as error:
                        raise ValueError(
                            f"{file}, line {number}: expected two numbers of the pair lists, got {line!r}"
                        ) from error
                    genuine.append(same)
                    folds.append(fold - 1)
        super().__init__(named, genuine, folds, lambda key: PurePosixPath(key).parts[-3], pictures=tree)


def _in_any_case(folders: Iterable[Path], names: Iterable[str]) -> Path | None:
    """The first file of one of these names, in small or capital letters."""
    wanted = {name.lower() for name in names}
    return next((file for folder in folders for file in sorted(folder.iterdir()) if file.name.lower() in wanted), None)


def _cfp_list(split: Path, letter: str) -> Path:
    """The list of frontal or profile pictures that belongs to a split."""
    names = [f"Pair_list_{letter}.txt", f"image_list_{letter}.txt"]
    folder = split.resolve()
    found = _in_any_case((folder.parent.parent, folder.parent, folder), names)
    if found is None:
        raise FileNotFoundError(f"{folder.parent.parent}: expected CFP's {' or '.join(names)} in it, got neither")
    return found


def _tail(path: str) -> tuple[str, ...]:
    """``.../002/frontal/07.jpg`` -> ("002", "frontal", "07")."""
    return tuple(path.lower().rsplit(".", 1)[0].split("/")[-3:])


def _numbered(file: Path) -> dict[int, str]:
    """CFP's number -> path from the root."""
    found: dict[int, str] = {}
    for line_number, line in _lines(file):
        try:
            number, path = re.split(r"[\s,]+", line, maxsplit=1)
            index = int(number)
        except ValueError as error:
            raise ValueError(f"{file}, line {line_number}: expected 'number path', got {line!r}") from error
        found[index] = re.sub(r"^(\.{0,2}/)+", "", path.replace("\\", "/"))
    return found


class CSVPairs(PairList):
    """Pairs from a CSV file with a header: columns ``a``, ``b``, ``genuine`` (or ``same``) and, optionally, ``fold``.

    ``a`` and ``b`` are paths from the root (or from the only folder in it), ``genuine`` is 1 or 0 (also 1.0, true,
    yes, 0.0, false, no), ``fold`` an integer. Other columns are ignored; no row may have more or fewer. Where
    every pair is genuine exactly if both pictures lie in the same folder, a picture's folder is taken for its person.

    Args:
        root: folder or zip archive that the paths start from.
        path: the CSV file.

    Raises:
        FileNotFoundError: no such root.
        ValueError: no such file, a line that does not fit (the message names both), or pictures that are not there.
    """

    format = "csv"

    def __init__(self, root: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        tree, file = PictureTree(root), PairsFile(path)
        labels = [name.lower() for name in file.label_names]
        genuine: list[bool] = []
        folds: list[int] = []
        for pair in file:
            where = f"{file.path}, line {pair.line}"
            if pair.genuine is None:
                raise ValueError(f"{where}: expected 1 or 0 in a column called genuine, got nothing")
            genuine.append(pair.genuine)
            if "fold" in labels:
                written = pair.labels[labels.index("fold")]
                try:
                    folds.append(int(written.removesuffix(".0")))
                except ValueError as error:
                    raise ValueError(f"{where}: fold: expected an integer, got {written!r}") from error
        keys = _located(file.path, tree, (name for pair in file for name in (pair.a, pair.b)), tree.find)
        named = [(keys[pair.a], keys[pair.b]) for pair in file]
        folders = all((_folder(a) == _folder(b)) == same for (a, b), same in zip(named, genuine, strict=True))
        super().__init__(named, genuine, folds or None, _folder if folders else None, pictures=tree)


def _folder(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _detected(path: Path) -> str:
    if path.is_dir():
        return "cfp"
    if path.suffix.lower() == ".bin":
        return "bin"
    with path.open("rb") as stream:
        start = stream.read(4096)
    if start[:1] in (b"\x80", b"("):  # pickles of protocol 2 and up, and of a tuple in protocol 0
        return "bin"
    header = start.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].lower()
    return "csv" if b"," in header or b";" in header else "lfw"


def open_pairs(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, *, format: str | None = None
) -> PairList:
    """Read a list of pairs.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("Ann/1", "Ann/2", "Bob/1"):
    ...         Path(folder, name).parent.mkdir(exist_ok=True)
    ...         Path(folder, f"{name}.png").touch()
    ...     _ = Path(folder, "list.csv").write_text("a,b,genuine\\nAnn/1.png,Ann/2.png,1\\nAnn/1.png,Bob/1.png,0")
    ...     pairs = open_pairs(Path(folder, "list.csv"), folder)
    >>> pairs.format, pairs.genuine.tolist(), pairs.people
    ('csv', [True, False], ('Ann', 'Ann', 'Bob'))

    Args:
        path: LFW's ``pairs.txt`` or a sub-set of it, CFP's folder ``Split/FF`` or ``Split/FP``, an insightface
            ``.bin`` file, or a CSV file (:class:`CSVPairs`).
        root: folder or zip archive with the pictures; not needed for ``.bin``, which holds its own.
        format: one of :data:`FORMATS`; by default told from the path and its first bytes.

    Raises:
        FileNotFoundError: a path is missing.
        ValueError: an unknown format, no root where one is needed, or what the reader has to say.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    where = Path(path)
    if not where.exists():
        raise FileNotFoundError(f"{where}: no such file or folder")
    if not where.is_file() and not where.is_dir():  # a pipe would be waited for
        raise ValueError(f"{where}: expected a list of pairs, got something that is not a regular file")
    kind = format or _detected(where)
    if kind == "bin":
        return InsightfaceBin(where)
    if root is None:
        raise ValueError(f"root: expected the folder or zip archive of the pictures that {where} names, got none")
    if kind != "cfp" and where.is_dir():
        raise ValueError(f"{where}: expected a file, got a folder")
    return {"lfw": LFW, "cfp": CFP, "csv": CSVPairs}[kind](root, where)
