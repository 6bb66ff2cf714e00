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


def _spans(batch: pa.RecordBatch, layout: Layout) -> list[tuple[int, int]]:
    return [column_span(batch.column(c.name), c) for c in layout.columns]


def _digest(batch: pa.RecordBatch, layout: Layout, index: int) -> dict[bytes, bytes]:
    """Checksum of a tile's arrays and of which tile it is."""
    state = gallery_package("xxhash").xxh3_64(index.to_bytes(8, "little"))
    for address, size in _spans(batch, layout):
        state.update((ctypes.c_char * size).from_address(address))
    return {b"xxh3": state.hexdigest().encode()}


def _metadata(fragment: Fragment) -> dict[bytes, bytes]:
    return {b"fragment": fragment.key.encode(), b"rows": str(fragment.rows).encode()}


def stays_mapped(layout: Layout, place: int) -> bool:
    """Whether a tile that begins so many faces into what is read stays mapped after its use."""
    return place * layout.face_bytes < MAPPED_BYTES


class TileFile:
    """The tiles of one fragment, mapped; ValueError or OSError if it is not that fragment's file, or is damaged."""

    def __init__(self, path: Path, fragment: Fragment, layout: Layout) -> None:
        pa = gallery_package("pyarrow")
        self._layout, self._rows = layout, fragment.rows
        self.checked: set[int] = set()  # tiles that this process has compared with their checksums, or has written
        self.tiles = -(-fragment.rows // layout.tile_rows)
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a regular file")
        # The memory stays mapped as long as it is used, the file is not kept open: there may be thousands.
        with pa.memory_map(str(path)) as file:
            self._reader = pa.ipc.open_file(pa.BufferReader(file.read_buffer()))
        for what, found, wanted in (
            ("columns", self._reader.schema, layout.tile_schema()),
            ("fragment", self._reader.metadata, _metadata(fragment)),
            ("number of tiles", self._reader.num_record_batches, self.tiles),
        ):
            if found != wanted:
                raise ValueError(f"another {what}")

    def batch(self, index: int) -> pa.RecordBatch:
        """A tile's rows, checked when this process first reads them: ValueError if they are not what was written."""
        try:
            batch, custom = self._reader.get_batch_with_custom_metadata(index)
            if index in self.checked:
                return batch
            batch.validate()  # that arrays lie within the file, before they are touched
        except Exception as error:  # whatever Arrow says of damage
            raise ValueError(f"tile {index} is damaged ({error})") from error
        step = self._layout.tile_rows
        rows = min(step, self._rows - index * step)
        if batch.num_rows != rows or _digest(batch, self._layout, index) != dict(custom or {}):
            raise ValueError(f"tile {index} is damaged")
        self.checked.add(index)
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


class TileCache:
    """The folder of packed tiles: made when it is first written to; None: there is no cache."""

    def __init__(self, folder: Path | None, layout: Layout) -> None:
        self.folder = folder
        self._layout = layout
        self._open: dict[str, TileFile] = {}
        self._writable = folder is not None

    def _path(self, fragment: Fragment) -> Path:
        assert self.folder is not None
        return self.folder / f"{fragment.key}.arrow"

    def file(self, fragment: Fragment) -> TileFile | None:
        """A fragment's tiles if they are there and whole."""
        if self.folder is None:
            return None
        if fragment.key not in self._open:
            try:
                self._open[fragment.key] = TileFile(self._path(fragment), fragment, self._layout)
            except Exception as error:
                if not (isinstance(error, OSError) and error.errno is not None):
                    # Whatever Arrow says of a damaged file, the system does not: tiles are derived, and made again.
                    self.drop(fragment)
                return None
        return self._open[fragment.key]

    def drop(self, fragment: Fragment) -> None:
        """Forget a fragment's tiles."""
        self._open.pop(fragment.key, None)
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self._path(fragment).unlink(missing_ok=True)

    def write(self, snapshot: Snapshot, fragment: Fragment) -> TileFile | None:
        """Write a fragment's tiles down; None where the cache cannot be written (a read-only folder, a full disk)."""
        if self.folder is None or not self._writable:
            return None
        pa, schema = gallery_package("pyarrow"), self._layout.tile_schema()
        # Readers of older versions may still see deleted rows, and must learn of damage in them: no tiles then.
        damaged: list[bool] = []
        # Derived data: io.atomic would wait until they are on the disk.
        temporary = self.folder / f".{fragment.key}-{os.getpid()}-{threading.get_ident()}.tmp"
        try:
            self.folder.mkdir(exist_ok=True)
            with pa.ipc.new_file(str(temporary), schema, metadata=_metadata(fragment)) as file:
                for index, rows in enumerate(snapshot.fragment_batches(fragment, dead=lambda: damaged.append(True))):
                    batch = rows.cast(schema)
                    file.write_batch(batch, custom_metadata=_digest(batch, self._layout, index))
            if damaged:
                return None
            os.replace(temporary, self._path(fragment))
        except FileNotFoundError:  # swept by a compaction meanwhile: the next search tries again
            return None
        except OSError:
            self._writable = False
            return None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        found = self.file(fragment)
        if found is not None:
            found.checked.update(range(found.tiles))
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
            file = TileFile(self._path(fragment), fragment, self._layout)
            for index in range(file.tiles):
                file.release(file.batch(index))
        except Exception:  # whatever Arrow says of damage
            return False
        return True


def gather(snapshot: Snapshot, cache: TileCache, places: np.ndarray) -> Templates:
    """Templates of chosen rows, in the order asked for; GalleryDamagedError if they are not what was written."""
    layout = snapshot.layout
    if len(places) > 1 and (np.diff(places) < 0).any():
        order = np.argsort(places, kind="stable")
        return gather(snapshot, cache, places[order])[torch.from_numpy(np.argsort(order, kind="stable"))]
    result = {c.name: torch.empty(len(places), *c.shape, dtype=c.dtype, device="cpu") for c in layout.columns}

    def copy(batch: pa.RecordBatch, rows: np.ndarray, part: slice) -> None:
        chosen, faces = torch.from_numpy(rows), layout.templates(batch)
        for name, out in result.items():
            # Rows of one dimension are copied whole: twice as fast as rows of two.
            torch.index_select(getattr(faces, name).flatten(1), 0, chosen, out=out[part].flatten(1))

    def from_tiles(file: TileFile, fragment: Fragment, part: slice) -> None:
        offsets = places[part] - fragment.first
        for index in np.unique(offsets // layout.tile_rows).tolist():
            start = index * layout.tile_rows
            low, high = np.searchsorted(offsets, (start, start + layout.tile_rows))
            batch = file.batch(index)
            copy(batch, offsets[low:high] - start, slice(part.start + low, part.start + high))
            if not stays_mapped(layout, fragment.first + start):
                file.release(batch)

    def from_store(fragment: Fragment, part: slice) -> None:
        unique, inverse = np.unique(snapshot.positions(places[part]), return_inverse=True)
        with reading(snapshot, fragment):
            batch = snapshot.take(unique, layout.tile_columns).combine_chunks().to_batches()[0]
            wrong = damaged_rows(layout, batch)
        if wrong:
            raise snapshot.damage(fragment, (snapshot.places_of(unique[wrong]) - fragment.first).tolist())
        copy(batch, inverse, part)

    bounds = np.searchsorted(places, [f.first for f in snapshot.fragments] + [snapshot.places]).tolist()
    for fragment, begin, end in zip(snapshot.fragments, bounds[:-1], bounds[1:], strict=True):
        if begin < end:
            file = cache.file(fragment)
            try:
                if file is not None:
                    from_tiles(file, fragment, slice(begin, end))
                    continue
            except ValueError:  # derived data: read the truth instead
                cache.drop(fragment)
            from_store(fragment, slice(begin, end))
    return layout.assemble(result)
