"""Writing figures so that a failure leaves the old file, or none, and never half of one."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from typing import BinaryIO

from .errors import XCosError

__all__ = ["OutputError", "check_output", "ordinary_mode", "write_atomically"]

StrPath = str | os.PathLike[str]


class OutputError(XCosError, ValueError):
    """A file that cannot be written: wrong suffix, no such folder, no permission, not a regular file."""


def _printable(path: str) -> str:
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def check_output(path: StrPath, suffixes: Sequence[str]) -> str:
    """Check, before any work is done for it, that a file can be written.

    Args:
        path: the file; symbolic links are followed.
        suffixes: accepted ones in lower case, e.g. ``(".png", ".pdf")``.

    Returns:
        The path to write to.

    Raises:
        OutputError: the message starts with the path and says what is wrong.
    """
    name = _printable(os.fspath(path))
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in suffixes:
        raise OutputError(f"{name}: expected a file ending in {' or '.join(suffixes)}, got {suffix or 'no suffix'}")
    try:
        target = os.path.realpath(path)
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            raise OutputError(f"{name}: cannot be written: there is no folder {_printable(folder)}")
        try:
            mode: int | None = os.stat(target).st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None:
            if stat.S_ISDIR(mode):
                raise OutputError(f"{name}: cannot be written: it is a directory")
            if not stat.S_ISREG(mode):  # it would be replaced by a regular file
                raise OutputError(f"{name}: cannot be written: it is not a regular file")
        with tempfile.TemporaryFile(dir=folder):  # also finds read-only file systems
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{name}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return target


def ordinary_mode() -> int:
    """Permissions that a new file gets."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def write_atomically(path: StrPath, write: Callable[[BinaryIO], None]) -> None:
    """Write through a temporary file in the same folder that then takes the name.

    Args:
        path: the file, from :func:`check_output`.
        write: is given the open temporary file.

    Raises:
        OutputError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=".xcos-", suffix=".tmp", dir=folder)
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, ordinary_mode())  # mkstemp makes it private
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise OutputError(f"{_printable(os.fspath(path))}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None and os.path.lexists(temporary):
            os.unlink(temporary)
