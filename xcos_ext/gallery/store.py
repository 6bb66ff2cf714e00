"""A gallery's folder: the data set that Lance keeps, its versions, and how they are committed, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.io.atomic import local_path
from xcos_ext.io.errors import GalleryDamagedError, GalleryError, XCosError
from xcos_ext.io.optional import gallery_package

from .commits import LOG, CommitLog, checksum_of, sync
from .layout import Layout
from .locks import READERS, WRITER, ReaderLock, forget_readers, wait_for_readers, writer_lock
from .snapshot import DATA, Snapshot, engine_failed, first_line

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Store", "folder_bytes", "lance"]

_STORAGE_VERSION = "2.2"
_NEWEST = 2**64 - 1  # Lance names manifests by their distance from here, so that the newest is listed first
_INDEXED_FROM = 20_000  # faces; fewer ids are read in no time


_user: int | None = None  # the process whose threads Lance has started


def lance() -> Any:
    """The package, in a process that has its threads.

    Raises:
        GalleryError: this one was forked from a process that used galleries, and would wait for those threads for ever.
    """
    global _user
    package = gallery_package("lance")
    if _user not in (None, os.getpid()):
        raise GalleryError(
            "gallery: expected a process of its own, got one that was forked after galleries had been used, which Lance"
            " does not survive; start it by spawn or forkserver (DataLoader: multiprocessing_context='spawn')"
        )
    _user = os.getpid()
    return package


class Store:
    """A gallery's folder: the data set, its locks, its versions."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        # Absolute, for it is used long after: os.chdir must not lead elsewhere.
        self.folder = local_path(folder, GalleryError).absolute()
        self.data = self.folder / DATA
        self.log = CommitLog(self.folder / LOG)

    @classmethod
    def create(cls, path: str | os.PathLike[str], layout: Layout) -> Store:
        """A new, empty gallery."""
        store = cls(path)
        folder = store.folder
        with writing(folder):
            if folder.exists() and not folder.is_dir():
                raise GalleryError(f"{folder}: expected a folder, or nothing, got a file")
            store._refuse_existing()
            if folder.exists() and any(p.name not in _OURS for p in folder.iterdir()):
                raise GalleryError(f"{folder}: expected an empty folder, or none, got one with other files in it")
            folder.mkdir(parents=True, exist_ok=True)
            with writer_lock(folder, 10.0):
                store._refuse_existing()  # another process may have been faster
                (folder / READERS).mkdir(exist_ok=True)
                dataset = lance().write_dataset(
                    layout.schema().empty_table(), store.data, mode="create", data_storage_version=_STORAGE_VERSION
                )
                sync([*store._files(), store.data / "_versions", store.data, folder, folder.parent])
                store._write_down(dataset)
        return store

    def _refuse_existing(self) -> None:
        if self.exists():
            raise GalleryError(f"{self.folder}: there is a gallery already; open it to add faces")

    def exists(self) -> bool:
        """Whether the folder holds a gallery."""
        return bool(self._versions())

    # ------------------------------------------------------------------ versions

    def _versions(self) -> list[int]:
        """Numbers of the versions that there are files of, newest first."""
        numbers = (p.stem for p in (self.data / "_versions").glob("*.manifest"))
        return sorted((_NEWEST - int(number) for number in numbers if number.isdecimal()), reverse=True)

    def _manifest(self, version: int) -> Path:
        return self.data / "_versions" / f"{_NEWEST - version:020d}.manifest"

    def _open(self, version: int | None = None) -> Any:
        """Lance's data set at its newest version, or at a chosen one.

        A newest manifest that cannot be read and was never logged does not count: the machine's end cut its commit
        short, of which nobody has been told.
        """

        def chosen() -> Iterator[int | None]:
            yield version
            if version is None and self.log:  # listed where the first one fails, and only there
                yield from self._versions()

        failed: BaseException | None = None
        for number in chosen():
            try:
                return lance().dataset(str(self.data), version=number)
            except BaseException as error:
                if not engine_failed(error):
                    raise
                failed = failed or error
            if number is not None and self.log.find(number) is not None:
                break
        assert failed is not None
        if not self._versions():
            text = "expected a gallery, got one whose creation did not end; create it again"
            raise GalleryError(f"{self.folder}: {text}") from failed
        if version is not None and version not in self._versions():
            raise self._gone(version) from failed
        if version is not None:
            raise GalleryError(f"{self.folder}: version {version} cannot be opened ({first_line(failed)})") from failed
        raise GalleryDamagedError(f"{self.folder}: cannot be opened ({first_line(failed)})") from failed

    def _check_there(self) -> None:
        if not self.folder.is_dir():
            raise GalleryError(f"{self.folder}: there is no such gallery")
        if not self.data.is_dir():
            raise GalleryError(f"{self.folder}: expected a gallery, got another folder (it has no {DATA})")

    def snapshot(self, version: int | None = None) -> tuple[Snapshot, ReaderLock]:
        """The newest version or a chosen one, held until its lock is released."""
        self._check_there()
        while True:
            dataset = self._open(version)
            number = int(dataset.version)
            lock = ReaderLock(self.folder, number)
            # Compacted away between opening and locking: look again.
            if not lock.refused and number in self._versions():
                break
            lock.release()
            if version is not None:
                raise self._gone(version)
            time.sleep(0.01)
        try:
            self.check(dataset)
            return Snapshot(dataset, Layout.from_schema(dataset.schema), lock, self._again), lock
        except BaseException as error:
            lock.release()
            if isinstance(error, GalleryError):
                raise type(error)(f"{self.folder}: {error}") from error
            if not engine_failed(error):
                raise
            raise GalleryDamagedError(f"{self.folder}: cannot be opened ({first_line(error)})") from error

    def _again(self, version: int) -> Snapshot:
        return self.snapshot(version)[0]

    def _gone(self, version: int) -> GalleryError:
        return GalleryError(f"{self.folder}: version {version} is gone: it was compacted meanwhile")

    def check(self, dataset: Any) -> None:
        """Compare a version's manifest and deletion files, which say what rows there are, with their checksums."""
        version = int(dataset.version)
        logged = self.log.find(version)
        if logged is None:  # killed between the commit and the log's line
            return
        for what, paths, written in (
            ("manifest", [self._manifest(version)], logged[0]),
            ("list of deleted rows", self._deletion_files(dataset), logged[1]),
        ):
            try:
                found = checksum_of(paths)
            except OSError as error:
                found = str(error.strerror)
            if found != written:
                names = ", ".join(str(path.relative_to(self.folder)) for path in paths[:3])
                raise GalleryDamagedError(
                    f"the {what} of version {version} is not what was written ({names}); restore it from a copy"
                )

    def _deletion_files(self, dataset: Any) -> list[Path]:
        fragments = (f for f in dataset.get_fragments() if f.num_deletions)
        return [self.data / f.metadata.deletion_file.path(f.fragment_id) for f in fragments]

    # ------------------------------------------------------------------ changes

    def writer(self, timeout: float) -> contextlib.AbstractContextManager[None]:
        """Be the only writer; see :func:`writer_lock`, which would make a folder that was deleted anew."""
        self._check_there()
        return writer_lock(self.folder, timeout)

    def _files(self) -> set[Path]:
        """Data files, deletion files and manifests, of all versions and of none."""
        found: set[Path] = set()
        for name in _PARTS:
            with contextlib.suppress(FileNotFoundError):
                found.update(self.data / name / entry for entry in os.listdir(self.data / name))
        found.update((self.data / "_indices").glob("*/*"))
        return found

    def _files_of(self, dataset: Any) -> set[Path]:
        """Those that this and later versions need."""
        tracked = dataset.tracked_files(min_version=int(dataset.version)).read_all()
        return {self.data / path for path in tracked.column("path").to_pylist()}

    def _write_down(self, dataset: Any) -> None:
        version = int(dataset.version)
        # The log is for finding damage. A full disk that does not take the line is no reason to disown a commit.
        with contextlib.suppress(OSError):
            self.log.add(version, checksum_of([self._manifest(version)]), checksum_of(self._deletion_files(dataset)))

    @contextlib.contextmanager
    def _changing(self, *, steps: bool = False) -> Iterator[tuple[Any, Callable[[], None]]]:
        """A commit to the newest version, or in several ``steps``: it lasts, or leaves nothing behind.

        Gives Lance's data set, and what has to be called between writing files and committing them: it waits until they
        are on the disk, so that no version names files that are not.
        """
        with writing(self.folder):
            dataset = self._open()
            start = int(dataset.version)
            for version in self._versions():
                if version > start:  # what a lost commit left, see _open
                    self._manifest(version).unlink()
            before = self._files()
            settled = set(before)

            def settle() -> None:
                new = self._files() - settled
                sync([*new, *{folder for path in new for folder in (path.parent, path.parent.parent)}])
                settled.update(new)

            try:
                yield dataset, settle
            except BaseException as error:
                if not engine_failed(error):
                    raise
                newest = self._open()
                if newest.version == start or steps:
                    for path in self._files() - before - self._files_of(newest):
                        with contextlib.suppress(OSError):
                            path.unlink()
                    raise
                # The version is there: what failed came after it.
            changed = self._open()
            if changed.version == start:
                return
            try:
                settle()
            except OSError as error:
                raise GalleryError(
                    f"{self.folder}: changed, but the disk did not confirm it ({error.strerror}); it may be lost"
                ) from error
            self._write_down(changed)

    def add(self, table: pa.Table, *, replace: bool) -> None:
        """Add rows in one commit, or put them in the place of those with the same ids; the caller is the writer."""
        package = lance()
        with self._changing() as (dataset, settle):
            if replace:
                builder = dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
                change, version = builder.execute_uncommitted(table)[0], None
            else:
                change = package.LanceOperation.Append(package.fragment.write_fragments(table, dataset, mode="append"))
                version = dataset.version
            settle()
            package.LanceDataset.commit(dataset, change, read_version=version)

    def delete(self, snapshot: Snapshot, places: np.ndarray) -> None:
        """Delete rows of the newest version in one commit; the caller is the writer."""
        package = lance()
        places = np.sort(places)
        parts = np.split(places, np.searchsorted(places, [f.first for f in snapshot.fragments[1:]]))
        with self._changing() as (dataset, settle):
            changed, emptied = [], []
            for f, part in zip(snapshot.fragments, parts, strict=True):
                if len(part) == 0:
                    continue
                rows = ",".join(map(str, ((f.number << 32) | (part - f.first)).tolist()))
                left = dataset.get_fragment(f.number).delete(f"_rowaddr IN ({rows})")
                if left is None:
                    emptied.append(f.number)
                else:
                    changed.append(left)
            settle()
            operation = package.LanceOperation.Delete(changed, emptied, "by row")
            package.LanceDataset.commit(dataset, operation, read_version=dataset.version)

    def compact(self, timeout: float, tick: Callable[[str], None]) -> dict[str, int]:
        """Rewrite without the deleted rows, then delete every file of older versions; the caller is the writer.

        GalleryBusyError: somebody still reads an older version. The newest is compact; the older files are still there.
        """
        from lance.optimize import Compaction

        before = folder_bytes(self.data)
        removed = added = 0
        with self._changing(steps=True) as (dataset, settle):
            tick("rewriting")
            # Few rows at a time: its buffers are what a compaction's memory is made of.
            plan = Compaction.plan(
                dataset, {"materialize_deletions_threshold": 0.0, "batch_size": 1024, "num_threads": 1}
            )
            rewritten = [task.execute(dataset) for task in plan.tasks]
            settle()
            if rewritten:
                metrics = Compaction.commit(dataset, rewritten)
                removed, added = int(metrics.fragments_removed), int(metrics.fragments_added)
            tick("indexing ids")
            self._index(settle)
        tick("deleting old versions")
        newest = self._open()
        current = int(newest.version)
        with writing(self.folder, "the old files stay"):
            wait_for_readers(self.folder, [version for version in self._versions() if version != current], timeout)
            newest.cleanup_old_versions(retain_versions=1, delete_unverified=True, error_if_tagged_old_versions=False)
            self._sweep(current)
            self.log.keep(current)
            forget_readers(self.folder, current)
        return {
            "fragments_removed": removed,
            "fragments_added": added,
            "bytes_before": before,
            "bytes_after": folder_bytes(self.data),
        }

    def _index(self, settle: Callable[[], None]) -> None:
        """Have Lance index the ids anew, for an index that was kept up would still hold those of removed faces."""
        dataset = self._open()
        if dataset.count_rows() >= _INDEXED_FROM:
            numbers = [fragment.fragment_id for fragment in dataset.get_fragments()]
            segment = dataset.create_index_uncommitted("id", "BTREE", name=_INDEX, replace=True, fragment_ids=numbers)
            settle()
            dataset.commit_existing_index_segments(_INDEX, "id", [segment])
        elif dataset.describe_indices():
            dataset.drop_index(_INDEX)

    def _sweep(self, version: int) -> None:
        """Delete whatever is not of the one version that is left: Lance leaves what killed writers had begun."""
        if self._versions() != [version]:
            raise GalleryError(f"{self.folder}: older versions cannot be deleted; are they tagged?")
        keep = self._files_of(self._open()) | {self.data / "_versions" / "latest_version_hint.json"}
        folders = []
        for folder, _, names in os.walk(self.data):
            folders.append(Path(folder))
            for path in (Path(folder) / name for name in names):
                if path not in keep:
                    path.unlink()
        sync(folders)


_INDEX = "ids"
_PARTS = ("data", "_deletions", "_versions")
_OURS = (DATA, WRITER, READERS, LOG, "tiles")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_size
    return total


@contextlib.contextmanager
def writing(folder: Path, state: str = "nothing was changed") -> Iterator[None]:
    """Turn the engine's failures to write into one error; a commit that failed left the gallery as it was."""
    try:
        yield
    except XCosError:
        raise
    except BaseException as error:
        if not engine_failed(error):
            raise
        number = re.search(r"(?:os error|Errno) (\d+)", str(error))
        text = os.strerror(int(number[1])) if number else first_line(error)
        raise GalleryError(f"{folder}: cannot be written ({text}); {state}") from error
