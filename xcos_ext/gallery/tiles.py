"""Packed tiles: templates as the kernels read them, in Arrow files that are mapped into memory and scored in place.

They are derived from the store, a file for each of its fragments, and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xcos_ext.errors import GalleryDamagedError
from xcos_ext.templates import Templates

from ._packages import pyarrow as _pyarrow
from ._packages import xxhash as _xxhash
from .layout import Layout, column_span, damaged_rows
from .store import Fragment, Snapshot

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["TileCache", "TileFile"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_WILL_NEED, _DONT_NEED = 3, 4  # madvise(2)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _advise(address: int, size: int, advice: int) -> None:
    start = address // _PAGE * _PAGE
    if size:
        _libc.madvise(start, address + size - start, advice)  # advice: a failure costs time, not truth


def _digest(batch: pa.RecordBatch, layout: Layout) -> bytes:
    """Checksum of a tile's arrays."""
    state = _xxhash().xxh3_64()
    for address, size in _spans(batch, layout):
        state.update((ctypes.c_char * size).from_address(address))
    return state.hexdigest().encode()


def _spans(batch: pa.RecordBatch, layout: Layout) -> list[tuple[int, int]]:
    return [column_span(batch.column(c.name), c) for c in layout.columns]


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
        self._map = pa.memory_map(str(path))
        self._reader = pa.ipc.open_file(self._map)
        if not self._reader.schema.equals(layout.tile_schema()):
            raise ValueError("other columns")
        if (self._reader.metadata or {}).get(b"rows") != str(fragment.rows).encode():
            raise ValueError("another number of rows")
        self.tiles = self._reader.num_record_batches
        self._checked: set[int] = set()

    def batch(self, index: int) -> pa.RecordBatch:
        """A tile's rows, checked when this process first reads them.

        Raises:
            ValueError: they are not what was written.
        """
        batch, custom = self._reader.get_batch_with_custom_metadata(index)
        if index not in self._checked:
            if _digest(batch, self._layout) != (custom or {}).get(b"xxh3"):
                raise ValueError(f"tile {index} is damaged")
            self._checked.add(index)
        return batch

    def prefetch(self, batch: pa.RecordBatch) -> None:
        """Ask for a tile's pages ahead of their use."""
        for span in _spans(batch, self._layout):
            _advise(*span, _WILL_NEED)

    def release(self, batch: pa.RecordBatch) -> None:
        """Unmap a tile's pages: they stay in the system's cache, not in this process."""
        for span in _spans(batch, self._layout):
            _advise(*span, _DONT_NEED)


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
        except FileNotFoundError:
            return None
        except Exception:  # whatever Arrow says of a damaged file: tiles are derived, so they are made again
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
        sink: _Sink | None = None
        if self.writable:
            sink = _Sink.open(self, fragment)
        try:
            for batch in snapshot.fragment_batches(fragment):
                if sink is not None and not sink.write(batch):
                    sink = None
                yield batch
            if sink is not None:
                sink.finish()
                sink = None
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
            if all(sink.write(batch) for batch in snapshot.fragment_batches(fragment)):
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

    def verify(self, snapshot: Snapshot, fragment: Fragment) -> list[int] | None:
        """Offsets of a fragment's damaged rows; None if there are no tiles or the file cannot be read at all."""
        if self.folder is None or not self._path(fragment).exists():
            return None
        try:
            file = TileFile(self._path(fragment), fragment, self.layout)
            wrong, done = [], 0
            for index in range(file.tiles):
                batch = file._reader.get_batch(index)
                wrong += [done + row for row in damaged_rows(self.layout, batch)]
                done += batch.num_rows
                file.release(batch)
        except Exception as error:
            raise GalleryDamagedError(f"gallery: {self._path(fragment).name} cannot be read ({error})") from error
        return wrong


class _Sink:
    """A tile file that is being written; it takes its name when it is whole."""

    def __init__(self, cache: TileCache, fragment: Fragment, temporary: str, writer: Any) -> None:
        self._cache, self._fragment, self._temporary, self._writer = cache, fragment, temporary, writer

    @classmethod
    def open(cls, cache: TileCache, fragment: Fragment) -> _Sink | None:
        assert cache.folder is not None
        pa = _pyarrow()
        try:
            cache.folder.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=cache.folder)
            os.close(handle)
            writer = pa.ipc.new_file(
                temporary, cache.layout.tile_schema(), metadata={b"rows": str(fragment.rows).encode()}
            )
        except OSError:
            cache.writable = False
            return None
        return cls(cache, fragment, temporary, writer)

    def write(self, batch: pa.RecordBatch) -> bool:
        """Add a tile; False if the disk does not take it."""
        layout = self._cache.layout
        try:
            batch = batch.cast(layout.tile_schema())
            self._writer.write_batch(batch, custom_metadata={b"xxh3": _digest(batch, layout)})
        except OSError:
            self.discard()
            return False
        return True

    def finish(self) -> None:
        try:
            self._writer.close()
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(self._temporary, 0o666 & ~umask)
            os.replace(self._temporary, self._cache._path(self._fragment))
        except OSError:
            self.discard()

    def discard(self) -> None:
        with contextlib.suppress(Exception):
            self._writer.close()
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)


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
        if file is None:
            _take(layout, snapshot, fragment, offsets, parts)
            continue
        starts = np.arange(file.tiles + 1) * layout.tile_rows
        limits = np.searchsorted(offsets, starts[1:])
        first = 0
        for index, last in enumerate(limits):
            if last > first:
                tile = layout.templates(file.batch(index))
                chosen = torch.from_numpy(offsets[first:last] - starts[index])
                for name, part in parts.items():
                    # Rows of one dimension are copied whole: twice as fast as rows of two.
                    torch.index_select(getattr(tile, name).flatten(1), 0, chosen, out=part[first:last].flatten(1))
                first = last
    return layout.assemble(result)


def _take(
    layout: Layout,
    snapshot: Snapshot,
    fragment: Fragment,
    offsets: np.ndarray,
    result: dict[str, torch.Tensor],
) -> None:
    """Rows straight from the store, checked."""
    from .store import reading

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
