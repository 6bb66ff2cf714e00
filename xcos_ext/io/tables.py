"""CSV files as spreadsheets and programs write them."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence

from .errors import XCosError
from .text import printable

__all__ = ["csv_rows", "csv_text"]

#: What a spreadsheet would compute instead of showing it, and that behind apostrophes, which one more tells apart.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> str:
    """A table as CSV, in which no text is a formula: what begins as one gets an apostrophe, which :func:`csv_rows`
    takes away again. Numbers stay numbers, and None is an empty cell.

    >>> csv_text(["id", "score"], [["=1+1", -0.5], ["'-", None]]).splitlines()
    ['id,score', "'=1+1,-0.5", "''-,"]
    """
    out = io.StringIO()
    writer = csv.writer(out)
    for row in (header, *rows):
        writer.writerow([f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row])
    return out.getvalue()


def _as_it_was(value: str) -> str:
    return value[1:] if value.startswith("'") and _FORMULA.match(value) else value


def csv_rows(
    path: str | os.PathLike[str], refuse: type[XCosError], *, name: str | None = None
) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file, its header first, each with the number of the line that it ends on.

    What :func:`csv_text` wrote loses its apostrophes. UTF-8 with or without a byte order mark, lines ended in any way,
    columns separated by commas, or by semicolons (as spreadsheets do in many languages) or tabs where the header has no
    comma. Empty lines are passed over. The file is read as rows are asked for, and never held in memory.

    Args:
        path: the file.
        refuse: the error's class.
        name: what to call it in messages; None: its path.

    Yields:
        (line, values): the header's names, then values, as many in each row, all without blanks around them. An empty
        file has the header ``[]`` in line 1.

    Raises:
        XCosError: of the class ``refuse``: not a regular file, not UTF-8, not CSV, or a row with more or fewer columns
            than the header; the message names file and line.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     print("\\ufeffpicture;person", "1.jpg; Ann", sep="\\r\\n", file=file, flush=True)
    ...     list(csv_rows(file.name, XCosError))
    [(1, ['picture', 'person']), (2, ['1.jpg', 'Ann'])]
    """
    name = printable(os.fspath(path)) if name is None else name
    line = 0
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise refuse(f"{name}: expected a CSV file, got something that is not a regular file")
        with open(path, encoding="utf-8-sig", newline="") as stream:
            first = stream.readline(1 << 16)
            stream.seek(0)
            separator = next((sign for sign in ",;\t" if sign in first), ",")
            rows = csv.reader(stream, strict=True, delimiter=separator)
            try:
                header = [_as_it_was(column.strip()) for column in next(rows, [])]
                line = max(rows.line_num, 1)
                yield line, header
                for row in rows:
                    line = rows.line_num
                    if any("\0" in value for value in row):  # csv itself says so in Python 3.10 only
                        raise refuse(f"{name}, line {line}: not CSV (line contains NUL)")
                    if row and len(row) != len(header):
                        raise refuse(
                            f"{name}, line {line}: expected {len(header)} columns as in the header, got {len(row)}"
                        )
                    if row:
                        yield line, [_as_it_was(value.strip()) for value in row]
            except csv.Error as error:
                raise refuse(f"{name}, line {rows.line_num}: not CSV ({error})") from error
    except UnicodeDecodeError as error:
        where = f"{name}, after line {line}" if line else name
        raise refuse(f"{where}: expected text in UTF-8 ({error.reason}); spreadsheets call it CSV UTF-8") from error
    except (OSError, ValueError) as error:
        if isinstance(error, XCosError):
            raise
        raise refuse(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
