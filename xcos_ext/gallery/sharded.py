"""One gallery searched by several processes, each its own part of the rows, with the results of one."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xcos_ext.io.errors import GalleryError
from xcos_ext.io.optional import gallery_package
from xcos_ext.ops.templates import Templates
from xcos_ext.ops.xcos_topk import XCosTopk, best_of

from .gallery import Gallery, StrPath
from .hits import Hits
from .layout import Layout
from .ranks import Ranks
from .search import WHERE, Search, Searcher, Shard
from .store import Store
from .stream import even_parts, has_selected

__all__ = ["ShardedGallery"]


class _RankShard(Shard):
    """The part of one rank."""

    def __init__(self, ranks: Ranks, parts: list[int]) -> None:
        self._ranks, self._parts = ranks, parts

    def part(self, places: int) -> tuple[int, int]:
        return self._parts[self._ranks.rank], self._parts[self._ranks.rank + 1]

    def merge(self, lists: XCosTopk, k: int) -> XCosTopk:
        device = lists.values.device
        parts = self._ranks.exchange("merge", value=(lists.values.cpu(), lists.indices.cpu()))
        values, indices = (torch.cat(columns, 1).to(device) for columns in zip(*parts, strict=True))
        return best_of(values, indices, k)

    def reduce(self, table: Tensor, how: Literal["max", "sum"]) -> Tensor:
        return self._ranks.reduce(table, how)


class ShardedGallery(Searcher):
    """A gallery that all processes of a process group search together; :meth:`open` opens it.

    Every process opens the same folder, scores its own contiguous part of the rows, and returns the hits of the whole:
    those of :class:`xcos_ext.Gallery` to the bit, ties included, except that ``person_fusion="mean"`` is summed in
    another order (1e-6), and that on GPUs fixed attention is a product of matrices, rounded differently for parts of
    other sizes. All make the same calls with the same arguments in the same order, each from one thread.

    A process that makes another call, fails, or is lost is an error on all, not a wait without end: GalleryError names
    the rank and says what it said (searches may go on), LostRankError names those that were killed, stopped or cut off
    (nothing can be searched any more). ``progress`` is told of this rank's part.

    Attributes:
        rank, world: number of this process, and of all.

    Example:
        >>> import tempfile, torch, xcos_ext
        >>> faces = xcos_ext.Templates.from_features(torch.randn(3, 8, 7, 7))
        >>> with xcos_ext.Gallery.create(tempfile.mkdtemp(), faces) as gallery:
        ...     _ = gallery.add(["ann", "bob", "eve"], faces)
        >>> with ShardedGallery.open(gallery.path) as sharded:  # in every process; here in one
        ...     sharded.search(faces[1:2], k=1).ids, sharded.world
        ([['bob']], 1)
    """

    def __init__(self, path: StrPath, model: Any, group: Any, timeout: float, cache: StrPath | bool) -> None:
        self._ranks = Ranks(group, timeout)
        self.rank, self.world = self._ranks.rank, self._ranks.world
        self._gallery: Any = None
        self._open = lambda version: Gallery(Store(path), model, cache, version=version)
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "sharded gallery: cannot be pickled, for another process is none of its ranks; give it Gallery.open(path)"
        )

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
        self._state: dict[str, str] | None = None
        ranks = self._ranks
        with ranks.together():
            # The first rank holds the newest version that it sees, so that it is there for the others.
            if self.rank == 0:
                self._move_to(None)
            version = ranks.exchange("refresh", value=self.version if self.rank == 0 else None)[0]
            if self.rank != 0:
                self._move_to(version)
            snapshot, folder = self._gallery.snapshot, self._gallery._tiles.folder
            state = {"version": str(version), "gallery": f"files {snapshot.mark}"}
            own = folder is not None and folder != self.path / "tiles"
            name = f"{socket.gethostname()}:{folder.resolve()}" if own else ""
            self._folders = ranks.exchange("see", state, name)  # of packed tiles; the same for ranks that share one
            self._state, self._parts = state, even_parts(snapshot, self.world)
        return self

    def _move_to(self, version: int | None) -> None:
        if self._gallery is None:
            self._gallery = self._open(version)
        else:
            self._gallery._move_to(version)

    @property
    def path(self) -> Path:
        """Of the folder."""
        return self._gallery.path

    @property
    def layout(self) -> Layout:
        """Shapes, dtype, head and model of the templates."""
        return self._gallery.layout

    @property
    def version(self) -> int:
        """Number of the version that all ranks see."""
        return self._gallery.version

    def __len__(self) -> int:
        return len(self._gallery)

    def __repr__(self) -> str:
        return f"Sharded{self._gallery!r}"[:-1] + f", rank={self.rank} of {self.world})"

    def _search(self, request: SimpleNamespace) -> Hits:
        ranks = self._ranks
        with ranks.together():
            if self._state is None:
                raise GalleryError(f"{WHERE}: version: expected one that all ranks agreed on; refresh() failed")
            search = self._gallery._checked(_RankShard(ranks, self._parts), request)
            ranks.exchange("search", {**self._state, **_words(search)})
            if request.rerank is None or isinstance(request.coarse, str) or request.recall_probes > 0:
                self._pack(search)
            hits = search.run()
            # Hits are read after the last exchange, and may be damaged for one rank alone.
            ranks.exchange("found")
        return hits

    def _pack(self, search: Search) -> None:
        """Write missing tiles, each fragment's by the first of the ranks that read it and share a folder.

        Otherwise all ranks that share a fragment would read and write all of it, to use a part each.
        """
        tiles, folders = search.tiles, self._folders
        for f in search.snapshot.fragments:
            first, last = np.searchsorted(self._parts, [f.first, f.first + f.rows - 1], "right") - 1
            sharing = [rank for rank in range(first, last + 1) if folders[rank] == folders[self.rank]]
            mine = sharing[:1] == [self.rank] and has_selected(search.selected, f.first, f.rows)
            if mine and tiles.file(f) is None:
                tiles.write(search.snapshot, f)
        self._ranks.exchange("tiles")


def _words(search: Search) -> dict[str, str]:
    """What must be the same on all ranks, in few words, other ones for other values."""
    values = vars(search.request) | {"probes": search.probes}
    del values["progress"]
    if not isinstance(values["coarse"], str):
        values["coarse"] = type(values["coarse"])
    if search.groups is not None:
        values["groups"] = search.groups.codes
    words = {name: _short(value) for name, value in values.items()}
    if values["exclude"] is not None:
        words["exclude"] = f"{_short(search.selected)}, {_short(search.exclude)}"
    return words


def _short(value: Any) -> str:
    if isinstance(value, Templates):
        arrays = [value.features, value.norms, value.projection, value.bias]
        return f"{len(value)} faces {' '.join(_short(array) for array in arrays)}"
    digest = gallery_package("xxhash").xxh3_64_hexdigest
    if isinstance(value, (Tensor, np.ndarray)):
        shape = list(value.shape)
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().view(torch.uint8).numpy()
        return f"{shape} {digest(np.ascontiguousarray(value))}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... {digest(text.encode())}"
