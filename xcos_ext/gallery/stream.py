"""Galleries of any size, tile by tile: the next tile is read while this one is scored."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcos_ext.ops.templates import Templates

from .layout import Layout
from .snapshot import Fragment, Snapshot
from .tiles import TileCache, TileFile, stays_mapped

__all__ = ["Tile", "even_parts", "has_selected", "stream"]

# Tiles with fewer faces are put together: a kernel's start would cost more than its work.
_SMALL = 4096
# A part may begin this share of its size before or after its even place if that is where a tile begins.
_SHIFT = 1 / 20


@dataclass(frozen=True, eq=False)
class Tile:
    """Consecutive faces of a gallery.

    Attributes:
        first: place of the first.
        templates: of all, on the device that was asked for.
        excluded: bool [M] on that device, True where a face is deleted or not selected; None: nowhere.
        copied: on a GPU, the event that the copy is done.
    """

    first: int
    templates: Templates
    excluded: Tensor | None
    copied: Any = None


@dataclass(frozen=True, eq=False)
class _Piece:
    first: int
    templates: Templates
    release: Callable[[], None] | None


def stream(
    snapshot: Snapshot,
    cache: TileCache,
    device: torch.device,
    *,
    selected: np.ndarray | None = None,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[Tile]:
    """The tiles of a snapshot, in order; reading runs ahead in a thread of its own.

    Args:
        snapshot: what to read.
        cache: packed tiles; those that are missing are made on the way.
        device: where the templates are wanted. On a GPU they pass through two pinned buffers.
        selected: places, ascending, of the only faces that count; None: all. Tiles without any are not read.
        begin, end: places of a part. Tiles are made of fragments that are wanted whole.

    Raises:
        GalleryDamagedError: rows that are not what was written.
    """
    end = snapshot.places if end is None else end
    pieces = _pieces(snapshot, cache, selected, begin, end)
    if device.type == "cuda":
        return _arrived(_ahead(_upload(pieces, snapshot, selected, device)), device)
    return _ahead(_in_memory(pieces, snapshot, selected))


def even_parts(snapshot: Snapshot, count: int) -> list[int]:
    """Where the parts of a snapshot begin and the last one ends: ``count + 1`` places.

    Parts are even, give or take a tenth; within that they begin where packed tiles do, as far as there are enough.
    """
    even = [snapshot.places * part // count for part in range(count + 1)]
    step = snapshot.layout.tile_rows
    starts = np.concatenate([[0], *(np.arange(f.first, f.first + f.rows, step) for f in snapshot.fragments)])
    for part in range(1, count):
        nearest = int(starts[np.abs(starts - even[part]).argmin()])
        if abs(nearest - even[part]) <= _SHIFT * snapshot.places / count:
            even[part] = nearest
    return even


def has_selected(selected: np.ndarray | None, first: int, rows: int) -> bool:
    """Whether any face of a part is selected."""
    if selected is None:
        return True
    at = int(np.searchsorted(selected, first))
    return at < len(selected) and selected[at] < first + rows


def _pieces(
    snapshot: Snapshot, cache: TileCache, selected: np.ndarray | None, begin: int, end: int
) -> Iterator[_Piece]:
    """Templates in memory, in order, small ones put together."""
    waiting: list[_Piece] = []
    count = 0
    for piece in _raw_pieces(snapshot, cache, selected, begin, end):
        rows = len(piece.templates)
        follows = not waiting or piece.first == waiting[-1].first + len(waiting[-1].templates)
        if waiting and (not follows or count + rows > cache.layout.tile_rows or rows >= _SMALL):
            yield _joined(waiting)
            waiting, count = [], 0
        if rows >= _SMALL:
            yield piece
        else:
            waiting.append(piece)
            count += rows
    if waiting:
        yield _joined(waiting)


def _joined(pieces: list[_Piece]) -> _Piece:
    if len(pieces) == 1:
        return pieces[0]
    templates = Templates.cat([p.templates for p in pieces])
    for piece in pieces:
        _release(piece)
    return _Piece(pieces[0].first, templates, None)


def _raw_pieces(
    snapshot: Snapshot, cache: TileCache, selected: np.ndarray | None, begin: int, end: int
) -> Iterator[_Piece]:
    layout = snapshot.layout
    for fragment in snapshot.fragments:
        if fragment.first >= end or fragment.first + fragment.rows <= begin:
            continue
        if not has_selected(selected, fragment.first, fragment.rows):
            continue
        # Whoever wants a part need not read the rest, which may be far larger, to write it down.
        whole = begin <= fragment.first and fragment.first + fragment.rows <= end
        for _ in range(2):
            file = cache.file(fragment) or (cache.write(snapshot, fragment) if whole else None)
            if file is None:
                break
            try:
                yield from _mapped(file, fragment, layout, selected, begin, end)
                break
            except _Damaged as damage:
                # Derived data: make it again, and go on with the first face that has not been given yet.
                cache.drop(fragment)
                begin, file = max(begin, damage.first), None
        if file is None:
            first = max(begin, fragment.first)
            last = min(end, fragment.first + fragment.rows)
            for batch in snapshot.fragment_batches(fragment, first - fragment.first, last - fragment.first):
                yield _Piece(first, layout.templates(batch), None)
                first += batch.num_rows


class _Damaged(Exception):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first


def _mapped(
    file: TileFile,
    fragment: Fragment,
    layout: Layout,
    selected: np.ndarray | None,
    begin: int,
    end: int,
) -> Iterator[_Piece]:
    for index in range(file.tiles):
        first = fragment.first + index * layout.tile_rows
        rows = min(layout.tile_rows, fragment.first + fragment.rows - first)
        if first >= end or first + rows <= begin or not has_selected(selected, first, rows):
            continue
        file.prefetch(index + 1)  # the disk reads it while this one is checked and scored
        try:
            batch = file.batch(index)
        except ValueError as error:
            raise _Damaged(first) from error
        release = None if stays_mapped(layout, first - begin) else partial(file.release, batch)
        piece = _cut(_Piece(first, layout.templates(batch), release), begin, end)
        if piece is not None:
            yield piece


def _cut(piece: _Piece, begin: int, end: int) -> _Piece | None:
    low, high = max(begin - piece.first, 0), min(end - piece.first, len(piece.templates))
    if low >= high:
        return None
    if (low, high) == (0, len(piece.templates)):
        return piece
    return _Piece(piece.first + low, piece.templates[low:high], piece.release)


def _excluded(snapshot: Snapshot, selected: np.ndarray | None, first: int, rows: int) -> Tensor | None:
    """Which faces of a part do not count; None: all do."""
    deleted = snapshot.deleted
    low, high = np.searchsorted(deleted, (first, first + rows))
    if selected is None and low == high:
        return None
    excluded = np.zeros(rows, dtype=bool)
    if selected is not None:
        excluded[:] = True
        a, b = np.searchsorted(selected, (first, first + rows))
        excluded[selected[a:b] - first] = False
    excluded[deleted[low:high] - first] = True
    return torch.from_numpy(excluded)


def _in_memory(pieces: Iterator[_Piece], snapshot: Snapshot, selected: np.ndarray | None) -> Iterator[Tile]:
    mapped: deque[_Piece] = deque()
    for piece in pieces:
        excluded = _excluded(snapshot, selected, piece.first, len(piece.templates))
        yield Tile(piece.first, piece.templates, excluded)
        mapped.append(piece)
        # The queue took this one, so the consumer has the one before, and is done with the one before that.
        if len(mapped) > 2:
            _release(mapped.popleft())
    for piece in mapped:
        _release(piece)


def _release(piece: _Piece) -> None:
    if piece.release is not None:
        piece.release()


def _upload(
    pieces: Iterator[_Piece], snapshot: Snapshot, selected: np.ndarray | None, device: torch.device
) -> Iterator[Tile]:
    """Through two pinned buffers: one is filled while the other's copy to the GPU runs on a stream of its own."""
    layout = snapshot.layout.on(device)
    side = torch.cuda.Stream(device)
    buffers: list[dict[str, Tensor]] = [{}, {}]
    copied: list[Any] = [None, None]
    for turn, piece in enumerate(pieces):
        rows, buffer = len(piece.templates), buffers[turn % 2]
        if copied[turn % 2] is not None:
            copied[turn % 2].synchronize()  # the buffer is free

        def sent(name: str, source: Tensor, buffer: dict[str, Tensor] = buffer) -> Tensor:
            pinned = buffer.get(name)
            if pinned is None or len(pinned) < len(source):
                pinned = buffer[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            return pinned[: len(source)].copy_(source).to(device, non_blocking=True)

        excluded = _excluded(snapshot, selected, piece.first, rows)
        with torch.cuda.stream(side):
            tensors = {
                column.name: sent(column.name, getattr(piece.templates, column.name)) for column in layout.columns
            }
            excluded = None if excluded is None else sent("excluded", excluded)
            copied[turn % 2] = side.record_event()
        _release(piece)
        yield Tile(piece.first, layout.assemble(tensors), excluded, copied[turn % 2])


def _arrived(tiles: Iterator[Tile], device: torch.device) -> Iterator[Tile]:
    """Tiles whose copies the caller's stream waits for, and whose memory waits for the caller's stream."""
    for tile in tiles:
        current = torch.cuda.current_stream(device)
        current.wait_event(tile.copied)
        templates = tile.templates
        for tensor in (templates.features, templates.norms, templates.projection, templates.bias, tile.excluded):
            if tensor is not None:
                tensor.record_stream(current)
        yield tile


def _ahead(tiles: Iterator[Tile]) -> Iterator[Tile]:
    """Run an iterator one step ahead in a thread."""
    ready: queue.Queue[Any] = queue.Queue(1)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            with torch.no_grad():
                for tile in tiles:
                    if not put(tile):
                        break
                else:
                    put(None)
        except BaseException as error:  # handed to the caller's thread
            put(error)
        finally:
            close = getattr(tiles, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="xcos-gallery-reader", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
