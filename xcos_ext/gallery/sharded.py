"""One gallery searched by several processes, each its own part of the rows, with the results of one."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xcos_ext.io.errors import GalleryError
from xcos_ext.ops.templates import Templates
from xcos_ext.ops.xcos_topk import XCosTopk, best_of

from ._packages import xxhash as _xxhash
from .gallery import Gallery, Progress, StrPath, _nobody
from .hits import Hits
from .layout import Layout
from .query import Query
from .ranks import Ranks
from .search import Fusion
from .store import Snapshot, Store
from .stream import has_selected

__all__ = ["ShardedGallery"]

_WHERE = "gallery.search"

# A part may begin this share of its size before or after its even place if that is where a tile begins.
_SHIFT = 1 / 20


class _Agreed(Store):
    """A store whose newest version is the one that the ranks have agreed on; None: really the newest."""

    version: int | None = None

    def snapshot(self, version: int | None = None) -> Any:
        return super().snapshot(self.version if version is None else version)


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


@dataclass(frozen=True)
class _Team:
    """Those who search a snapshot together; see :class:`xcos_ext.gallery.query.Team`."""

    ranks: Ranks
    cuts: list[int]

    def part(self, places: int) -> tuple[int, int]:
        return self.cuts[self.ranks.rank], self.cuts[self.ranks.rank + 1]

    def merge(self, lists: XCosTopk, k: int) -> XCosTopk:
        # One exchange for both: their bytes in a row, the indices first, for they need the wider alignment.
        values, indices = lists.values, lists.indices
        split = indices.numel() * indices.dtype.itemsize
        parts = self.ranks.gather(torch.cat([t.flatten().view(torch.uint8) for t in (indices, values)]))
        return best_of(
            torch.cat([part[split:].view(values.dtype).view(values.shape) for part in parts], 1),
            torch.cat([part[:split].view(indices.dtype).view(indices.shape) for part in parts], 1),
            k,
        )

    def reduce(self, table: Tensor, how: Literal["max", "sum"]) -> Tensor:
        return self.ranks.reduce(table, how)


class ShardedGallery:
    """A gallery that all processes of a process group search together; :meth:`open` opens it.

    Every process opens the same folder, on storage that all of them see, scores its own contiguous part of the rows,
    and returns the hits of the whole. All of them make the same calls in the same order, each from one thread; a
    process that makes another one, or fails, or is lost, is an error on all, not a wait without end.

    What :class:`xcos_ext.Gallery` finds is found here to the bit, ties included, with two exceptions. The mean over a
    person's faces (``person_fusion="mean"``) is summed in another order, and agrees within 1e-6. And on GPUs
    ``"uniform"``, ``"norm"`` and given attention are products of matrices, which are rounded differently for parts of
    other sizes.

    Attributes:
        rank, world: number of this process, and of all.
    """

    def __init__(self, path: StrPath, model: Any, group: Any, timeout: float, cache: StrPath | bool) -> None:
        self._ranks = Ranks(group, timeout)
        self.rank, self.world = self._ranks.rank, self._ranks.world
        self._store, self._model, self._cache = _Agreed(Path(path)), model, cache
        self._gallery: Gallery | None = None
        self._state: dict[str, str] | None = None
        self._cuts: list[int] = []
        try:
            with self._ranks.together():
                self._agree("open")
        except BaseException:
            self._close(wait=False)
            raise

    @property
    def path(self) -> Path:
        """Of the folder."""
        return self._opened.path

    @property
    def layout(self) -> Layout:
        """Shapes, dtype, head and model of the templates."""
        return self._opened.layout

    @classmethod
    def open(
        cls,
        path: StrPath,
        model: Any = None,
        *,
        group: Any = None,
        timeout: float = 30.0,
        cache: StrPath | bool = True,
    ) -> ShardedGallery:
        """Open a gallery at its newest version, the same on all ranks; all of them must call this.

        Args:
            path: of the folder.
            model: as in :meth:`Gallery.open`.
            group: process group of torch.distributed; None: the default one. Its ranks and their number are meant
                wherever ranks are spoken of here.
            timeout: seconds without a sign of life after which a rank is lost. It may work for longer than that, but
                all ranks must open the gallery within this time.
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

    def __exit__(self, kind: object, *error: object) -> None:
        self._close(wait=kind is None)

    def close(self) -> None:
        """Let the version go; the other ranks cannot search any more. The object must not be used afterwards.

        Where this process keeps the process group's store (rank 0, without torchrun), it waits for the others to close
        theirs, for the timeout at most.
        """
        self._close(wait=True)

    def _close(self, wait: bool) -> None:
        if self._gallery is not None:
            self._gallery.close()
        self._ranks.close(wait=wait)

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
        """Show the newest version that the first rank sees."""
        ranks, store = self._ranks, self._store
        # The first rank holds the version, so that it is still there for the others.
        store.version = None
        if ranks.rank == 0:
            self._move()
        store.version = ranks.arrive(call, note=self.version if ranks.rank == 0 else None)[0]
        if ranks.rank != 0:
            self._move()
        snapshot = self._opened.snapshot
        digest = _Digest().add(repr([(f.key, f.rows) for f in snapshot.fragments]), snapshot.deleted)
        state = {"version": str(snapshot.version), "gallery": f"files {digest}"}
        ranks.arrive("see", state)
        self._state, self._cuts = state, cuts(snapshot, self.world)

    def _move(self) -> None:
        if self._gallery is None:
            self._gallery = Gallery(self._store, self._model, self._cache)
        else:
            self._gallery.refresh()

    @property
    def _opened(self) -> Gallery:
        assert self._gallery is not None
        return self._gallery

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

    def search(
        self,
        probes: Templates | Tensor,
        k: int = 10,
        *,
        attention: Tensor | str = "own",
        where: str | None = None,
        min_score: float | None = None,
        groups: Sequence[Any] | None = None,
        fusion: Fusion = "max",
        by: Literal["face", "person"] = "face",
        person_fusion: Fusion = "max",
        rerank: int | None = None,
        coarse: Any = "norm",
        recall_probes: int = 0,
        exclude: Sequence[Sequence[str]] | Sequence[str] | None = None,
        explain: bool = False,
        threshold: float | None = None,
        metadata: bool = True,
        progress: Progress | None = None,
    ) -> Hits:
        """The best candidates of every probe, searched for by all ranks; all of them must call this.

        Args:
            probes: as in :meth:`Gallery.search`, and so is everything else. All ranks must give the same, each on a
                device of its own; with NCCL that is a GPU.
            k, attention, where, min_score, groups, fusion, by, person_fusion, rerank, coarse, recall_probes,
                exclude, explain, threshold, metadata: see there.
            progress: is told (faces gone through, all) of this rank's part.

        Returns:
            The same :class:`Hits` on all ranks.

        Raises:
            LostRankError: a rank was killed, stopped or cut off. Nothing can be searched any more.
            GalleryError: as :meth:`Gallery.search`; or arguments that are not the same on all ranks; or the search
                failed on another rank, which the message names. Searches may go on.
            GalleryDamagedError, TypeError, RuntimeError: as :meth:`Gallery.search`.
        """
        gallery, ranks = self._opened, self._ranks
        with ranks.together():
            if self._state is None:
                raise GalleryError(f"{_WHERE}: version: expected one that all ranks agreed on; refresh() failed")
            query = gallery.query(
                _Team(ranks, self._cuts),
                probes,
                k,
                attention=attention,
                where=where,
                min_score=min_score,
                groups=groups,
                fusion=fusion,
                by=by,
                person_fusion=person_fusion,
                exclude=exclude,
            )
            fields = {
                **self._state,
                "probes": _faces(query.probes),
                "k": str(query.k),
                "attention": _short(attention),
                "where": _short(where),
                "min_score": str(query.min_score),
                "groups": _short(None if query.groups is None else query.groups.codes),
                "fusion": fusion,
                "by": by,
                "person_fusion": person_fusion,
                "rerank": str(rerank),
                "coarse": coarse if isinstance(coarse, str) else type(coarse).__name__,
                "recall_probes": str(recall_probes),
                "exclude": f"{_short(query.selected)}, {_short(query.exclude)}" if exclude is not None else "None",
                "explain": str(bool(explain)),
                "threshold": str(threshold),
                "metadata": str(bool(metadata)),
            }
            streams = rerank is None or isinstance(coarse, str) or recall_probes > 0
            self._pack(query, ranks.arrive("search", fields, note=self._missing(query) if streams else None))
            hits = query.run(
                rerank=rerank,
                coarse=coarse,
                recall_probes=recall_probes,
                explain=explain,
                threshold=threshold,
                metadata=metadata,
                progress=progress or _nobody,
            )
            # Hits are read after the last exchange, and may be damaged for one rank alone.
            ranks.arrive("found")
        return hits

    def _missing(self, query: Query) -> dict[str, Any] | None:
        """Fragments of this rank's part that lack packed tiles, and where they lack them."""
        tiles = query.tiles
        if tiles.folder is None or not tiles.writable:
            return None
        begin, end = query.team.part(query.snapshot.places)
        missing = [
            index
            for index, f in enumerate(query.snapshot.fragments)
            if f.first < end
            and f.first + f.rows > begin
            and has_selected(query.selected, f.first, f.rows)
            and tiles.file(f) is None
        ]
        own = tiles.folder != self.path / "tiles"
        return {"where": f"{socket.gethostname()}:{tiles.folder.resolve()}" if own else "", "missing": missing}

    def _pack(self, query: Query, notes: Sequence[dict[str, Any] | None]) -> None:
        """Write missing tiles, each fragment's by one of the ranks that miss them in the same place.

        Otherwise all ranks that share a fragment would read and write all of it, to use a part each.
        """
        if not any(note and note["missing"] for note in notes):
            return
        needed: dict[tuple[str, int], list[int]] = {}
        for rank, note in enumerate(notes):
            for index in note["missing"] if note else ():
                needed.setdefault((note["where"], index), []).append(rank)  # type: ignore[index]
        fragments = query.snapshot.fragments
        load = [0] * self.world
        for (_, index), candidates in sorted(needed.items(), key=lambda item: -fragments[item[0][1]].rows):
            rank = min(candidates, key=lambda one: load[one])
            load[rank] += fragments[index].rows
            if rank == self.rank:
                query.tiles.write(query.snapshot, fragments[index])
        self._ranks.arrive("tiles")


class _Digest:
    """A short fingerprint of texts and arrays."""

    def __init__(self) -> None:
        self._state = _xxhash().xxh3_128()

    def add(self, *values: str | np.ndarray | Tensor | None) -> _Digest:
        for value in values:
            if isinstance(value, Tensor):
                value = value.detach().cpu().contiguous().view(torch.uint8).numpy()
            if value is not None:
                self._state.update(value.encode() if isinstance(value, str) else np.ascontiguousarray(value))
        return self

    def __str__(self) -> str:
        return str(self._state.hexdigest()[:16])


def _faces(probes: Templates) -> str:
    digest = _Digest().add(probes.features, probes.norms, probes.projection, probes.bias)
    return f"{len(probes)} faces {digest}"


def _short(value: Any) -> str:
    """An argument in few words, other ones for another value."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{list(value.shape)} {_Digest().add(value)}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... {_Digest().add(text)}"
