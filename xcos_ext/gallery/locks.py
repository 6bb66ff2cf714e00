"""One writer at a time, and versions that stay as long as somebody reads them: advisory locks the kernel lets go of.

A process that dies, however, loses its locks with it, so nothing has to be cleaned up after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from xcos_ext.io.errors import GalleryBusyError, GalleryError

__all__ = ["READERS", "WRITER", "ReaderLock", "readers_gone", "try_lock", "writer_lock"]

#: Files of the locks in a gallery's folder. Readers lock the byte of their version's number.
WRITER = "writer.lock"
READERS = "readers.lock"

_POLL = 0.05  # seconds
_FLOCK = "hhqqi0q"  # struct flock: type, whence, start, length, process


def _request(kind: int, start: int, length: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)


def try_lock(descriptor: int, kind: int, start: int = 0, length: int = 0) -> bool:
    """Lock bytes of an open file; such locks belong to this opening of it, not to the process."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _request(kind, start, length))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _let_go(descriptor: int, owner: int) -> None:
    # A forked child has the descriptor too: the lock must not live on in it, and it must not end ours.
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            try_lock(descriptor, fcntl.F_UNLCK)
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _opened(folder: Path, name: str) -> int:
    try:
        return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise GalleryError(f"{folder}: cannot be written ({error.strerror})") from error


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
    owner = os.getpid()
    descriptor = _opened(folder, WRITER)
    try:
        end = time.monotonic() + timeout
        while not _locked(folder, descriptor, 0, 0):
            if time.monotonic() >= end:
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
                raise GalleryBusyError(f"{folder}: {holder} is writing, and was still after {timeout:g} s; try again")
            time.sleep(_POLL)
        with contextlib.suppress(OSError):  # on a full disk the name is missing, not the lock
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {owner} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _let_go(descriptor, owner)


def _locked(folder: Path, descriptor: int, start: int, length: int) -> bool:
    try:
        return try_lock(descriptor, fcntl.F_WRLCK, start, length)
    except OSError as error:
        raise GalleryError(f"{folder}: cannot be written (no locks here: {error.strerror})") from error


class ReaderLock:
    """Holds a version: :func:`readers_gone` waits for it. Ends with :meth:`release`, or with the object.

    Where the folder cannot be written and nobody has read the gallery before, nothing is held.

    Args:
        folder: of the gallery.
        version: that is read.

    Attributes:
        refused: the version is being deleted, so it must not be read.
    """

    def __init__(self, folder: Path, version: int) -> None:
        self._descriptor: int | None = None
        self._owner = os.getpid()
        self.refused = False
        path = folder / READERS
        with contextlib.suppress(OSError):
            try:
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError:  # those who may only read hold it as well
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.refused = not try_lock(self._descriptor, fcntl.F_RDLCK, version, 1)

    def release(self) -> None:
        """Let the version go."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _let_go(descriptor, self._owner)

    def __del__(self) -> None:
        self.release()


@contextlib.contextmanager
def readers_gone(folder: Path, current: int, timeout: float) -> Iterator[None]:
    """Wait until nobody reads a version before the current one, and let nobody begin to.

    Args:
        folder: of the gallery.
        current: version that may be read.
        timeout: seconds to wait.

    Raises:
        GalleryBusyError: an older version is still being read.
        GalleryError: the folder cannot be written.
    """
    owner = os.getpid()
    descriptor = _opened(folder, READERS)
    try:
        end = time.monotonic() + timeout
        while not _locked(folder, descriptor, 0, current):
            if time.monotonic() >= end:
                _, _, version, _, _ = struct.unpack(
                    _FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK, 0, current))
                )
                raise GalleryBusyError(
                    f"{folder}: rewritten, but version {version} is still being read after {timeout:g} s, so old "
                    "files stay; compact again when its readers have closed or refreshed the gallery"
                )
            time.sleep(_POLL)
        yield
    finally:
        _let_go(descriptor, owner)
