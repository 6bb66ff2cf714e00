"""Packed tiles: templates as the kernels read them, in Arrow files that are mapped into memory and scored in place.

They are derived from the store, a file for each of its fragments, and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from xcos_ext.io.optional import gallery_package
from xcos_ext.ops.templates import Templates

from .layout import Layout, column_span, damaged_rows
from .snapshot import Fragment, Snapshot, reading

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
    state = gallery_package("xxhash").xxh3_64(index.to_bytes(8, "little"))
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
        pa = gallery_package("pyarrow")
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

    def trust(self) -> None:
        """Spare the check: this process has just written the file."""
        self._checked.update(range(self.tiles))

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

    def write(self, snapshot: Snapshot, fragment: Fragment) -> TileFile | None:
        """Write a fragment's tiles down; None where the cache cannot be written (a read-only folder, a full disk).

        Raises:
            GalleryDamagedError: rows that are not what was written.
        """
        if not self.writable:
            return None
        assert self.folder is not None
        pa, schema = gallery_package("pyarrow"), self.layout.tile_schema()
        # Readers of older versions may still see deleted rows, and must learn of damage in them: no tiles then.
        damaged: list[bool] = []
        # Derived data: io.atomic would wait until they are on the disk.
        temporary = self.folder / f".{fragment.key}-{os.getpid()}-{threading.get_ident()}.tmp"
        try:
            self.folder.mkdir(exist_ok=True)
            with pa.ipc.new_file(str(temporary), schema, metadata=_metadata(fragment)) as file:
                for index, rows in enumerate(snapshot.fragment_batches(fragment, dead=lambda: damaged.append(True))):
                    batch = rows.cast(schema)
                    file.write_batch(batch, custom_metadata={b"xxh3": _digest(batch, self.layout, index)})
            if damaged:
                return None
            os.replace(temporary, self._path(fragment))
        except OSError:
            self.writable = False
            return None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        found = self.file(fragment)
        if found is not None:
            found.trust()
        return found

    def purge(self, keep: set[str]) -> None:
        """Delete the tiles of all fragments but these, and what interrupted writers left."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.suffix != ".arrow" or path.stem not in keep:
                self._open.pop(path.stem, None)
                with contextlib.suppress(OSError):
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
