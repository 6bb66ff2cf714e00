"""Galleries of any size, tile by tile: the next tile is read while this one is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xcos_ext.ops.templates import Templates

from .snapshot import Snapshot
from .tiles import TileCache, stays_mapped

__all__ = ["Tile", "even_parts", "has_selected", "stream"]

# Tiles with fewer faces are put together: a kernel's start would cost more than its work.
_SMALL = 4096
# A part may begin this share of its size before or after its even place if that is where a tile begins.
_SHIFT = 1 / 20


@dataclass(frozen=True, eq=False)
class Tile:
    """Consecutive faces of a gallery, on the device that was asked for."""

    first: int  # place of the first
    templates: Templates  # of all
    excluded: Tensor | None  # bool [M], True where a face is deleted or not selected; None: nowhere
    copied: Any = None  # on a GPU, the event that the copy is done


class _Piece(NamedTuple):
    first: int
    templates: Templates
    release: Callable[[], None] = lambda: None


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
    pieces = _put_together(_pieces(snapshot, cache, selected, begin, end), snapshot.layout.tile_rows)
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
    """Templates in memory, in order."""
    layout, step = snapshot.layout, snapshot.layout.tile_rows
    for f in snapshot.fragments:
        first, last = max(begin, f.first), min(end, f.first + f.rows)
        if first >= last or not has_selected(selected, f.first, f.rows):
            continue
        # Whoever wants a part need not read the rest, which may be far larger, to write it down.
        whole = again = last - first == f.rows
        file = cache.file(f) or (cache.write(snapshot, f) if whole else None)
        while file is not None and first < last:
            index = (first - f.first) // step
            start = f.first + index * step
            stop = min(start + step, last)
            if has_selected(selected, first, stop - first):
                file.prefetch(index + 1)  # the disk reads it while this one is checked and scored
                try:
                    batch = file.batch(index)
                except ValueError:
                    # Derived data: made again, once; on with the first face that has not been given yet.
                    cache.drop(f)
                    file, again = cache.write(snapshot, f) if again else None, False
                    continue
                templates = layout.templates(batch)
                if (first, stop) != (start, start + len(templates)):
                    templates = templates[first - start : stop - start]
                stays = stays_mapped(layout, start - begin)
                yield _Piece(first, templates) if stays else _Piece(first, templates, partial(file.release, batch))
            first = stop
        if first < last:
            for batch in snapshot.fragment_batches(f, first - f.first, last - f.first):
                yield _Piece(first, layout.templates(batch))
                first += batch.num_rows


def _put_together(pieces: Iterator[_Piece], most: int) -> Iterator[_Piece]:
    """The same with small ones put together, to ``most`` faces."""
    waiting: list[_Piece] = []
    for piece in pieces:
        after = piece.first + len(piece.templates)
        small = len(piece.templates) < _SMALL
        if waiting:
            follows = piece.first == waiting[-1].first + len(waiting[-1].templates)
            if not small or not follows or after - waiting[0].first > most:
                yield _joined(waiting)
                waiting = []
        if small:
            waiting.append(piece)
        else:
            yield piece
    if waiting:
        yield _joined(waiting)


def _joined(pieces: list[_Piece]) -> _Piece:
    if len(pieces) == 1:
        return pieces[0]
    templates = Templates.cat([piece.templates for piece in pieces])
    for piece in pieces:
        piece.release()
    return _Piece(pieces[0].first, templates)


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
    before: _Piece | None = None
    for piece in pieces:
        yield Tile(piece.first, piece.templates, _excluded(snapshot, selected, piece.first, len(piece.templates)))
        if before is not None:  # the consumer has this one now, and is done with that
            before.release()
        before = piece
    if before is not None:
        before.release()


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
                pinned = buffer[name] = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
            return pinned[: len(source)].copy_(source).to(device, non_blocking=True)

        excluded = _excluded(snapshot, selected, piece.first, rows)
        with torch.cuda.stream(side):
            tensors = {
                column.name: sent(column.name, getattr(piece.templates, column.name)) for column in layout.columns
            }
            excluded = None if excluded is None else sent("excluded", excluded)
            copied[turn % 2] = side.record_event()
        piece.release()
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
    step = torch.no_grad()(partial(next, tiles, None))  # a thread has a gradient mode of its own
    with ThreadPoolExecutor(1, "xcos-gallery-reader") as pool:
        waiting = pool.submit(step)
        while (tile := waiting.result()) is not None:
            waiting = pool.submit(step)
            yield tile
