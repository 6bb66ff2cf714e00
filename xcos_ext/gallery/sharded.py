"""One gallery searched by several processes, each its own part of the rows, with the results of one."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xcos_ext.io.errors import GalleryError
from xcos_ext.io.optional import gallery_package
from xcos_ext.ops.xcos_topk import XCosTopk, best_of

from .gallery import Gallery, StrPath
from .hits import Hits
from .layout import Layout
from .ranks import Ranks
from .search import WHERE, Request, Search, Searcher, Shard
from .snapshot import Snapshot
from .store import Store
from .stream import has_selected

__all__ = ["ShardedGallery"]

# A part may begin this share of its size before or after its even place if that is where a tile begins.
_SHIFT = 1 / 20


def cuts(snapshot: Snapshot, world: int) -> list[int]:
    """Where the parts of the ranks begin and the last one ends: ``world + 1`` places.

    Parts are even, give or take a tenth; within that they begin where packed tiles do, as far as there are enough.
    """
    even = [snapshot.places * rank // world for rank in range(world + 1)]
    step = snapshot.layout.tile_rows
    starts = np.concatenate([[0], *(np.arange(f.first, f.first + f.rows, step) for f in snapshot.fragments)])
    for rank in range(1, world):
        nearest = int(starts[np.abs(starts - even[rank]).argmin()])
        if abs(nearest - even[rank]) <= _SHIFT * snapshot.places / world:
            even[rank] = nearest
    return even


class _RankShard(Shard):
    """The part of one rank."""

    def __init__(self, ranks: Ranks, begin: int, end: int) -> None:
        self._ranks, self._part = ranks, (begin, end)

    def part(self, places: int) -> tuple[int, int]:
        return self._part

    def merge(self, lists: XCosTopk, k: int) -> XCosTopk:
        device = lists.values.device
        parts = self._ranks.exchange("merge", value=(lists.values.cpu(), lists.indices.cpu()))
        return best_of(*(torch.cat(columns, 1).to(device) for columns in zip(*parts, strict=True)), k)

    def reduce(self, table: Tensor, how: Literal["max", "sum"]) -> Tensor:
        return self._ranks.reduce(table, how)


class ShardedGallery(Searcher):
    """A gallery that all processes of a process group search together; :meth:`open` opens it.

    Every process opens the same folder, on storage that all of them see, scores its own contiguous part of the rows,
    and returns the hits of the whole. All of them make the same calls in the same order, each from one thread, with
    the same arguments, each on a device of its own; a process that makes another one, or fails, or is lost, is an error
    on all, not a wait without end.

    What :class:`xcos_ext.Gallery` finds is found here to the bit, ties included, with two exceptions. The mean over a
    person's faces (``person_fusion="mean"``) is summed in another order, and agrees within 1e-6. And on GPUs
    ``"uniform"``, ``"norm"`` and given attention are products of matrices, which are rounded differently for parts of
    other sizes.

    :meth:`search` also raises GalleryError where arguments are not the same on all ranks, or where the search failed on
    another rank, which the message names (searches may go on), and LostRankError where a rank was killed, stopped or
    cut off (nothing can be searched any more). Its ``progress`` is told of this rank's part.

    Attributes:
        rank, world: number of this process, and of all.
    """

    def __init__(self, path: StrPath, model: Any, group: Any, timeout: float, cache: StrPath | bool) -> None:
        self._ranks = Ranks(group, timeout)
        self.rank, self.world = self._ranks.rank, self._ranks.world
        self._store, self._model, self._cache = Store(Path(path)), model, cache
        self._gallery: Gallery | None = None
        self._state: dict[str, str] | None = None
        self._cuts: list[int] = []
        try:
            with self._ranks.together():
                self._agree("open")
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        path: StrPath,
        model: Any = None,
        *,
        group: Any = None,
        timeout: float = 60.0,
        cache: StrPath | bool = True,
    ) -> ShardedGallery:
        """Open a gallery at its newest version, the same on all ranks; all of them must call this.

        Args:
            path: of the folder.
            model: as in :meth:`Gallery.open`.
            group: process group of torch.distributed; None: the default one. Its ranks and their number are meant
                wherever ranks are spoken of here.
            timeout: seconds that a rank waits for the others before those that do not answer are lost. It has to be
                longer than the slowest rank takes more than the fastest, for a search and for packing tiles.
            cache: of packed tiles: True keeps them in the gallery's folder, for all; a folder of their own, such as one
                on each machine's disk; False: none.

        Raises:
            GalleryError: as :meth:`Gallery.open`; or there is no process group; or it failed on another rank.
            LostRankError: a rank is not there.
        """
        return cls(path, model, group, timeout, cache)

    # ------------------------------------------------------------------ state

    def __enter__(self) -> ShardedGallery:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the version go; the other ranks cannot search any more. The object must not be used afterwards."""
        if self._gallery is not None:
            self._gallery.close()
        self._ranks.close()

    def refresh(self) -> ShardedGallery:
        """Move to the newest version, the same on all ranks; all of them must call this. Returns this gallery.

        Raises:
            GalleryError, LostRankError: as :meth:`open`. Refresh again before the next search.
        """
        self._state = None
        with self._ranks.together():
            self._agree("refresh")
        return self

    def _agree(self, call: str) -> None:
        """Show the newest version that the first rank sees, who holds it, so that it is there for the others."""
        ranks = self._ranks
        if ranks.rank == 0:
            self._move_to(None)
        version = ranks.exchange(call, value=self.version if ranks.rank == 0 else None)[0]
        if ranks.rank != 0:
            self._move_to(version)
        snapshot = self._opened.snapshot
        files = _digest(repr([(f.key, f.rows) for f in snapshot.fragments]), snapshot.deleted)
        state = {"version": str(snapshot.version), "gallery": f"files {files}"}
        ranks.exchange("see", state)
        self._state, self._cuts = state, cuts(snapshot, self.world)

    def _move_to(self, version: int | None) -> None:
        if self._gallery is None:
            self._gallery = Gallery(self._store, self._model, self._cache, version=version)
        else:
            self._gallery._move_to(version)

    @property
    def _opened(self) -> Gallery:
        assert self._gallery is not None
        return self._gallery

    @property
    def path(self) -> Path:
        """Of the folder."""
        return self._opened.path

    @property
    def layout(self) -> Layout:
        """Shapes, dtype, head and model of the templates."""
        return self._opened.layout

    @property
    def version(self) -> int:
        """Number of the version that all ranks see."""
        return self._opened.version

    def __len__(self) -> int:
        return len(self._opened)

    def __repr__(self) -> str:
        return (
            f"ShardedGallery({str(self.path)!r}, faces={len(self)}, version={self.version}, rank={self.rank} of "
            f"{self.world})"
        )

    # ------------------------------------------------------------------ searching

    def _search(self, request: Request) -> Hits:
        ranks = self._ranks
        with ranks.together():
            if self._state is None:
                raise GalleryError(f"{WHERE}: version: expected one that all ranks agreed on; refresh() failed")
            shard = _RankShard(ranks, *self._cuts[self.rank : self.rank + 2])
            search = self._opened._checked(shard, request)
            streams = request.rerank is None or isinstance(request.coarse, str) or request.recall_probes > 0
            missing = self._missing(search) if streams else ("", [])
            self._pack(search, ranks.exchange("search", {**self._state, **_words(search)}, missing))
            hits = search.run()
            # Hits are read after the last exchange, and may be damaged for one rank alone.
            ranks.exchange("found")
        return hits

    def _missing(self, search: Search) -> tuple[str, list[int]]:
        """Where this rank keeps packed tiles, and the fragments of its part that lack them there."""
        tiles = search.tiles
        if tiles.folder is None or not tiles.writable:
            return "", []
        begin, end = search.shard.part(search.snapshot.places)
        missing = [
            index
            for index, f in enumerate(search.snapshot.fragments)
            if f.first < end
            and f.first + f.rows > begin
            and has_selected(search.selected, f.first, f.rows)
            and tiles.file(f) is None
        ]
        own = tiles.folder != self.path / "tiles"
        return f"{socket.gethostname()}:{tiles.folder.resolve()}" if own else "", missing

    def _pack(self, search: Search, needs: list[tuple[str, list[int]]]) -> None:
        """Write missing tiles, each fragment's by one of the ranks that miss them in the same place.

        Otherwise all ranks that share a fragment would read and write all of it, to use a part each.
        """
        if not any(missing for _, missing in needs):
            return
        own, missing = needs[self.rank]
        for index in missing:
            sharing = [rank for rank, (folder, theirs) in enumerate(needs) if folder == own and index in theirs]
            if sharing[index % len(sharing)] == self.rank:
                search.tiles.write(search.snapshot, search.snapshot.fragments[index])
        self._ranks.exchange("tiles")


def _words(search: Search) -> dict[str, str]:
    """What must be the same on all ranks, in few words."""
    request, probes = search.request, search.probes
    named = [field.name for field in dataclasses.fields(request) if field.name not in ("probes", "progress")]
    words = {name: _short(getattr(request, name)) for name in named}
    faces = _digest(probes.features, probes.norms, probes.projection, probes.bias)
    words["probes"] = f"{len(probes)} faces {faces}"
    if search.groups is not None:
        words["groups"] = _short(search.groups.codes)
    if request.exclude is not None:
        words["exclude"] = f"{_short(search.selected)}, {_short(search.exclude)}"
    if not isinstance(request.coarse, str):
        words["coarse"] = type(request.coarse).__name__
    return words


def _digest(*values: str | np.ndarray | Tensor | None) -> str:
    """A short fingerprint of texts and arrays."""
    state = gallery_package("xxhash").xxh3_128()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().view(torch.uint8).numpy()
        if value is not None:
            state.update(value.encode() if isinstance(value, str) else np.ascontiguousarray(value))
    return str(state.hexdigest()[:16])


def _short(value: Any) -> str:
    """An argument in few words, other ones for another value."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{list(value.shape)} {_digest(value)}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... {_digest(text)}"
