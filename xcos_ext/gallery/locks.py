"""One writer at a time, and versions that stay as long as somebody reads them: advisory locks the kernel lets go of.

A process that dies, however, loses its locks with it, so nothing has to be cleaned up after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from xcos_ext.errors import GalleryBusyError, GalleryError

__all__ = ["ReaderLock", "old_readers", "writer_lock"]

_POLL = 0.05  # seconds


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


@contextlib.contextmanager
def writer_lock(folder: Path, timeout: float) -> Iterator[None]:
    """Be the only writer of a gallery.

    Args:
        folder: of the gallery.
        timeout: seconds to wait for another writer.

    Raises:
        GalleryBusyError: another one still writes; the message says which process.
        GalleryError: the folder cannot be written.
    """
    path = folder / "writer.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise GalleryError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        end = time.monotonic() + timeout
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() >= end:
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
                raise GalleryBusyError(f"{folder}: {holder} is writing, and was still after {timeout:g} s; try again")
            time.sleep(_POLL)
        with contextlib.suppress(OSError):  # on a full disk the name is missing, not the lock
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


class ReaderLock:
    """Holds a version: :func:`old_readers` sees it. In a read-only folder nobody can delete, so nothing is held.

    Args:
        folder: of the gallery.
        version: that is read.
    """

    def __init__(self, folder: Path, version: int) -> None:
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            (folder / "readers").mkdir(exist_ok=True)
            path = folder / "readers" / f"{version}.lock"
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _try_lock(self._descriptor, fcntl.LOCK_SH)

    def release(self) -> None:
        """Let the version go."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def old_readers(folder: Path, current: int) -> list[int]:
    """Versions other than the current one that are being read; the files of the others are removed."""
    busy = []
    for path in sorted((folder / "readers").glob("*.lock")):
        version = int(path.stem) if path.stem.isdecimal() else -1
        if version == current:
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if _try_lock(descriptor, fcntl.LOCK_EX):
                path.unlink(missing_ok=True)
            else:
                busy.append(version)
        finally:
            os.close(descriptor)
    return busy
