"""Scoring probes against a stream of tiles: exact lists, fused probes, persons, and the exact re-rank of candidates."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from xcos_ext.ops.templates import Templates, result_dtype
from xcos_ext.ops.xcos_matrix import AllPairs
from xcos_ext.ops.xcos_topk import TopkLists, XCosTopk, best_of, columns_at_a_time

from .layout import iter_slices
from .stream import Tile

__all__ = ["Fusion", "Groups", "attention_of", "exact_topk", "persons_topk", "rerank"]

Fusion = Literal["max", "mean"]

# Scores of groups against persons that are kept at a time.
_TABLE_BYTES = 128 << 20
# Faces of a coarse list that are gathered at a time.
_GATHER_FACES = 16384


@dataclass(frozen=True, eq=False)
class Groups:
    """Probes that are the same person, whose scores become one."""

    labels: tuple[Any, ...]  # of the groups, in the order in which they first appear
    codes: Tensor  # group of each probe, int64 [P]
    fusion: Fusion  # of a group's scores

    @classmethod
    def of(cls, labels: Sequence[Any], fusion: Fusion, device: torch.device) -> Groups:
        """Groups of probes with equal labels."""
        codes: dict[Any, int] = {}
        each = [codes.setdefault(label, len(codes)) for label in labels]
        return cls(tuple(codes), torch.tensor(each, dtype=torch.int64, device="cpu").to(device), fusion)

    @functools.cached_property
    def _rounds(self) -> list[tuple[Tensor, Tensor]]:
        """(groups, probes): the first probe of every group, then the second of those that have one, ..."""
        order = self.codes.argsort(stable=True)
        codes = self.codes[order]
        device = codes.device
        starts = torch.searchsorted(codes, torch.arange(len(self.labels), device=device))
        rank = torch.arange(len(order), device=device) - starts[codes]
        return [(codes[rank == r], order[rank == r]) for r in range(int(rank.max()) + 1 if len(order) else 0)]

    def fuse(self, scores: Tensor) -> Tensor:
        """Scores [P, M] of the probes to scores [groups, M]; NaN where any is NaN."""
        (_, first), *rest = self._rounds
        fused = scores[first]
        for groups, probes in rest:
            if self.fusion == "max":
                fused[groups] = torch.maximum(fused[groups], scores[probes])
            else:
                fused[groups] += scores[probes]
        if self.fusion == "mean":
            fused /= torch.bincount(self.codes, minlength=len(self.labels)).to(fused.dtype).unsqueeze(1)
        return fused


def attention_of(attention: Tensor | str, chosen: Tensor | slice) -> Tensor | str:
    """The attention of some of the probes: their maps where each has one of its own."""
    if not isinstance(attention, Tensor) or attention.dim() != 3:
        return attention
    return attention[chosen if isinstance(chosen, slice) else chosen.to(attention.device)]


def _blocks(
    tiles: Iterable[Tile], probes: Templates, attention: Tensor | str, groups: Groups | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(place, scores [probes or groups, M], excluded) of consecutive faces."""
    for tile in tiles:
        pairs = AllPairs("gallery.search", probes, tile.templates, attention)
        # All probes at once: a group's may be anywhere.
        for part in iter_slices(len(tile.templates), columns_at_a_time(len(probes), pairs.dtype, probes.device)):
            scores = pairs.scores(gallery=part)
            if groups is not None:
                scores = groups.fuse(scores)
            yield tile.first + part.start, scores, None if tile.excluded is None else tile.excluded[part]


def exact_topk(
    tiles: Iterable[Tile],
    probes: Templates,
    k: int,
    attention: Tensor | str,
    *,
    min_score: float = -math.inf,
    groups: Groups | None = None,
    exclude: Tensor | None = None,
) -> XCosTopk:
    """The k best faces of every probe or group; indices are places.

    Args:
        tiles: in order.
        probes, k, attention, min_score: as in :func:`xcos_ext.xcos_topk`.
        groups: probes that are fused.
        exclude: int64 [P, E], places that a probe must not get.
    """
    rows = len(probes) if groups is None else len(groups.labels)
    lists = TopkLists(rows, k, result_dtype(probes.dtype), probes.device, min_score)
    if groups is not None:
        for place, scores, excluded in _blocks(tiles, probes, attention, groups):
            lists.add_scores(scores, place, exclude_mask=None if excluded is None else excluded.unsqueeze(0))
        return lists.result
    for tile in tiles:
        faces = tile.templates
        mask = None if tile.excluded is None else tile.excluded.unsqueeze(0)
        kept = None if tile.excluded is None else (~tile.excluded).nonzero().squeeze(1)
        if kept is None or 2 * len(kept) > len(faces):
            pairs = AllPairs("gallery.search", probes, faces, attention)
            lists.add_pairs(pairs, tile.first, exclude_indices=exclude, exclude_mask=mask)
        elif len(kept):
            # Few faces count: scoring the others would cost more than taking these out.
            part = TopkLists(rows, k, lists.values.dtype, probes.device, min_score)
            hidden = None
            if exclude is not None:
                at = torch.searchsorted(kept, exclude - tile.first).clamp_max(len(kept) - 1)
                hidden = torch.where(kept[at] == exclude - tile.first, at, -1)
            part.add_pairs(AllPairs("gallery.search", probes, faces[kept], attention), 0, exclude_indices=hidden)
            found = part.indices
            lists.add_lists(part.values, torch.where(found < 0, -1, tile.first + kept[found.clamp_min(0)]))
    return lists.result


