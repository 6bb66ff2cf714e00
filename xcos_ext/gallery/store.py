"""Templates on disk, kept by Lance: versions that are committed whole, appended to, deleted from and compacted.

Nothing here knows how faces are scored.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.errors import GalleryBusyError, GalleryDamagedError, GalleryError

from ._packages import lance as _lance
from ._packages import pyarrow as _pyarrow
from .layout import LABELS, Layout, damaged_rows
from .locks import ReaderLock, old_readers, writer_lock

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Fragment", "Snapshot", "Store"]

_DATA = "templates.lance"
_STORAGE_VERSION = "2.2"
_IO_BYTES = 128 << 20  # read ahead of what is being used


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

    def __init__(self, dataset: Any, layout: Layout) -> None:
        self.dataset = dataset
        self.version = int(dataset.version)
        self.layout = layout
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
        except Exception as error:
            raise GalleryError(f"where: expected an SQL condition, got {where!r}: {first_line(error)}") from error
        numbers, firsts = self._starts
        order = np.argsort(numbers)
        found = order[np.searchsorted(numbers, addresses >> 32, sorter=order)]
        return np.sort(firsts[found] + (addresses & 0xFFFFFFFF))

    def labels(self, places: np.ndarray, columns: Sequence[str] = LABELS) -> dict[str, list[Any]]:
        """Labels of rows, in the order asked for; metadata parsed."""
        if len(places) == 0:
            return {name: [] for name in columns}
        unique, inverse = np.unique(self.positions(places), return_inverse=True)
        with reading(self):
            table = self.dataset.take(unique.tolist(), columns=list(columns))
        found: dict[str, list[Any]] = {}
        for name in columns:
            values = table.column(name).to_pylist()
            if name == "metadata":
                values = [parsed_metadata(text) for text in values]
            found[name] = [values[i] for i in inverse]
        return found

    def ids(self) -> Iterator[pa.Array]:
        """All ids, in order, some at a time."""
        with reading(self):
            yield from (b.column("id") for b in self.scan(["id"], batch_size=65536))

    def scan(self, columns: Sequence[str], **options: Any) -> Iterator[pa.RecordBatch]:
        """Rows in order, in bounded memory."""
        options.setdefault("batch_size", self.layout.tile_rows)
        yield from self.dataset.scanner(
            columns=list(columns),
            batch_readahead=2,
            fragment_readahead=1,
            io_buffer_size=_IO_BYTES,
            scan_in_order=True,
            **options,
        ).to_batches()

    def fragment_batches(self, fragment: Fragment, begin: int = 0, end: int | None = None) -> Iterator[pa.RecordBatch]:
        """Rows of a fragment, deleted ones included: their templates and checksums, a tile at a time.

        Args:
            fragment: whose.
            begin, end: offsets of a part; None: to the last.

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
                    raise self.damage(fragment, [done + row for row in wrong])
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
            f"gallery: {what} at positions {_ranges(positions)} are not what was written ({path}); "
            "xcos gallery verify lists all damage",
            positions,
        )


def _ranges(positions: Sequence[int], most: int = 8) -> str:
    """Positions in words: 3, 7-12, ..."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:most]]
    return ", ".join(words) + (", ..." if len(runs) > most else "") or "(deleted rows only)"


def parsed_metadata(text: str) -> Any:
    """Stored metadata as a dictionary."""
    return json.loads(text)


def first_line(error: BaseException) -> str:
    """The first line of an engine's message, without the source line that it ends with."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text.partition(", /")[0][:300]


