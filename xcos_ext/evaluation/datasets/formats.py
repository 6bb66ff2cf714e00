"""One door to every list of pairs."""

from __future__ import annotations

import os
from pathlib import Path

from .cfp import CFP
from .csv_pairs import CSVPairs
from .insightface import InsightfaceBin
from .lfw import LFW
from .pairs import PairList

__all__ = ["FORMATS", "open_pairs"]

#: Names of the formats, as ``open_pairs(format=...)`` takes them.
FORMATS = ("lfw", "cfp", "bin", "csv")


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
    return "csv" if b"," in header else "lfw"


def open_pairs(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, *, format: str | None = None
) -> PairList:
    """Read a list of pairs.

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
    kind = format or _detected(where)
    if kind == "bin":
        return InsightfaceBin(where)
    if root is None:
        raise ValueError(f"root: {where} names pictures; give the folder or zip archive that they are in")
    if kind != "cfp" and where.is_dir():
        raise ValueError(f"{where}: expected a file, got a folder")
    return {"lfw": LFW, "cfp": CFP, "csv": CSVPairs}[kind](root, where)