def persons_topk(
    tiles: Callable[[], Iterable[Tile]],
    persons: np.ndarray,
    count: int,
    probes: Templates,
    k: int,
    attention: Tensor | str,
    *,
    fusion: Fusion,
    min_score: float = -math.inf,
    groups: Groups | None = None,
    reduce: Callable[[Tensor, Literal["max", "sum"]], Tensor],
) -> XCosTopk:
    """The k best persons of every probe or group; indices are persons' codes.

    Args:
        tiles: makes the stream; probes beyond the table that memory holds pass by in a stream of their own.
        persons, count: code of each place's person, int64 [places]; lower codes win ties; number of persons.
        probes, k, attention, min_score, groups: as in :func:`exact_topk`.
        fusion: a person's score is the "max" or the "mean" of its faces'.
        reduce: puts the tables of those together who search other parts of the gallery.
    """
    wide = result_dtype(probes.dtype)
    codes = torch.from_numpy(persons).to(probes.device)
    room = max(1, _TABLE_BYTES // max(1, count * wide.itemsize))
    parts: list[XCosTopk] = []
    for chosen, part_groups in _portions(len(probes), groups, room):
        some, weights = probes[chosen], attention_of(attention, chosen)
        rows = len(some) if part_groups is None else len(part_groups.labels)
        start = -math.inf if fusion == "max" else 0.0
        table = torch.full((rows, count), start, dtype=wide, device=probes.device)
        sizes = torch.zeros(count, dtype=wide, device=probes.device)
        for place, scores, excluded in _blocks(tiles(), some, weights, part_groups):
            columns = codes[place : place + scores.shape[1]]
            if excluded is not None:
                kept = (~excluded).nonzero().squeeze(1)
                scores, columns = scores[:, kept], columns[kept]
            if fusion == "max":
                # A face without a score says nothing of its person.
                scores = scores.nan_to_num(nan=-math.inf, neginf=-math.inf)
                with warnings.catch_warnings():  # "in beta"; scatter_reduce is 3.5 times slower
                    warnings.filterwarnings("ignore", "index_reduce", UserWarning)
                    table.index_reduce_(1, columns, scores, "amax")
            else:
                table.index_add_(1, columns, scores)
                sizes.index_add_(0, columns, sizes.new_ones(len(columns)))
        if fusion == "mean":
            table, sizes = reduce(table, "sum"), reduce(sizes, "sum")
            table = torch.where(sizes > 0, table / sizes, -math.inf)
        else:
            table = reduce(table, "max")
        lists = TopkLists(rows, k, wide, probes.device, min_score)
        # -inf marks a person of whom no face counts.
        lists.add_scores(table, 0, exclude_mask=table == -math.inf)
        parts.append(lists.result)
    return XCosTopk(*map(torch.cat, zip(*parts, strict=True)))


def _portions(count: int, groups: Groups | None, room: int) -> Iterator[tuple[Tensor | slice, Groups | None]]:
    """Probes (or groups with all of their probes) a table's worth at a time."""
    if groups is None:
        for start in range(0, max(count, 1), room):
            yield slice(start, start + room), None
        return
    for start in range(0, max(len(groups.labels), 1), room):
        labels = groups.labels[start : start + room]
        chosen = ((groups.codes >= start) & (groups.codes < start + len(labels))).nonzero().squeeze(1)
        yield chosen, Groups(labels, groups.codes[chosen] - start, groups.fusion)


def rerank(
    gather: Callable[[np.ndarray], Templates],
    score: Callable[[int, Templates], Tensor],
    candidates: Tensor,
    k: int,
    *,
    min_score: float = -math.inf,
) -> XCosTopk:
    """The k best of each row's candidates by their exact scores; indices are places.

    Args:
        gather: templates of places.
        score: exact scores [1, M] of a row (a probe or a group) against faces.
        candidates: places, int64 [rows, R]; -1 where there are fewer.
        k, min_score: as in :func:`exact_topk`.
    """
    places = candidates.cpu().numpy()
    parts = []
    for block in iter_slices(len(places), max(1, _GATHER_FACES // max(1, places.shape[1]))):
        # Candidates of several rows overlap, and are read in one go.
        unique = np.unique(places[block][places[block] >= 0])
        faces = gather(unique)
        for row in range(block.start, block.stop):
            own = np.sort(places[row][places[row] >= 0])
            scores = score(row, faces[torch.from_numpy(np.searchsorted(unique, own))])
            usable = (scores >= min_score) & ~scores.isnan()
            found = torch.from_numpy(own).to(scores.device).unsqueeze(0)
            missing = (0, max(k - len(own), 0))
            values = pad(torch.where(usable, scores, -math.inf), missing, value=-math.inf)
            parts.append(best_of(values, pad(torch.where(usable, found, -1), missing, value=-1), k))
    return XCosTopk(*map(torch.cat, zip(*parts, strict=True)))
