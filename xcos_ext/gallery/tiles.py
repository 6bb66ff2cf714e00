"""Packed tiles: templates as the kernels read them, in Arrow files that are mapped into memory and scored in place.

They are derived from the store, a file for each of its fragments, and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xcos_ext.io.atomic import ordinary_mode
from xcos_ext.ops.templates import Templates

from ._packages import pyarrow as _pyarrow
from ._packages import xxhash as _xxhash
from .layout import Layout, column_span, damaged_rows
from .locks import try_lock
from .store import Fragment, Snapshot, reading

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["MAPPED_BYTES", "TileCache", "TileFile"]

#: So much of what is read stays mapped; what follows is unmapped behind the reader, so that memory does not grow.
MAPPED_BYTES = 640 << 20

_PAGE = os.sysconf("SC_PAGE_SIZE")
_WILL_NEED, _DONT_NEED = 3, 4  # madvise(2)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _advise(address: int, size: int, advice: int) -> None:
    start = address // _PAGE * _PAGE
    if size:
        _libc.madvise(start, address + size - start, advice)  # advice: a failure costs time, not truth


def _digest(batch: pa.RecordBatch, layout: Layout, index: int) -> bytes:
    """Checksum of a tile's arrays and of which tile it is."""
    state = _xxhash().xxh3_64(index.to_bytes(8, "little"))
    for address, size in _spans(batch, layout):
        state.update((ctypes.c_char * size).from_address(address))
    return state.hexdigest().encode()


def _spans(batch: pa.RecordBatch, layout: Layout) -> list[tuple[int, int]]:
    return [column_span(batch.column(c.name), c) for c in layout.columns]


def stays_mapped(layout: Layout, place: int) -> bool:
    """Whether a tile that begins so many faces into what is read stays mapped after its use."""
    return place * layout.face_bytes < MAPPED_BYTES


