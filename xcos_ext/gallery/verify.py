"""Reading a whole gallery and comparing it with the checksums that it was written with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xcos_ext.errors import GalleryDamagedError

from .layout import checked_labels, damaged_rows
from .store import Fragment, Snapshot, Store, reading
from .tiles import TileCache

__all__ = ["verify"]

_ROWS = 4096  # compared at a time


def verify(store: Store, snapshot: Snapshot, tiles: TileCache, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """See :meth:`xcos_ext.gallery.Gallery.verify`."""
    damaged: list[dict[str, Any]] = []
    unreadable: list[dict[str, Any]] = []
    dropped: list[str] = []
    read = 0
    try:
        store.check(snapshot.dataset)
    except GalleryDamagedError as error:
        unreadable.append({"files": [], "positions": [], "reason": str(error)})
    for fragment in snapshot.fragments:
        try:
            for rows, found in _damage(snapshot, fragment):
                damaged += found
                read += rows
                tick(read, snapshot.rows)
        except GalleryDamagedError as error:
            unreadable.append({"files": list(fragment.paths), "positions": list(error.rows), "reason": str(error)})
        try:
            whole = not tiles.verify(snapshot, fragment)
        except GalleryDamagedError:
            whole = False
        if not whole:
            tiles.drop(fragment)
            dropped.append(f"{fragment.key}.arrow")
    return {
        "ok": not damaged and not unreadable,
        "faces": read,
        "damaged": damaged,
        "unreadable": unreadable,
        "tiles_dropped": dropped,
    }


def _damage(snapshot: Snapshot, fragment: Fragment) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(rows read, what is damaged among them) of a fragment, some rows at a time."""
    alive = np.setdiff1d(np.arange(fragment.rows), fragment.deleted)
    positions = snapshot.positions(fragment.first + alive)
    columns = [field.name for field in snapshot.layout.schema()]
    done = 0
    with reading(snapshot, fragment):
        chosen = [snapshot.dataset.get_fragment(fragment.number)]
        for batch in snapshot.scan(columns, fragments=chosen, batch_size=min(snapshot.layout.tile_rows, _ROWS)):
            wrong: dict[int, list[str]] = {}
            labels, wrong_labels = checked_labels(batch)
            for what, rows in (("template", damaged_rows(snapshot.layout, batch)), ("labels", wrong_labels)):
                for row in rows:
                    wrong.setdefault(row, []).append(what)
            yield (
                batch.num_rows,
                [
                    {
                        "position": int(positions[done + row]),
                        "id": labels["id"][row],
                        "damaged": wrong[row],
                    }
                    for row in sorted(wrong)
                ],
            )
            done += batch.num_rows
    if done != len(alive):
        raise snapshot.damage(fragment, alive[done:].tolist())
