"""One search: what is asked for, checked, and the way from tiles to hits."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from xcos_ext.io.errors import GalleryError
from xcos_ext.io.several import several
from xcos_ext.ops._checks import checked_flag
from xcos_ext.ops.templates import Templates
from xcos_ext.ops.xcos_maps import xcos_maps
from xcos_ext.ops.xcos_matrix import AllPairs
from xcos_ext.ops.xcos_topk import MOST_K, XCosTopk, checked_k, checked_score

from .hits import HitMaps, Hits
from .labels import LABELS
from .scoring import Fusion, Groups, attention_of, exact_topk, persons_topk, rerank
from .snapshot import Snapshot
from .stream import Tile, stream
from .tiles import TileCache, gather

__all__ = ["Progress", "Search", "Searcher", "Shard", "quiet"]

#: Called with the work done so far and all of it, in faces.
Progress = Callable[[int, int], None]


def quiet(done: int, total: int) -> None:
    """Tell nobody of the progress."""


WHERE = "gallery.search"

S = TypeVar("S", bound="Searcher")


class Shard:
    """The part of a gallery that this process scores, and how its results meet the others'. This one is the whole."""

    def part(self, places: int) -> tuple[int, int]:
        """This process's places, [begin, end)."""
        return 0, places

    def merge(self, lists: XCosTopk, k: int) -> XCosTopk:
        """The k best of all shards' lists, the same in every process."""
        return lists

    def reduce(self, table: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """The shards' tables put together, the same in every process."""
        return table


class Searcher(ABC):
    """What can be searched."""

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let the version go. The object must not be used afterwards."""

    @abstractmethod
    def _search(self, request: SimpleNamespace) -> Hits: ...

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
        """The best candidates of every probe, exactly, whatever the size of the gallery.

        Args:
            probes: P templates of role "probe" or "both", of the gallery's head; or, with a model, features F
                [P, C, H, W]. They may be on a GPU: tiles then stream there.
            k: hits a probe, 1 to 2048.
            attention: as in :func:`xcos_ext.xcos_topk`: ``"own"`` (learned), ``"uniform"``, ``"norm"``, or weights.
            where: only faces that this SQL condition selects: over ``id``, ``person``, and into the metadata by
                ``json_extract(metadata, '$.key')``, ``json_get_int(metadata, 'key')`` and the like.
            min_score: only scores from here on are hits (a decision threshold makes this an open-set search).
            groups: a label for each probe; probes with equal labels are one person, whose scores become one by
                ``fusion``. The result then has a row for each label.
            fusion: ``"max"`` or ``"mean"`` of a group's scores.
            by: ``"face"``, or ``"person"``: hits are persons, scored over all of their faces; faces without a person
                count as persons of their own.
            person_fusion: a person's score is the ``"max"`` or the ``"mean"`` of the faces'.
            rerank: search in two stages: R candidates by cheap scores, of which the exact best are found. Not exact,
                and the result says so.
            coarse: how the R are found: ``"norm"`` or ``"uniform"`` attention (matrix products), or an index from
                :class:`xcos_ext.gallery.FaissIndex`.
            recall_probes: measure the recall of a two-stage search on so many of the probes (evenly chosen), by
                searching for them exactly as well.
            exclude: ids that a probe must not get: one list for all, or a list for each probe.
            explain: also return the hits' maps.
            threshold: t of the maps' contributions; None: the model's, which is of its own attention (of none with
                another).
            metadata: read the hits' metadata.
            progress: is told (faces gone through, all).

        Returns:
            :class:`Hits`; ties in favour of the lower position, NaN scores are no hits.

        Raises:
            GalleryError: probes of another head or that are not finite, a filter that cannot be understood.
            GalleryDamagedError: stored faces that were to be scored are not what was written.
            TypeError, RuntimeError: other arguments of wrong types or values.

        Example:
            >>> import tempfile, torch
            >>> from xcos_ext import Gallery, Templates
            >>> faces = Templates.from_features(torch.randn(4, 8, 7, 7))
            >>> gallery = Gallery.create(tempfile.mkdtemp(), faces)
            >>> _ = gallery.add(["ann/0", "ann/1", "bob/0", "eve/0"], faces, persons=["ann", "ann", "bob", None])
            >>> gallery.search(faces[1:3], k=1, by="person").persons  # two probes
            [['ann'], ['bob']]
            >>> hits = gallery.search(faces[:2], k=2, groups=["ann", "ann"], explain=True)  # one person
            >>> sorted(hits.ids[0]), hits.maps.similarity.shape
            (['ann/0', 'ann/1'], torch.Size([1, 2, 7, 7]))
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        return self._search(SimpleNamespace(**arguments))


@dataclass(frozen=True, eq=False)
class Search:
    """A checked search."""

    snapshot: Snapshot
    tiles: TileCache
    shard: Shard
    request: SimpleNamespace  # the arguments of Searcher.search
    probes: Templates  # of the gallery's kind
    attention: Tensor | str
    min_score: float
    groups: Groups | None
    selected: np.ndarray | None  # places that count, ascending; None: all
    exclude: Tensor | None  # int64 [P, E], places that a probe must not get

    @classmethod
    def of(
        cls, snapshot: Snapshot, tiles: TileCache, shard: Shard, probes: Templates, request: SimpleNamespace
    ) -> Search:
        """Check what is asked for."""
        checked_k(request.k, WHERE)
        min_score = checked_score(request.min_score, WHERE)
        for name in ("explain", "metadata"):
            checked_flag(WHERE, name, getattr(request, name))
        attention, groups, exclude = request.attention, request.groups, request.exclude
        if groups is not None:
            # Elements of tensors are equal to nothing, not even to themselves.
            groups = groups.tolist() if isinstance(groups, Tensor) else groups
            groups = [_hashable(label) for label in several(groups, f"{WHERE}: groups", "labels", ordered=True)]
        exclude = None if exclude is None else list(several(exclude, f"{WHERE}: exclude", "ids"))
        for name in ("fusion", "person_fusion"):
            if getattr(request, name) not in ("max", "mean"):
                raise GalleryError(f"{WHERE}: {name}: expected 'max' or 'mean', got {getattr(request, name)!r}")
        if request.by not in ("face", "person"):
            raise GalleryError(f"{WHERE}: by: expected 'face' or 'person', got {request.by!r}")
        if groups is not None and len(groups) != len(probes):
            raise GalleryError(f"{WHERE}: groups: expected {len(probes)} labels like probes, got {len(groups)}")
        try:
            probes = probes.as_probe()
        except ValueError as error:
            if attention == "own":
                raise GalleryError(
                    f"{WHERE}: probes: expected templates of role 'probe' or 'both', got role {probes.role!r}; make "
                    "them with templates(features, role='probe')"
                ) from error
        # Checks the attention before anything is read.
        AllPairs(WHERE, probes, snapshot.layout.empty().to(probes.device), attention)
        selected = None if request.where is None else snapshot.select(request.where)
        each = None
        if exclude:
            if all(isinstance(one, str) for one in exclude):
                hidden = np.sort(snapshot.places_of(np.array(list(snapshot.find(exclude).values()), np.int64)))
                everyone = np.arange(snapshot.places) if selected is None else selected
                selected = np.setdiff1d(everyone, hidden, assume_unique=True)
            else:
                if len(exclude) != len(probes):
                    raise GalleryError(
                        f"{WHERE}: exclude: expected ids, or {len(probes)} lists like probes, got {len(exclude)} lists"
                    )
                if groups is not None or request.by == "person":
                    raise GalleryError(
                        f"{WHERE}: exclude: expected one list of ids where scores are fused or by person, got one for "
                        "each probe"
                    )
                each = _padded(snapshot, exclude).to(probes.device)
        made = None if groups is None else Groups.of(groups, request.fusion, probes.device)
        return cls(snapshot, tiles, shard, request, probes, attention, min_score, made, selected, each)

    @torch.no_grad()  # not inference mode: callers go on with what is found
    def run(self) -> Hits:
        """Search."""
        request = self.request
        recall, measured = None, 0
        if request.by == "person":
            if request.rerank is not None:
                raise GalleryError(f"{WHERE}: rerank: expected None in a search by person, got {request.rerank}")
            found = self._best_faces(self._persons())
        elif request.rerank is None:
            found = self._exact()
        else:
            found = self._two_stages(request.rerank, request.coarse)
            recall, measured = self._recall(found, request.recall_probes)
        return self._hits(found, recall, measured)

    def _stream(self) -> Iterator[Tile]:
        begin, end = self.shard.part(self.snapshot.places)
        tick = self.request.progress
        for tile in stream(self.snapshot, self.tiles, self.probes.device, selected=self.selected, begin=begin, end=end):
            yield tile
            if tick is not None:
                tick(tile.first + len(tile.templates) - begin, end - begin)

    def _gather(self, places: np.ndarray) -> Templates:
        return gather(self.snapshot, self.tiles, places).to(self.probes.device)

    def _exact(self) -> XCosTopk:
        lists = exact_topk(
            self._stream(),
            self.probes,
            self.request.k,
            self.attention,
            min_score=self.min_score,
            groups=self.groups,
            exclude=self.exclude,
        )
        return self.shard.merge(lists, self.request.k)

    # -------------------------------------------------------------- persons

    @functools.cached_property
    def _person_codes(self) -> tuple[np.ndarray, int]:
        """Person of each place, numbered by their first faces; faces without one are persons of their own."""
        persons = self.snapshot.persons()
        names = persons.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        nobody = names < 0
        names[nobody] = len(persons.dictionary) + np.arange(nobody.sum())
        _, first, codes = np.unique(names, return_index=True, return_inverse=True)
        places = np.zeros(self.snapshot.places, np.int64)  # deleted rows are excluded anyway
        places[self.snapshot.places_of(np.arange(len(names)))] = first.argsort().argsort()[codes]
        return places, len(first)

    def _persons(self) -> XCosTopk:
        codes, count = self._person_codes
        return persons_topk(
            self._stream,
            codes,
            count,
            self.probes,
            self.request.k,
            self.attention,
            fusion=self.request.person_fusion,
            min_score=self.min_score,
            groups=self.groups,
            reduce=self.shard.reduce,
        )

    def _best_faces(self, persons: XCosTopk) -> XCosTopk:
        """The same lists with, for each person, the place of the face that fits best."""
        codes, _ = self._person_codes
        counted = np.arange(self.snapshot.places) if self.selected is None else self.selected
        usable = np.setdiff1d(counted, self.snapshot.deleted, assume_unique=True)
        usable = usable[np.argsort(codes[usable], kind="stable")]
        sorted_codes = codes[usable]
        places = torch.full_like(persons.indices, -1)
        for row, wanted in enumerate(persons.indices.cpu().numpy()):
            wanted = wanted[wanted >= 0]
            if len(wanted) == 0:
                continue
            begins, ends = (np.searchsorted(sorted_codes, wanted, side) for side in ("left", "right"))
            faces = [usable[a:b] for a, b in zip(begins, ends, strict=True)]
            scores = self._scores(row, self._gather(np.concatenate(faces)))[0]
            scores = torch.where(scores.isnan(), -math.inf, scores).cpu()
            for column, (own, some) in enumerate(zip(faces, scores.split((ends - begins).tolist()), strict=True)):
                places[row, column] = int(own[int(some.argmax())])
        return XCosTopk(persons.values, places)

    def _members(self, row: int) -> Tensor:
        """Probes of a row of the result."""
        if self.groups is None:
            return torch.tensor([row], device="cpu")
        return (self.groups.codes == row).nonzero().squeeze(1)

    def _scores(self, row: int, faces: Templates) -> Tensor:
        """Scores [1, M] of a row of the result against faces."""
        members = self._members(row)
        scores = AllPairs(WHERE, self.probes[members], faces, attention_of(self.attention, members)).scores()
        if self.groups is None:
            return scores
        return Groups((row,), torch.zeros_like(members), self.groups.fusion).fuse(scores)

    # -------------------------------------------------------------- two stages

    def _two_stages(self, count: int, coarse: Any) -> XCosTopk:
        if isinstance(count, bool) or not isinstance(count, int) or not self.request.k <= count <= MOST_K:
            raise GalleryError(f"{WHERE}: rerank: expected an int from k = {self.request.k} to {MOST_K}, got {count!r}")
        begin, end = self.shard.part(self.snapshot.places)
        if isinstance(coarse, str):
            if coarse not in ("uniform", "norm"):
                raise GalleryError(f"{WHERE}: coarse: expected 'uniform', 'norm' or an index, got {coarse!r}")
            lists = exact_topk(self._stream(), self.probes, count, coarse, groups=self.groups, exclude=self.exclude)
            candidates = self.shard.merge(lists, count).indices
        else:
            if self.groups is not None or self.exclude is not None or self.selected is not None:
                raise GalleryError(
                    f"{WHERE}: coarse: expected 'uniform' or 'norm' with groups, exclude or where, got an index"
                )
            coarse.check(self.snapshot)
            candidates = coarse.candidates(self.probes, count)
        mine = torch.where((candidates >= begin) & (candidates < end), candidates, -1)
        lists = rerank(self._gather, self._scores, mine, self.request.k, min_score=self.min_score)
        return self.shard.merge(lists, self.request.k)

    def _recall(self, found: XCosTopk, count: int) -> tuple[float | None, int]:
        """Recall of the found lists on evenly chosen rows, which are searched exactly."""
        rows = len(found.indices)
        count = min(count, rows)
        if count <= 0 or rows == 0:
            return None, 0
        chosen = torch.linspace(0, rows - 1, count, device="cpu").round().to(torch.int64).unique()
        each = [self._members(int(row)) for row in chosen]
        members, labels = torch.cat(each), [row for row, part in enumerate(each) for _ in part]
        exact = dataclasses.replace(
            self,
            request=SimpleNamespace(**vars(self.request) | {"progress": None}),
            probes=self.probes[members],
            attention=attention_of(self.attention, members),
            groups=None if self.groups is None else Groups.of(labels, self.groups.fusion, members.device),
            exclude=None if self.exclude is None else self.exclude[members],
        )._exact()
        there = exact.indices.unsqueeze(2) == found.indices[chosen].unsqueeze(1)
        valid = exact.indices >= 0
        hits = (there.any(2) & valid).sum().item()
        return (hits / valid.sum().item() if valid.any() else 1.0), len(chosen)

    # -------------------------------------------------------------- hits

    def _hits(self, found: XCosTopk, recall: float | None, measured: int) -> Hits:
        snapshot = self.snapshot
        scores, places = found.values.cpu(), found.indices.cpu()
        valid = places >= 0
        flat = places[valid].numpy()
        metadata = self.request.metadata
        labels = snapshot.labels(flat, LABELS if metadata else LABELS[:2])
        positions = torch.full_like(places, -1)
        positions[valid] = torch.from_numpy(snapshot.positions(flat))

        def rows(name: str) -> list[list[Any]]:
            values = iter(labels[name])
            return [list(islice(values, count)) for count in valid.sum(1).tolist()]

        return Hits(
            scores=scores,
            positions=positions,
            ids=rows("id"),
            persons=rows("person"),
            metadata=rows("metadata") if metadata else None,
            exact=self.request.rerank is None,
            recall=recall,
            recall_probes=measured,
            groups=None if self.groups is None else self.groups.labels,
            maps=self._maps(found) if self.request.explain else None,
            version=snapshot.version,
        )

    def _maps(self, found: XCosTopk) -> HitMaps:
        """Maps of all hits; of fused probes the best one's, or their mean, as their scores were fused."""
        t, layout = self.request.threshold, self.snapshot.layout
        if t is None and layout.weighs(self.request.attention):
            t = layout.threshold
        if t is not None and not math.isfinite(t):
            raise GalleryError(f"{WHERE}: threshold: expected a finite number or None, got {t}")
        rows, k = found.indices.shape
        height, width = layout.grid
        dtype = found.values.dtype
        out = [torch.full((rows, k, height, width), math.nan, dtype=dtype, device="cpu") for _ in range(3)]
        for row in range(rows):
            places = found.indices[row][found.indices[row] >= 0].cpu().numpy()
            if len(places) == 0:
                continue
            members = self._members(row)
            grid = torch.cartesian_prod(*(torch.arange(len(side), device="cpu") for side in (members, places)))
            attention = attention_of(self.attention, members)
            maps = xcos_maps(
                self.probes[members], self._gather(places), grid.to(self.probes.device), attention, threshold=t
            )
            shape = (len(members), len(places))
            scores = maps.score.view(shape)
            mean = self.groups is not None and self.groups.fusion == "mean"
            best = scores.argmax(0)
            for target, part in zip(out, (maps.similarity, maps.attention, maps.contribution), strict=True):
                if part is not None:
                    part = part.view(*shape, height, width)
                    chosen = part.mean(0) if mean else part[best, torch.arange(len(places), device=best.device)]
                    target[row, : len(places)] = chosen.cpu()
        similarity, attended, contribution = out
        return HitMaps(similarity, attended, None if t is None else contribution)


def _hashable(label: Any) -> Any:
    """A label of a probe."""
    try:
        hash(label)
    except TypeError:
        kind = type(label).__name__
        raise TypeError(f"{WHERE}: groups: expected labels such as texts or numbers, got {kind}") from None
    return label


def _padded(snapshot: Snapshot, lists: Sequence[Sequence[str]]) -> Tensor:
    """A list of ids for each probe as places, int64 [P, E]; ids that are not in the gallery are -1."""
    if not all(isinstance(ids, Collection) and all(isinstance(one, str) for one in ids) for ids in lists):
        raise GalleryError(f"{WHERE}: exclude: expected ids, or a list of ids for each probe, got something else")
    known = snapshot.find(one for ids in lists for one in ids)
    width = max((len(ids) for ids in lists), default=0)
    table = np.full((len(lists), max(width, 1)), -1, np.int64)
    for row, ids in enumerate(lists):
        if isinstance(ids, str):
            raise GalleryError(f"{WHERE}: exclude: expected ids, or a list of ids for each probe, got a mixture")
        found = np.array([known[one] for one in ids if one in known], np.int64)
        table[row, : len(found)] = snapshot.places_of(found)
    return torch.from_numpy(table)
