"""What makes a commit last: files that are on the disk before it counts, and checksums of what Lance keeps none of.

Rows carry checksums of their own. Which rows there are, and which of them are deleted, is in Lance's manifest and
deletion files; the log has a line for every version with the checksums of these.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from xcos_ext.io.atomic import write_atomically

from ._packages import xxhash as _xxhash

__all__ = ["LOG", "CommitLog", "Record", "checksum_of", "sync"]

#: File of the log in a gallery's folder.
LOG = "commits.log"


def checksum_of(paths: Iterable[Path]) -> str:
    """Checksum (xxh3, 64 bits, hexadecimal) of files' bytes, one after the other."""
    state = _xxhash().xxh3_64()
    for path in paths:
        state.update(path.read_bytes())
    return str(state.hexdigest())


def sync(paths: Iterable[Path]) -> None:
    """Wait until files, and the names in folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Record:
    """A version as it was committed.

    Attributes:
        version: its number.
        manifest: checksum of its manifest.
        deletions: checksum of its deletion files, in the order of their fragments.
    """

    version: int
    manifest: str
    deletions: str

    def line(self) -> str:
        """The record as the log has it: three fields and their own checksum."""
        fields = f"{self.version} {self.manifest} {self.deletions}"
        return f"{fields} {_xxhash().xxh3_64_hexdigest(fields.encode())}\n"


class CommitLog:
    """A text file with a line for each version. A line that was not written whole does not count.

    Args:
        path: of the file; it may be missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, version: int) -> Record | None:
        """A version's line."""
        start = f"{version} "
        for line in reversed(self._text().splitlines(keepends=True)):
            if line.startswith(start) and line.count(" ") == 3:
                record = Record(version, *line.split(" ")[1:3])
                if record.line() == line:
                    return record
        return None

    def __bool__(self) -> bool:
        """Whether anything was ever written down."""
        return bool(self._text())

    def _text(self) -> str:
        try:
            return self.path.read_bytes().decode("ascii", "replace")
        except FileNotFoundError:
            return ""

    def add(self, record: Record) -> None:
        """Write a line down, for good."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a line that was cut short must not spoil this one
                    file.write(b"\n")
            file.write(record.line().encode())
            file.flush()
            os.fsync(descriptor)
        if not end:
            sync([self.path.parent])

    def keep(self, version: int) -> None:
        """Forget all versions but one."""
        record = self.find(version)
        write_atomically(self.path, lambda file: file.write(b"" if record is None else record.line().encode()))
        sync([self.path.parent])
