"""Reading a whole gallery and comparing it with the checksums that it was written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xcos_ext.io.errors import GalleryDamagedError

from .labels import checked_labels
from .layout import damaged_rows
from .snapshot import Snapshot, first_line, ranges, reading
from .store import Store
from .tiles import TileCache

__all__ = ["verify"]

_ROWS = 4096  # compared at a time


def verify(store: Store, snapshot: Snapshot, tiles: TileCache, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """See :meth:`xcos_ext.gallery.Gallery.verify`."""
    damaged: list[dict[str, Any]] = []
    unreadable: list[dict[str, Any]] = []
    dropped: list[str] = []
    read = 0
    columns = snapshot.layout.schema().names

    def note(found: list[dict[str, Any]], rows: int) -> None:
        nonlocal read
        damaged.extend(found)
        read += rows
        tick(read, snapshot.rows)

    try:
        store.check(snapshot.dataset)
    except GalleryDamagedError as error:
        unreadable.append({"files": [], "positions": [], "reason": str(error)})
    for fragment in snapshot.fragments:
        alive = np.setdiff1d(np.arange(fragment.rows), fragment.deleted)
        positions = snapshot.positions(fragment.first + alive)
        start = read
        try:
            for batch in snapshot.scan(columns, fragment, batch_size=min(snapshot.layout.tile_rows, _ROWS)):
                with reading(snapshot, fragment):
                    found = _damage(snapshot, batch, positions[read - start : read - start + batch.num_rows])
                note(found, batch.num_rows)
            if read - start != len(alive):
                raise GalleryDamagedError(
                    f"gallery: {fragment.paths[0]}: expected {len(alive)} rows, got {read - start}"
                )
            snapshot.probe(fragment)
        except GalleryDamagedError as error:
            unread: list[int] = []  # one bit can make thousands of rows unreadable at once, and few of them alone
            for part, rows in snapshot.pieces(positions[read - start :], columns):
                if rows is None:
                    unread += part.tolist()
                else:
                    note(_damage(snapshot, rows.combine_chunks().to_batches()[0], part), rows.num_rows)
            reason = f"positions {ranges(unread)}" if unread else "some columns alone, or all faces together"
            reason += f" ({', '.join(fragment.paths)}: {first_line(error.__cause__ or error)})"
            unreadable.append({"files": list(fragment.paths), "positions": unread, "reason": reason})
        if not tiles.intact(fragment):
            tiles.drop(fragment)
            dropped.append(f"{fragment.key}.arrow")
    return {
        "ok": not damaged and not unreadable,
        "faces": read,
        "damaged": damaged,
        "unreadable": unreadable,
        "tiles_dropped": dropped,
    }


def _damage(snapshot: Snapshot, batch: Any, positions: np.ndarray) -> list[dict[str, Any]]:
    """What is damaged in rows at these positions."""
    wrong: dict[int, list[str]] = {}
    labels, wrong_labels = checked_labels(batch)
    for what, rows in (("template", damaged_rows(snapshot.layout, batch)), ("labels", wrong_labels)):
        for row in rows:
            wrong.setdefault(row, []).append(what)
    return [{"position": int(positions[row]), "id": labels["id"][row], "damaged": wrong[row]} for row in sorted(wrong)]
