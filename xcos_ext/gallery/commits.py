"""What makes a commit last: files that are on the disk before it counts, and checksums of what Lance keeps none of.

Rows carry checksums of their own. Which rows there are, and which of them are deleted, is in Lance's manifest and
deletion files; the log has a line for every version with the checksums of these.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from xcos_ext.io.atomic import write_atomically
from xcos_ext.io.optional import gallery_package

__all__ = ["LOG", "CommitLog", "checksum_of", "sync"]

#: File of the log in a gallery's folder.
LOG = "commits.log"


def checksum_of(paths: Iterable[Path]) -> str:
    """Checksum (xxh3, 64 bits, hexadecimal) of files' bytes, one after the other."""
    state = gallery_package("xxhash").xxh3_64()
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


class CommitLog:
    """A text file with a line for each version: its number, the checksum of its manifest, that of its deletion files in
    the order of their fragments, and the line's own. A line that was not written whole does not count.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, version: int) -> tuple[str, str] | None:
        """A version's checksums, of its manifest and of its deletion files."""
        for line in reversed(self._lines()):
            number, *sums = line.split(" ")[:3]
            if number == str(version) and len(sums) == 2 and line == _line(version, *sums):
                return sums[0], sums[1]
        return None

    def __bool__(self) -> bool:
        """Whether anything was ever written down."""
        return bool(self._lines())

    def _lines(self) -> list[str]:
        if not self.path.is_file():  # a pipe that came with a copy would be waited for
            return []
        return self.path.read_bytes().decode("ascii", "replace").splitlines()

    def add(self, version: int, manifest: str, deletions: str) -> None:
        """Write a line down, for good."""
        new = not self.path.exists()
        with open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line that was cut short must not spoil this one
                    file.write(b"\n")
            file.write(f"{_line(version, manifest, deletions)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync([self.path.parent])

    def keep(self, version: int) -> None:
        """Forget all versions but one."""
        found = self.find(version)
        text = "" if found is None else f"{_line(version, *found)}\n"
        write_atomically(self.path, lambda file: file.write(text.encode()))
        sync([self.path.parent])


def _line(version: int, manifest: str, deletions: str) -> str:
    fields = f"{version} {manifest} {deletions}"
    return f"{fields} {gallery_package('xxhash').xxh3_64_hexdigest(fields.encode())}"
