"""Writing files so that a failure leaves the old file, or none, and never half of one."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from .errors import XCosError
from .several import several
from .text import display_name

__all__ = ["OutputError", "check_apart", "check_output", "local_path", "write_atomically"]

StrPath = str | os.PathLike[str]


class OutputError(XCosError, ValueError):
    """A file that cannot be written: wrong suffix, no such folder, no permission, not a regular file."""


def local_path(path: StrPath, refuse: type[XCosError] = OutputError) -> Path:
    """The path of what is made or looked for on this machine: as an address it would make a folder ``s3:``.

    Args:
        path: also as ``pathlib`` writes an address, with one slash; ``./s3:/...`` is a path.
        refuse: the error's class.

    Raises:
        XCosError: of the class ``refuse``: an address such as ``s3://...`` or ``file:///...``.

    >>> local_path("s3://bucket/faces")
    Traceback (most recent call last):
    xcos_ext.io.atomic.OutputError: s3://bucket/faces: expected a path on this machine, got an address
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):
        raise refuse(f"{display_name(path)}: expected a path on this machine, got an address")
    return Path(path)


def check_output(path: StrPath, suffixes: Sequence[str]) -> str:
    """Check, before any work is done for it, that a file can be written.

    Args:
        path: the file; symbolic links are followed.
        suffixes: accepted ones in lower case, e.g. ``(".png", ".pdf")``.

    Returns:
        The path to write to.

    Raises:
        OutputError: the message starts with the path and says what is wrong.

    >>> check_output("why.gif", (".png", ".pdf"))
    Traceback (most recent call last):
    xcos_ext.io.atomic.OutputError: why.gif: expected a file ending in .png or .pdf, got .gif
    """
    name, suffixes = display_name(local_path(path)), tuple(several(suffixes, "suffixes"))
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in suffixes:
        raise OutputError(f"{name}: expected a file ending in {' or '.join(suffixes)}, got {suffix or 'no suffix'}")
    try:
        target = _target(path)
        with tempfile.TemporaryFile(dir=os.path.dirname(target)):  # also finds read-only file systems
            pass
    except (OSError, ValueError) as error:
        raise _cannot(path, error) from error
    return target


def check_apart(outputs: Mapping[str, StrPath], inputs: Iterable[tuple[str, StrPath]] = ()) -> None:
    """Check that nothing that is read would be written over, nor one result by another, whatever paths or links lead to
    the file.

    Args:
        outputs: what names each, e.g. an option -> the file to write, which need not be there.
        inputs: what names each, and the file, which need not be there either.

    Raises:
        OutputError: two of them are one file.

    >>> check_apart({"--out": "photos/../a.png"}, [("A", "a.png")])
    Traceback (most recent call last):
    xcos_ext.io.atomic.OutputError: --out: expected a file that is not read as well, got photos/../a.png, which is A
    """
    taken: dict[object, str] = {}
    for name, path in outputs.items():
        other = taken.setdefault(_identity(path), name)
        if other != name:
            raise OutputError(f"{name}: expected another file than that of {other}, got {display_name(path)}")
    for what, path in inputs if taken else ():
        hit = taken.get(_identity(path))
        if hit is not None:
            got = f"got {display_name(outputs[hit])}, which is {what}"
            raise OutputError(f"{hit}: expected a file that is not read as well, {got}")


def _identity(path: StrPath) -> object:
    """The same for every way to a file: its number on the disk, or its path once links are followed."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def write_atomically(path: StrPath, write: Callable[[BinaryIO], object]) -> None:
    """Write through a temporary file in the same folder that then takes the name.

    The contents are on the disk before the name is taken, so that a power cut leaves the old file or the new one.

    Args:
        path: the file; symbolic links are followed.
        write: is given the open temporary file; what it returns is not looked at.

    Raises:
        OutputError: there is no such folder, it cannot be written, or the disk is full; nothing is left behind.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(f"{folder}/a.txt", lambda file: file.write(b"whole"))
    ...     os.listdir(folder)
    ['a.txt']
    """
    temporary: str | None = None
    try:
        target = _target(path)
        handle, temporary = tempfile.mkstemp(prefix=".xcos-", suffix=".tmp", dir=os.path.dirname(target))
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):  # gone once it has the name
                os.unlink(temporary)


def _target(path: StrPath) -> str:
    """Where a path leads, if a file may be put there."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise OSError(f"there is no folder {display_name(folder)}")
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if stat.S_ISDIR(mode):
            raise OSError("it is a directory")
        if not stat.S_ISREG(mode):  # it would be replaced by a regular file
            raise OSError("it is not a regular file")
    return target


def _cannot(path: StrPath, error: OSError | ValueError) -> OutputError:
    return OutputError(f"{display_name(path)}: cannot be written: {getattr(error, 'strerror', None) or error}")
