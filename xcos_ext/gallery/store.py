"""Templates on disk, kept by Lance: versions that are committed whole, appended to, deleted from and compacted.

Nothing here knows how faces are scored.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.io.errors import GalleryDamagedError, GalleryError

from ._packages import compute as _compute
from ._packages import lance as _lance
from ._packages import pyarrow as _pyarrow
from .commits import LOG, CommitLog, Record, checksum_of, sync
from .layout import LABELS, Layout, checked_labels, damaged_rows
from .locks import READERS, WRITER, ReaderLock, readers_gone, writer_lock

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Fragment", "Snapshot", "Store"]

_DATA = "templates.lance"
_STORAGE_VERSION = "2.2"
_IO_BYTES = 128 << 20  # read ahead of what is being used
_NEWEST = 2**64 - 1  # Lance names manifests by their distance from here, so that the newest is listed first


@dataclass(frozen=True, eq=False)
class Fragment:
    """Rows that were written together; they never change, but some may be deleted.

    Attributes:
        number: Lance's.
        key: names the fragment's data for good, whatever is deleted.
        first: position of its first row among all rows of the snapshot, deleted ones included.
        rows: all of them.
        deleted: offsets of the deleted ones, ascending.
        paths: of its data files.
    """

    number: int
    key: str
    first: int
    rows: int
    deleted: np.ndarray
    paths: tuple[str, ...]


class Snapshot:
    """One committed version, as its readers see it whatever is written meanwhile.

    A row's *place* counts all rows, deleted ones included; its *position* counts the others only, and is what users
    see. Both rise in the order in which rows were added.

    Attributes:
        dataset: Lance's.
        version: of the data set.
        layout: of the rows.
        fragments: in order.
        places: number of rows, deleted ones included.
    """

    def __init__(self, dataset: Any, layout: Layout, lock: ReaderLock | None = None) -> None:
        self.dataset = dataset
        self.version = int(dataset.version)
        self.layout = layout
        self._lock = lock  # lives as long as whoever still reads
        self.fragments: list[Fragment] = []
        self.places = 0
        for fragment in dataset.get_fragments():
            paths = tuple(file.path for file in fragment.data_files())
            rows = fragment.physical_rows
            deleted = np.empty(0, np.int64)
            if fragment.num_deletions:
                live = self._addresses(fragments=[fragment]) & 0xFFFFFFFF
                deleted = np.setdiff1d(np.arange(rows), live, assume_unique=True)
            key = hashlib.blake2b("/".join(paths).encode(), digest_size=16).hexdigest()
            self.fragments.append(Fragment(fragment.fragment_id, key, self.places, rows, deleted, paths))
            self.places += rows

    def _addresses(self, **options: Any) -> np.ndarray:
        """Row addresses of a scan: fragment number * 2^32 + offset, in order."""
        table = self.dataset.scanner(columns=[], with_row_address=True, scan_in_order=True, **options).to_table()
        return table.column("_rowaddr").to_numpy().astype(np.int64)

    @functools.cached_property
    def deleted(self) -> np.ndarray:
        """Places of the deleted rows, ascending."""
        return np.concatenate([np.empty(0, np.int64), *(f.first + f.deleted for f in self.fragments)])

    @property
    def rows(self) -> int:
        """Faces that can be found."""
        return self.places - len(self.deleted)

    def positions(self, places: np.ndarray) -> np.ndarray:
        """Positions of places that are not deleted."""
        return places - np.searchsorted(self.deleted, places)

    def places_of(self, positions: np.ndarray) -> np.ndarray:
        """Places of positions."""
        # The i-th deleted row is at place d_i, so d_i - i rows that are not deleted come before it.
        return positions + np.searchsorted(self.deleted - np.arange(len(self.deleted)), positions, side="right")

    @functools.cached_property
    def _starts(self) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.array([f.number for f in self.fragments], np.int64)
        firsts = np.array([f.first for f in self.fragments], np.int64)
        return numbers, firsts

    def select(self, where: str) -> np.ndarray:
        """Places of the rows that a filter selects, ascending.

        Raises:
            GalleryError: the filter cannot be understood, or fails.
        """
        if not isinstance(where, str):
            raise GalleryError(f"where: expected a filter like \"person = 'Ann'\", got {type(where).__name__}")
        try:
            addresses = self._addresses(filter=where)
        except BaseException as error:
            if not engine_failed(error):
                raise
            if not str(error).startswith("Invalid user input"):
                self._check_labels()  # the condition may be right, and the rows wrong
            raise GalleryError(f"where: expected an SQL condition, got {where!r}: {first_line(error)}") from error
        numbers, firsts = self._starts
        order = np.argsort(numbers)
        found = order[np.searchsorted(numbers, addresses >> 32, sorter=order)]
        return np.sort(firsts[found] + (addresses & 0xFFFFFFFF))

    def labels(self, places: np.ndarray, columns: Sequence[str] = LABELS) -> dict[str, list[Any]]:
        """Labels of rows, in the order asked for; metadata parsed.

        Raises:
            GalleryDamagedError: they are not what was written, or cannot be read.
        """
        if len(places) == 0:
            return {name: [] for name in columns}
        unique, inverse = np.unique(self.positions(places), return_inverse=True)
        columns_read = [*LABELS, "label_checksum"]  # all of them: their checksum is one
        try:
            with reading(self):
                found, wrong = checked_labels(self.dataset.take(unique.tolist(), columns=columns_read))
        except GalleryDamagedError as error:
            unread = [part for part, rows in self.pieces(unique, columns_read) if rows is None]
            if not unread:
                raise
            raise _damaged_labels(np.concatenate(unread)) from error
        if wrong:
            raise _damaged_labels(unique[wrong])
        return {name: [found[name][i] for i in inverse] for name in columns}

    def probe(self, fragment: Fragment) -> None:
        """Read a row in each of the ways in which rows are read: files say in several places where a column is.

        Raises:
            GalleryDamagedError: one of them fails.
        """
        tiles = [field.name for field in self.layout.tile_schema()]
        with reading(self, fragment):
            for columns in (*([name] for name in LABELS), [*LABELS, "label_checksum"], tiles):
                for _ in self.scan(columns, fragments=[self.dataset.get_fragment(fragment.number)], limit=1):
                    pass

    def _check_labels(self) -> None:
        for fragment in self.fragments:
            self.probe(fragment)
        done = 0
        with reading(self):
            for batch in self.scan([*LABELS, "label_checksum"]):
                _, wrong = checked_labels(batch)
                if wrong:
                    raise _damaged_labels(done + np.array(wrong))
                done += batch.num_rows

    def pieces(
        self, positions: np.ndarray, columns: Sequence[str], size: int = 4096, tries: int = 512
    ) -> Iterator[tuple[np.ndarray, pa.Table | None]]:
        """Rows that cannot all be read: those that can, and None for those that cannot.

        Args:
            positions: of the rows, ascending.
            columns: that are read.
            size: rows read at a time; where that fails, ever fewer.
            tries: failures after which no more is narrowed down.
        """
        waiting = [positions[start : start + size] for start in range(0, len(positions), size)][::-1]
        while waiting:
            piece = waiting.pop()
            try:
                rows = self.dataset.take(piece.tolist(), columns=list(columns))
            except BaseException as error:
                if not engine_failed(error):
                    raise
                rows = None
                if len(piece) > 1 and tries > 0:
                    tries -= 1
                    waiting += [piece[len(piece) // 2 :], piece[: len(piece) // 2]]
                    continue
            yield piece, rows

    def ids(self) -> Iterator[pa.Array]:
        """All ids, in order, some at a time."""
        with reading(self):
            yield from (b.column("id") for b in self.scan(["id"], batch_size=65536))

    def find(self, ids: Iterable[str]) -> dict[str, int]:
        """Positions of those of the ids that there are."""
        wanted = set(ids)
        found: dict[str, int] = {}
        if wanted:
            values = _pyarrow().array(sorted(wanted), _pyarrow().string())
            start = 0
            for batch in self.ids():
                matches = np.flatnonzero(_compute().is_in(batch, value_set=values).to_numpy(zero_copy_only=False))
                found.update((batch[int(i)].as_py(), start + int(i)) for i in matches)
                start += len(batch)
        return found

    def scan(self, columns: Sequence[str], **options: Any) -> Iterator[pa.RecordBatch]:
        """Rows in order, in bounded memory."""
        options.setdefault("batch_size", self.layout.tile_rows)
        yield from self.dataset.scanner(
            columns=list(columns),
            batch_readahead=1,
            fragment_readahead=1,
            io_buffer_size=_IO_BYTES,
            scan_in_order=True,
            **options,
        ).to_batches()

    def fragment_batches(
        self, fragment: Fragment, begin: int = 0, end: int | None = None, *, dead: Callable[[], None] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Rows of a fragment, deleted ones included: their templates and checksums, a tile at a time.

        Args:
            fragment: whose.
            begin, end: offsets of a part; None: to the last.
            dead: is called before a batch with damage in deleted rows alone, which hurts nobody.

        Raises:
            GalleryDamagedError: rows that are not what was written, or cannot be read.
        """
        from_lance = self.dataset.get_fragment(fragment.number)
        columns = [field.name for field in self.layout.tile_schema()]
        end = fragment.rows if end is None else end
        done = begin
        part = {} if (begin, end) == (0, fragment.rows) else {"offset": begin, "limit": end - begin}
        with reading(self, fragment):
            batches = self.scan(
                columns,
                fragments=[from_lance],
                include_deleted_rows=True,
                with_row_id=True,
                batch_size=self.layout.tile_rows,
                strict_batch_size=True,
                **part,
            )
            for batch in batches:
                wrong = damaged_rows(self.layout, batch)
                if wrong:
                    offsets = [done + row for row in wrong]
                    if not np.isin(offsets, fragment.deleted).all():
                        raise self.damage(fragment, offsets)
                    if dead is not None:
                        dead()
                done += batch.num_rows
                yield batch.select(columns)
        if done != end:
            raise self.damage(fragment, list(range(done, end)))

    def damage(self, fragment: Fragment, offsets: Sequence[int], what: str = "templates") -> GalleryDamagedError:
        """The error for damaged rows of a fragment."""
        alive = np.setdiff1d(np.asarray(offsets, np.int64), fragment.deleted)
        positions = self.positions(fragment.first + alive).tolist()
        path = f"{_DATA}/data/{fragment.paths[0]}" if fragment.paths else _DATA
        return GalleryDamagedError(
            f"gallery: {what} at positions {ranges(positions)} are not what was written ({path}); "
            "xcos gallery verify lists all damage",
            positions,
        )