class TileFile:
    """The tiles of one fragment, mapped.

    Args:
        path: of the Arrow file.
        fragment: whose rows it holds.
        layout: of the templates.

    Raises:
        ValueError, OSError: it is not that fragment's file, or is damaged.
    """

    def __init__(self, path: Path, fragment: Fragment, layout: Layout) -> None:
        pa = _pyarrow()
        self.path = path
        self._layout = layout
        self._rows = fragment.rows
        # The memory stays mapped as long as it is used, the file is not kept open: there may be thousands.
        with pa.memory_map(str(path)) as file:
            memory = file.read_buffer()
        self._reader = pa.ipc.open_file(pa.BufferReader(memory))
        if not self._reader.schema.equals(layout.tile_schema()):
            raise ValueError("other columns")
        if self._reader.metadata != _metadata(fragment):
            raise ValueError("another fragment's")
        self.tiles = -(-fragment.rows // layout.tile_rows)
        if self._reader.num_record_batches != self.tiles:
            raise ValueError("another number of tiles")
        self._checked: set[int] = set()

    def batch(self, index: int) -> pa.RecordBatch:
        """A tile's rows, checked when this process first reads them.

        Raises:
            ValueError: they are not what was written.
        """
        try:
            batch, custom = self._reader.get_batch_with_custom_metadata(index)
            if index in self._checked:
                return batch
            batch.validate()  # that arrays lie within the file, before they are touched
        except Exception as error:  # whatever Arrow says of damage
            raise ValueError(f"tile {index} is damaged ({error})") from error
        step = self._layout.tile_rows
        rows = min(step, self._rows - index * step)
        if batch.num_rows != rows or _digest(batch, self._layout, index) != (custom or {}).get(b"xxh3"):
            raise ValueError(f"tile {index} is damaged")
        self._checked.add(index)
        return batch

    def prefetch(self, index: int) -> None:
        """Ask for a tile's pages ahead of their use; nothing where there is no such tile."""
        if index < self.tiles:
            with contextlib.suppress(Exception):  # of damage :meth:`batch` will tell
                for span in _spans(self._reader.get_batch(index), self._layout):
                    _advise(*span, _WILL_NEED)

    def release(self, batch: pa.RecordBatch) -> None:
        """Unmap a tile's pages: they stay in the system's cache, not in this process."""
        for span in _spans(batch, self._layout):
            _advise(*span, _DONT_NEED)


def _metadata(fragment: Fragment) -> dict[bytes, bytes]:
    return {b"fragment": fragment.key.encode(), b"rows": str(fragment.rows).encode()}


class TileCache:
    """The folder of packed tiles.

    Args:
        folder: is made when it is first written to. None: there is no cache.
        layout: of the templates.
    """

    def __init__(self, folder: Path | None, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self._open: dict[str, TileFile] = {}
        self._swept = False
        self.writable = folder is not None

    def _path(self, fragment: Fragment) -> Path:
        assert self.folder is not None
        return self.folder / f"{fragment.key}.arrow"

    def file(self, fragment: Fragment) -> TileFile | None:
        """A fragment's tiles if they are there and whole."""
        if self.folder is None:
            return None
        known = self._open.get(fragment.key)
        if known is not None:
            return known
        path = self._path(fragment)
        try:
            file = TileFile(path, fragment, self.layout)
        except Exception as error:
            if not (isinstance(error, OSError) and error.errno is not None):
                # Whatever Arrow says of a damaged file, the system does not: tiles are derived, and made again.
                self.drop(fragment)
            return None
        self._open[fragment.key] = file
        return file

    def drop(self, fragment: Fragment) -> None:
        """Forget a fragment's tiles."""
        self._open.pop(fragment.key, None)
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self._path(fragment).unlink(missing_ok=True)

    def build(self, snapshot: Snapshot, fragment: Fragment) -> Iterator[pa.RecordBatch]:
        """A fragment's rows from the store, a tile at a time, while they are written down for the next time.

        Where the cache cannot be written (a read-only folder, a full disk) the rows come all the same.

        Raises:
            GalleryDamagedError: rows that are not what was written.
        """
        sink = _Sink.open(self, fragment) if self.writable else None
        # Readers of older versions may still see deleted rows, and must learn of damage in them: no tiles then.
        dead = None if sink is None else sink.discard
        try:
            for batch in snapshot.fragment_batches(fragment, dead=dead):
                if sink is not None:
                    sink.write(batch)
                yield batch
            if sink is not None:
                sink.finish()
        finally:
            if sink is not None:
                sink.discard()

    def write(self, snapshot: Snapshot, fragment: Fragment) -> None:
        """Write a fragment's tiles down without giving them out; nothing where the cache cannot be written.

        Raises:
            GalleryDamagedError: rows that are not what was written.
        """
        sink = _Sink.open(self, fragment) if self.writable else None
        if sink is None:
            return
        try:
            if all(sink.write(batch) for batch in snapshot.fragment_batches(fragment, dead=sink.discard)):
                sink.finish()
        finally:
            sink.discard()

    def purge(self, keep: set[str]) -> None:
        """Delete the tiles of all fragments but these, and what interrupted writers left."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.suffix != ".arrow" or path.stem not in keep:
                self._open.pop(path.stem, None)
                with contextlib.suppress(OSError):
                    path.unlink()

    def sweep(self) -> None:
        """Delete what killed writers had begun; once, before this process writes anything."""
        if self._swept or self.folder is None:
            return
        self._swept = True
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError), open(path, "r+b") as file:
                if try_lock(file.fileno(), fcntl.F_WRLCK):
                    path.unlink()

    def intact(self, fragment: Fragment) -> bool:
        """Whether a fragment's tiles, all of which are read, are as they were written; so are none."""
        if self.folder is None or not self._path(fragment).exists():
            return True
        try:
            file = TileFile(self._path(fragment), fragment, self.layout)
            for index in range(file.tiles):
                file.release(file.batch(index))
        except Exception:  # whatever Arrow says of damage
            return False
        return True


class _Sink:
    """A tile file that is being written; it takes its name when it is whole.

    Its lock, which ends with this process at the latest, tells it from what a killed one left.
    """

    def __init__(self, cache: TileCache, fragment: Fragment) -> None:
        assert cache.folder is not None
        pa = _pyarrow()
        self._cache, self._fragment = cache, fragment
        self._writer: Any = None
        self._tiles = 0
        cache.folder.mkdir(exist_ok=True)
        cache.sweep()
        self._lock, self._temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=cache.folder)
        try:
            try_lock(self._lock, fcntl.F_WRLCK)
            self._writer = pa.ipc.new_file(self._temporary, cache.layout.tile_schema(), metadata=_metadata(fragment))
        except OSError:
            self.discard()
            raise

    @classmethod
    def open(cls, cache: TileCache, fragment: Fragment) -> _Sink | None:
        """One for a fragment, if the cache can be written."""
        try:
            return cls(cache, fragment)
        except OSError:
            cache.writable = False
            return None

    def write(self, batch: pa.RecordBatch) -> bool:
        """Add a tile; False if the disk does not take it, or it has been discarded."""
        layout = self._cache.layout
        if self._writer is None:
            return False
        try:
            batch = batch.cast(layout.tile_schema())
            self._writer.write_batch(batch, custom_metadata={b"xxh3": _digest(batch, layout, self._tiles)})
        except OSError:
            self.discard()
            return False
        self._tiles += 1
        return True

    def finish(self) -> None:
        """Give the file its name, unless it has been discarded."""
        if self._writer is None:
            return
        try:
            self._writer.close()
            os.chmod(self._temporary, ordinary_mode())
            os.replace(self._temporary, self._cache._path(self._fragment))
        except OSError:
            pass
        finally:
            self.discard()

    def discard(self) -> None:
        """Delete the file, unless it has its name."""
        writer, self._writer = self._writer, None
        descriptor, self._lock = self._lock, -1
        with contextlib.suppress(Exception):
            writer.close()
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            os.close(descriptor)


def gather(layout: Layout, snapshot: Snapshot, cache: TileCache, places: np.ndarray) -> Templates:
    """Templates of chosen rows, in the order asked for.

    Raises:
        GalleryDamagedError: rows that are not what was written.
    """
    result = {c.name: torch.empty(len(places), *c.shape, dtype=c.dtype) for c in layout.columns}
    if len(places) > 1 and (np.diff(places) < 0).any():
        order = np.argsort(places, kind="stable")
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        return gather(layout, snapshot, cache, places[order])[back]
    firsts = [f.first for f in snapshot.fragments] + [snapshot.places]
    bounds = np.searchsorted(places, firsts)
    for fragment, begin, end in zip(snapshot.fragments, bounds[:-1], bounds[1:], strict=True):
        if begin == end:
            continue
        offsets = places[begin:end] - fragment.first
        parts = {name: out[begin:end] for name, out in result.items()}
        file = cache.file(fragment)
        if file is not None:
            try:
                _pick(layout, file, fragment.first, offsets, parts)
                continue
            except ValueError:  # derived data: read the truth instead
                cache.drop(fragment)
        _take(layout, snapshot, fragment, offsets, parts)
    return layout.assemble(result)


def _pick(layout: Layout, file: TileFile, place: int, offsets: np.ndarray, result: dict[str, torch.Tensor]) -> None:
    """Rows from the tiles of a fragment that begins at a place."""
    starts = np.arange(file.tiles + 1) * layout.tile_rows
    limits = np.searchsorted(offsets, starts[1:])
    first = 0
    for index, last in enumerate(limits):
        if last > first:
            batch = file.batch(index)
            tile = layout.templates(batch)
            chosen = torch.from_numpy(offsets[first:last] - starts[index])
            for name, part in result.items():
                # Rows of one dimension are copied whole: twice as fast as rows of two.
                torch.index_select(getattr(tile, name).flatten(1), 0, chosen, out=part[first:last].flatten(1))
            if not stays_mapped(layout, place + int(starts[index])):
                file.release(batch)
            first = last


def _take(
    layout: Layout,
    snapshot: Snapshot,
    fragment: Fragment,
    offsets: np.ndarray,
    result: dict[str, torch.Tensor],
) -> None:
    """Rows straight from the store, checked."""
    unique, inverse = np.unique(snapshot.positions(fragment.first + offsets), return_inverse=True)
    columns = [field.name for field in layout.tile_schema()]
    with reading(snapshot, fragment):
        table = snapshot.dataset.take(unique.tolist(), columns=columns)
        batch = table.combine_chunks().to_batches()[0]
        wrong = damaged_rows(layout, batch)
    if wrong:
        offset = snapshot.places_of(unique[wrong]) - fragment.first
        raise snapshot.damage(fragment, offset.tolist())
    taken = layout.templates(batch)
    index = torch.from_numpy(inverse)
    for name, out in result.items():
        torch.index_select(getattr(taken, name).flatten(1), 0, index, out=out.flatten(1))
