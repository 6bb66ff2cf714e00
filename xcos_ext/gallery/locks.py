"""One writer at a time, and versions that stay as long as somebody reads them: locks that end with their process.

Writers exclude each other by filelock. Readers share the lock of their version's file, for which there is no such
library (filelock's ReadWriteLock is an SQLite database, which those who may only read cannot open): that is flock(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from xcos_ext.io.errors import GalleryBusyError, GalleryError
from xcos_ext.io.optional import gallery_package

__all__ = ["READERS", "WRITER", "ReaderLock", "forget_readers", "wait_for_readers", "writer_lock"]

#: In a gallery's folder: the writer's lock, and the folder of the readers', a file for each version.
WRITER = "writer.lock"
READERS = "readers"

_POLL = 0.05  # seconds
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


@contextlib.contextmanager
def writer_lock(folder: Path, timeout: float) -> Iterator[None]:
    """Be the only writer of a gallery; GalleryBusyError, which names it, if another still writes after the timeout."""
    filelock, path = gallery_package("filelock"), folder / WRITER
    lock = filelock.FileLock(path, thread_local=False, fallback_to_soft=False)  # a soft lock would outlive its process
    try:
        lock.acquire(timeout, poll_interval=_POLL)
    except filelock.Timeout as error:
        if not os.access(folder, os.W_OK):
            raise GalleryError(f"{folder}: cannot be written (no permission)") from error
        holder = path.read_text("utf-8", "replace").strip() or "another process"
        raise GalleryBusyError(
            f"{folder}: {holder} is writing, and was still after {timeout:g} s; try again"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise GalleryError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    try:
        with contextlib.suppress(OSError):  # on a full disk the name is missing, not the lock
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class ReaderLock:
    """Holds a version: :func:`wait_for_readers` waits for it. Ends with :meth:`release`, or with the object.

    Where the folder cannot be written and nobody has read the version before, nothing is held.
    """

    def __init__(self, folder: Path, version: int) -> None:
        self._descriptor: int | None = None
        self._owner = os.getpid()
        self.refused = False  # the version is being deleted, and must not be read
        path = folder / READERS / str(version)
        with contextlib.suppress(OSError):
            try:
                self._descriptor = os.open(path, _FLAGS, 0o666)
            except OSError:  # those who may only read hold it as well
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            locked = _locked(self._descriptor, fcntl.LOCK_SH)
            self.refused = not locked or os.fstat(self._descriptor).st_size > 0

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a reader's lock cannot be pickled: its descriptor is another file in another process")

    def release(self) -> None:
        """Let the version go."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # A forked child has the descriptor too: the lock must not live on in it, and it must not end ours.
            with contextlib.suppress(OSError):
                if os.getpid() == self._owner:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def wait_for_readers(folder: Path, versions: Iterable[int], timeout: float) -> None:
    """Wait until nobody reads any of these versions, and let nobody begin to; GalleryBusyError after the timeout."""
    end = time.monotonic() + timeout
    (folder / READERS).mkdir(exist_ok=True)
    for version in versions:
        descriptor = os.open(folder / READERS / str(version), _FLAGS, 0o666)
        try:
            while not _locked(descriptor, fcntl.LOCK_EX):
                if time.monotonic() >= end:
                    raise GalleryBusyError(
                        f"{folder}: rewritten, but version {version} is still being read after {timeout:g} s, so old "
                        "files stay; compact again when its readers have closed or refreshed the gallery"
                    )
                time.sleep(_POLL)
            os.ftruncate(descriptor, 1)  # a file that is not empty refuses readers
        finally:
            os.close(descriptor)


def forget_readers(folder: Path, current: int) -> None:
    """Delete the lock files of all versions but one."""
    for path in (folder / READERS).iterdir():
        if path.name != str(current):
            path.unlink(missing_ok=True)