@contextlib.contextmanager
def reading(snapshot: Snapshot, fragment: Fragment | None = None) -> Iterator[None]:
    """Turn the engine's failures into errors that say which rows cannot be read."""
    try:
        yield
    except (GalleryError, GeneratorExit, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # Lance's panics are no Exceptions
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
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
                f"gallery: templates at positions {_ranges(positions)} cannot be read "
                f"({_DATA}/data/{fragment.paths[0]}: {first_line(error)})",
                positions,
            ) from error
        raise


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
            if store.data.exists() and store.exists():
                raise GalleryError(f"{folder}: there is a gallery already; open it to add faces")
            if folder.exists() and any(p.name not in _OURS for p in folder.iterdir()):
                raise GalleryError(f"{folder}: expected an empty folder, or none, got one with other files in it")
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GalleryError(f"{folder}: cannot be written ({error.strerror})") from error
        schema = layout.schema()
        with writer_lock(folder, 10.0), writing(folder):
            _lance().write_dataset(
                schema.empty_table(), str(store.data), mode="create", data_storage_version=_STORAGE_VERSION
            )
        return store

    def exists(self) -> bool:
        """Whether the folder holds a gallery."""
        return any((self.data / "_versions").glob("*.manifest"))

    def snapshot(self, version: int | None = None) -> tuple[Snapshot, ReaderLock]:
        """The newest version or a chosen one, held until its lock is released.

        Raises:
            GalleryError: it is not a gallery, or one of another format, or there is no such version.
        """
        if not self.folder.is_dir():
            raise GalleryError(f"{self.folder}: there is no such gallery")
        if not self.data.is_dir():
            raise GalleryError(f"{self.folder}: expected a gallery, got another folder (it has no {_DATA})")
        while True:
            try:
                dataset = _lance().dataset(str(self.data), version=version)
            except Exception as error:
                if version is not None and self._has_version():
                    raise GalleryError(
                        f"{self.folder}: version {version} cannot be opened ({first_line(error)})"
                    ) from error
                raise GalleryDamagedError(f"{self.folder}: cannot be opened ({first_line(error)})") from error
            lock = ReaderLock(self.folder, int(dataset.version))
            # Compacted away between opening and locking: look again.
            if self.latest() == dataset.version or any(v["version"] == dataset.version for v in dataset.versions()):
                break
            lock.release()
            if version is not None:
                raise GalleryError(f"{self.folder}: version {version} is gone: it was compacted meanwhile")
        try:
            return Snapshot(dataset, Layout.from_schema(dataset.schema)), lock
        except GalleryError as error:
            lock.release()
            raise type(error)(f"{self.folder}: {error}") from error
        except Exception as error:
            lock.release()
            raise GalleryDamagedError(f"{self.folder}: cannot be opened ({first_line(error)})") from error

    def latest(self) -> int:
        """Number of the newest version."""
        return int(_lance().dataset(str(self.data)).version)

    def writer(self, timeout: float) -> contextlib.AbstractContextManager[None]:
        """Be the only writer; see :func:`writer_lock`."""
        return writer_lock(self.folder, timeout)

    def append(self, table: pa.Table) -> None:
        """Add rows in one commit; the caller is the writer."""
        with writing(self.folder):
            _lance().write_dataset(table, str(self.data), mode="append")

    def upsert(self, table: pa.Table) -> None:
        """Add rows, or put them in the place of those with the same ids, in one commit."""
        with writing(self.folder):
            dataset = _lance().dataset(str(self.data))
            dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def existing(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that the newest version has."""
        pa = _pyarrow()
        import pyarrow.compute as pc

        wanted = pa.array(list(ids), pa.string())
        found: set[str] = set()
        if len(wanted):
            snapshot, lock = self.snapshot()
            try:
                for batch in snapshot.ids():
                    found.update(batch.filter(pc.is_in(batch, value_set=wanted)).to_pylist())
            finally:
                lock.release()
        return found

    def delete(self, snapshot: Snapshot, places: np.ndarray) -> None:
        """Delete rows of the newest version in one commit; the caller is the writer."""
        numbers, firsts = snapshot._starts
        index = np.searchsorted(firsts, places, side="right") - 1
        addresses = (numbers[index] << 32) | (places - firsts[index])
        with writing(self.folder):
            _lance().dataset(str(self.data)).delete(f"_rowaddr IN ({','.join(map(str, addresses.tolist()))})")

    def compact(self, timeout: float, tick: Callable[[str], None]) -> dict[str, int]:
        """Rewrite without the deleted rows, then delete every file of older versions; the caller is the writer.

        Raises:
            GalleryBusyError: somebody still reads an older version after ``timeout`` seconds. The newest version is
                compact; the older files are still there.
        """
        before = folder_bytes(self.data)
        with writing(self.folder):
            dataset = _lance().dataset(str(self.data))
            tick("rewriting")
            # Few rows at a time: its buffers are what a compaction's memory is made of.
            metrics = dataset.optimize.compact_files(
                materialize_deletions_threshold=0.0, batch_size=1024, num_threads=1
            )
        tick("deleting old versions")
        current = self.latest()
        end = time.monotonic() + timeout
        while readers := old_readers(self.folder, current):
            if time.monotonic() >= end:
                raise GalleryBusyError(
                    f"{self.folder}: rewritten, but version {readers[0]} is still being read after {timeout:g} s, so "
                    "old files stay; compact again when its readers have closed or refreshed the gallery"
                )
            time.sleep(0.05)
        with writing(self.folder):
            _lance().dataset(str(self.data)).cleanup_old_versions(
                older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
            )
        return {
            "fragments_removed": int(metrics.fragments_removed),
            "fragments_added": int(metrics.fragments_added),
            "bytes_before": before,
            "bytes_after": folder_bytes(self.data),
        }


_OURS = (_DATA, "writer.lock", "readers", "tiles", "faiss")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_size
    return total


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the engine's failures to write into one error; a commit that failed left the gallery as it was."""
    try:
        yield
    except GalleryError:
        raise
    except Exception as error:
        text = first_line(error)
        for code, words in (("No space left", "the disk is full"), ("Permission denied", "permission denied")):
            if code in str(error):
                text = words
        raise GalleryError(f"{folder}: cannot be written ({text}); nothing was changed") from error