def ranges(positions: Sequence[int], most: int = 8) -> str:
    """Positions in words: 3, 7-12, ..."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:most]]
    return ", ".join(words) + (", ..." if len(runs) > most else "") or "(deleted rows only)"


def first_line(error: BaseException) -> str:
    """The first line of an engine's message, without the source line that it ends with."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text.partition(", /")[0][:300]


def _damaged_labels(positions: np.ndarray) -> GalleryDamagedError:
    listed = positions.tolist()
    return GalleryDamagedError(
        f"gallery: labels at positions {ranges(listed)} are not what was written; xcos gallery verify lists all damage",
        listed,
    )


def engine_failed(error: BaseException) -> bool:
    """Whether an error may be the engine's, whose panics are no Exceptions.

    Raises:
        KeyboardInterrupt, SystemExit: the engine has wrapped what a signal's handler raised; it is no failure.
    """
    if "External error: KeyboardInterrupt:" in str(error):
        raise KeyboardInterrupt from error
    _, wrapped, text = str(error).partition("External error: SystemExit:")
    if wrapped:
        code = text.split(",")[0].strip()
        raise SystemExit(int(code) if code.isdecimal() else code or None) from error
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def reading(snapshot: Snapshot, fragment: Fragment | None = None) -> Iterator[None]:
    """Turn the engine's failures into errors that say which rows cannot be read."""
    try:
        yield
    except (GalleryError, GeneratorExit, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        if not engine_failed(error):
            raise
        parts = snapshot.fragments if fragment is None else [fragment]
        gone = [f for f in parts for path in f.paths if not data_path(snapshot, path).exists()]
        if gone and not _listed(snapshot):
            raise GalleryError(
                f"gallery: version {snapshot.version} is gone: it was compacted meanwhile; open the gallery again"
            ) from error
        if fragment is None:
            raise GalleryDamagedError(
                f"gallery: cannot be read ({first_line(error)}); xcos gallery verify says what is damaged"
            ) from error
        rows = np.setdiff1d(np.arange(fragment.rows), fragment.deleted)
        positions = snapshot.positions(fragment.first + rows).tolist()
        raise GalleryDamagedError(
            f"gallery: faces at positions {ranges(positions)} cannot be read "
            f"({_DATA}/data/{fragment.paths[0]}: {first_line(error)})",
            positions,
        ) from error


def data_path(snapshot: Snapshot, path: str) -> Path:
    """Where a fragment's file is."""
    return Path(snapshot.dataset.uri.removeprefix("file://")) / "data" / path


def _listed(snapshot: Snapshot) -> bool:
    with contextlib.suppress(Exception):
        return any(v["version"] == snapshot.version for v in snapshot.dataset.versions())
    return False


class Store:
    """A gallery's folder: the data set, its locks, its versions.

    Args:
        folder: of the gallery.

    Raises:
        GalleryError: it is not a gallery, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / _DATA
        self.log = CommitLog(folder / LOG)

    @classmethod
    def create(cls, folder: Path, layout: Layout) -> Store:
        """A new, empty gallery.

        Raises:
            GalleryError: there is one already, something else is in the way, or the folder cannot be written.
        """
        store = cls(folder)
        try:
            if folder.exists() and not folder.is_dir():
                raise GalleryError(f"{folder}: expected a folder, or nothing, got a file")
            store._refuse_existing()
            if folder.exists() and any(p.name not in _OURS for p in folder.iterdir()):
                raise GalleryError(f"{folder}: expected an empty folder, or none, got one with other files in it")
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GalleryError(f"{folder}: cannot be written ({error.strerror})") from error
        schema = layout.schema()
        with writer_lock(folder, 10.0):
            store._refuse_existing()  # another process may have been faster
            with writing(folder):
                (folder / READERS).touch()
                dataset = _lance().write_dataset(
                    schema.empty_table(), str(store.data), mode="create", data_storage_version=_STORAGE_VERSION
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
        try:
            return _lance().dataset(str(self.data), version=version)
        except BaseException as error:
            if not engine_failed(error):
                raise
            versions = self._versions()
            if not versions:
                raise GalleryError(
                    f"{self.folder}: expected a gallery, got one whose creation did not end; create it again"
                ) from error
            if version is not None:
                raise GalleryError(
                    f"{self.folder}: version {version} cannot be opened ({first_line(error)})"
                ) from error
            for number in versions if self.log else ():
                try:
                    return _lance().dataset(str(self.data), version=number)
                except BaseException as another:
                    if not engine_failed(another):
                        raise
                if self.log.find(number) is not None:
                    break
            raise GalleryDamagedError(f"{self.folder}: cannot be opened ({first_line(error)})") from error

    def snapshot(self, version: int | None = None) -> tuple[Snapshot, ReaderLock]:
        """The newest version or a chosen one, held until its lock is released.

        Raises:
            GalleryError: it is not a gallery, or one of another format, or there is no such version.
            GalleryDamagedError: it cannot be opened.
        """
        if not self.folder.is_dir():
            raise GalleryError(f"{self.folder}: there is no such gallery")
        if not self.data.is_dir():
            raise GalleryError(f"{self.folder}: expected a gallery, got another folder (it has no {_DATA})")
        while True:
            dataset = self._open(version)
            number = int(dataset.version)
            lock = ReaderLock(self.folder, number)
            # Compacted away between opening and locking: look again.
            if not lock.refused and number in self._versions():
                break
            lock.release()
            if version is not None:
                raise GalleryError(f"{self.folder}: version {version} is gone: it was compacted meanwhile")
            time.sleep(0.01)
        try:
            self.check(dataset)
            return Snapshot(dataset, Layout.from_schema(dataset.schema), lock), lock
        except BaseException as error:
            lock.release()
            if isinstance(error, GalleryError):
                raise type(error)(f"{self.folder}: {error}") from error
            if not engine_failed(error):
                raise
            raise GalleryDamagedError(f"{self.folder}: cannot be opened ({first_line(error)})") from error

    def check(self, dataset: Any) -> None:
        """Compare a version's manifest and deletion files with their checksums in the log.

        Raises:
            GalleryDamagedError: which rows there are can no longer be told.
        """
        version = int(dataset.version)
        record = self.log.find(version)
        if record is None:  # killed between the commit and the log's line
            return
        for what, paths, written in (
            ("manifest", [self._manifest(version)], record.manifest),
            ("list of deleted rows", self._deletion_files(dataset), record.deletions),
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
        """Be the only writer; see :func:`writer_lock`."""
        return writer_lock(self.folder, timeout)

    def _files(self) -> set[Path]:
        """Data files, deletion files and manifests, of all versions and of none."""
        found: set[Path] = set()
        for name in _PARTS:
            with contextlib.suppress(FileNotFoundError):
                found.update(self.data / name / entry for entry in os.listdir(self.data / name))
        return found

    def _files_of(self, dataset: Any) -> set[Path]:
        """Those that a version needs; manifests of all up to it."""
        found = {self.data / "data" / file.path for f in dataset.get_fragments() for file in f.data_files()}
        found.update(self._deletion_files(dataset))
        found.update(self._manifest(version) for version in self._versions() if version <= dataset.version)
        return found

    def _write_down(self, dataset: Any) -> None:
        version = int(dataset.version)
        # The log is for finding damage. A full disk that does not take the line is no reason to disown a commit.
        with contextlib.suppress(OSError):
            self.log.add(
                Record(version, checksum_of([self._manifest(version)]), checksum_of(self._deletion_files(dataset)))
            )

    @contextlib.contextmanager
    def _changing(self, *, steps: bool = False) -> Iterator[tuple[Any, Callable[[], None]]]:
        """A commit to the newest version: it lasts, or leaves nothing behind.

        Args:
            steps: Lance makes it in several versions, of which only the last has the change.

        Yields:
            Lance's data set, and what has to be called between writing files and committing them: it waits until they
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
                sync([*new, *{path.parent for path in new}])
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

    def append(self, table: pa.Table) -> None:
        """Add rows in one commit; the caller is the writer."""
        lance = _lance()
        with self._changing() as (dataset, settle):
            fragments = lance.fragment.write_fragments(table, dataset, mode="append")
            settle()
            lance.LanceDataset.commit(dataset, lance.LanceOperation.Append(fragments), read_version=dataset.version)

    def upsert(self, table: pa.Table) -> None:
        """Add rows, or put them in the place of those with the same ids, in one commit."""
        with self._changing() as (dataset, settle):
            builder = dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            transaction, _ = builder.execute_uncommitted(table)
            settle()
            _lance().LanceDataset.commit(dataset, transaction)

    def existing(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that the newest version has."""
        snapshot, lock = self.snapshot()
        try:
            return set(snapshot.find(ids))
        finally:
            lock.release()

    def delete(self, snapshot: Snapshot, places: np.ndarray) -> None:
        """Delete rows of the newest version, ascending, in one commit; the caller is the writer."""
        lance = _lance()
        numbers, firsts = snapshot._starts
        index = np.searchsorted(firsts, places, side="right") - 1
        addresses = (numbers[index] << 32) | (places - firsts[index])
        with self._changing() as (dataset, settle):
            changed, emptied = [], []
            for part in np.split(addresses, np.flatnonzero(np.diff(index)) + 1):
                number = int(part[0]) >> 32
                rows = ",".join(map(str, part.tolist()))
                left = dataset.get_fragment(number).delete(f"_rowaddr IN ({rows})")
                if left is None:
                    emptied.append(number)
                else:
                    changed.append(left)
            settle()
            operation = lance.LanceOperation.Delete(changed, emptied, "by row")
            lance.LanceDataset.commit(dataset, operation, read_version=dataset.version)

    def compact(self, timeout: float, tick: Callable[[str], None]) -> dict[str, int]:
        """Rewrite without the deleted rows, then delete every file of older versions; the caller is the writer.

        Raises:
            GalleryBusyError: somebody still reads an older version after ``timeout`` seconds. The newest version is
                compact; the older files are still there.
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
        tick("deleting old versions")
        current = int(self._open().version)
        with readers_gone(self.folder, current, timeout), writing(self.folder, "the old files stay"):
            self._open().cleanup_old_versions(
                retain_versions=1, delete_unverified=True, error_if_tagged_old_versions=False
            )
            self._sweep(current)
            self.log.keep(current)
        return {
            "fragments_removed": removed,
            "fragments_added": added,
            "bytes_before": before,
            "bytes_after": folder_bytes(self.data),
        }

    def _sweep(self, version: int) -> None:
        """Delete whatever is not of the one version that is left: Lance leaves what killed writers had begun."""
        if self._versions() != [version]:
            raise GalleryError(f"{self.folder}: older versions cannot be deleted; are they tagged?")
        keep = {self.data / path for path in self._open().tracked_files().read_all().column("path").to_pylist()}
        keep.add(self.data / "_versions" / "latest_version_hint.json")
        folders = []
        for folder, _, names in os.walk(self.data):
            folders.append(Path(folder))
            for path in (Path(folder) / name for name in names):
                if path not in keep:
                    path.unlink()
        sync(folders)


_PARTS = ("data", "_deletions", "_versions")
_OURS = (_DATA, WRITER, READERS, LOG, LOG + ".new", "tiles")


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
    except GalleryError:
        raise
    except BaseException as error:
        if not engine_failed(error):
            raise
        text = first_line(error)
        for code, words in (
            ("No space left", "the disk is full"),
            ("Disk quota exceeded", "the disk quota is used up"),
            ("File too large", "the file would be larger than is allowed"),
            ("Permission denied", "permission denied"),
            ("Read-only file system", "the file system is read-only"),
        ):
            if code in str(error):
                text = words
        raise GalleryError(f"{folder}: cannot be written ({text}); {state}") from error
