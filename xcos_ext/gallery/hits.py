"""What a search and a de-duplication give back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Duplicate", "Duplicates", "Hit", "HitMaps", "Hits"]


def within_one(score: float) -> float:
    """A score for people and files: 1 or -1 where rounding alone put it beyond, as it does between equal faces.

    Cells stored in half precision are up to a thousandth longer than 1. What is computed with stays as it is.

    >>> within_one(1.0001), within_one(0.5), within_one(-math.inf)
    (1.0, 0.5, -inf)
    """
    return math.copysign(1.0, score) if 1 < abs(score) < 1.01 else score


@dataclass(frozen=True)
class Hit:
    """One candidate of one probe.

    Attributes:
        score: of the face, or of the person in a search by person; at most 1, even where rounding left
            :attr:`Hits.scores` above.
        position: of the face in the gallery, from 0; of the person's best face in a search by person.
        id: of that face.
        person: of that face; None: not known.
        metadata: of that face; None where it was not asked for.

    Example:
        >>> Hit(0.81, 3, "ann/0.png", "ann", {"camera": 3}).person
        'ann'
    """

    score: float
    position: int
    id: str
    person: str | None
    metadata: Mapping[str, Any] | None


@dataclass(frozen=True, eq=False)
class HitMaps:
    """Why the hits score what they score: each [P, k, H, W], on the CPU; NaN where there is no hit.

    Attributes:
        similarity: S, the cells' cosines.
        attention: W.
        contribution: W * (S - t), whose sum is score - t; None without a threshold.

    Example:
        >>> import torch
        >>> maps = HitMaps(torch.full((1, 1, 7, 7), 0.5), torch.full((1, 1, 7, 7), 1 / 49), None)
        >>> (maps.similarity * maps.attention).sum((2, 3)).round(decimals=4)  # the hits' scores
        tensor([[0.5000]])
    """

    similarity: Tensor
    attention: Tensor
    contribution: Tensor | None


@dataclass(frozen=True, eq=False)
class Hits:
    """The best candidates of every probe, best first; ``hits[p]`` is the list of probe p's :class:`Hit`.

    Attributes:
        scores: [P, k], float32 (float64 for float64 templates), on the CPU; -inf where there are fewer than k hits.
            With fused probes P counts the groups, in the order of their first probes.
        positions: of the faces, int64 [P, k]; -1 where there are fewer.
        ids, persons: lists of each probe's hits, as long as there are hits.
        metadata: likewise; None where it was not asked for.
        exact: whether these are certainly the best of the whole gallery.
        recall: measured share of the exact hits that an approximate search found; None: it was not measured.
        recall_probes: number of probes that it was measured on.
        groups: labels of the fused probes; None where probes were not fused.
        maps: of the hits, where they were asked for.
        version: of the gallery that was searched.

    Example:
        >>> import tempfile, torch, xcos_ext
        >>> faces = xcos_ext.Templates.from_features(torch.randn(3, 8, 7, 7))
        >>> gallery = xcos_ext.Gallery.create(tempfile.mkdtemp(), faces)
        >>> _ = gallery.add(["ann", "bob", "eve"], faces)
        >>> hits = gallery.search(faces[:2], k=1)
        >>> hits, hits[1][0].id, hits.scores.shape
        (Hits(probes=2, k=1, exact, version=2), 'bob', torch.Size([2, 1]))
    """

    scores: Tensor
    positions: Tensor
    ids: list[list[str]]
    persons: list[list[str | None]]
    metadata: list[list[Mapping[str, Any]]] | None
    exact: bool
    recall: float | None
    recall_probes: int
    groups: tuple[Any, ...] | None
    maps: HitMaps | None
    version: int

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, probe: int) -> list[Hit]:
        ids = self.ids[probe]
        scores, positions = self.scores[probe].tolist(), self.positions[probe].tolist()
        metadata = None if self.metadata is None else self.metadata[probe]
        return [
            Hit(
                within_one(scores[i]),
                positions[i],
                ids[i],
                self.persons[probe][i],
                None if metadata is None else metadata[i],
            )
            for i in range(len(ids))
        ]

    def __iter__(self) -> Iterator[list[Hit]]:
        return (self[probe] for probe in range(len(self)))

    def __repr__(self) -> str:
        how = (
            "exact"
            if self.exact
            else "approximate, recall "
            + ("not measured" if self.recall is None else f"{self.recall:.4f} on {self.recall_probes} probes")
        )
        return f"Hits(probes={len(self)}, k={self.scores.shape[1]}, {how}, version={self.version})"


@dataclass(frozen=True)
class Duplicate:
    """Two faces that score at least the threshold.

    Attributes:
        positions: in the gallery, the earlier first.
        ids, persons: of the two.
        score: of the pair; of the better order where the two orders score differently.

    Example:
        >>> Duplicate((0, 7), ("ann/0.png", "eve/2.png"), ("ann", "eve"), 0.93).ids
        ('ann/0.png', 'eve/2.png')
    """

    positions: tuple[int, int]
    ids: tuple[str, str]
    persons: tuple[str | None, str | None]
    score: float


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Pairs of alike faces, and the groups that they make up.

    Attributes:
        pairs: by their positions.
        groups: ids of faces linked by pairs, in the order of their positions; the first is the earliest.
        threshold: of the pairs.
        compared: number of pairs that were scored.
        version: of the gallery.

    Example:
        >>> pair = Duplicate((0, 7), ("ann/0.png", "eve/2.png"), ("ann", "eve"), 0.93)
        >>> Duplicates([pair], [["ann/0.png", "eve/2.png"]], threshold=0.9, compared=28, version=2).groups
        [['ann/0.png', 'eve/2.png']]
    """

    pairs: list[Duplicate]
    groups: list[list[str]]
    threshold: float
    compared: int
    version: int
