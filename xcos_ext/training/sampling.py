"""Pictures drawn in pairs or by person."""

from __future__ import annotations

import torch
from torch import Tensor

from xcos_ext.io.errors import XCosError

from .settings import ConfigError

__all__ = ["IdentityBatches", "PairBatches", "hardest_impostors"]


def _members(people: Tensor, indices: Tensor) -> list[Tensor]:
    """The chosen pictures of each of their people, by person."""
    ordered = indices[people[indices].argsort(stable=True)]
    return list(ordered.split(people[ordered].unique_consecutive(return_counts=True)[1].tolist()))


def _integers(count: int, below: Tensor | int, generator: torch.Generator) -> Tensor:
    """Uniform int64 [count] below a bound, or below each of ``count`` bounds."""
    uniform = torch.rand(count, dtype=torch.float64, generator=generator)
    bound = torch.as_tensor(below)
    return (uniform * bound).long().clamp_max(bound - 1)


def _picked(members: list[Tensor], places: Tensor) -> Tensor:
    """One picture of each."""
    return torch.stack([own[place] for own, place in zip(members, places, strict=True)])


class PairBatches:
    """Pairs of pictures, half of them genuine.

    Genuine pairs: a person with two pictures or more, all such people alike, and two different pictures. Impostor
    pairs: two people, all people alike, and a picture of each; or, for a share of them, a picture and one of the most
    similar pictures of other people.

    Args:
        people: int64 [N], whose each picture is.
        indices: the pictures to draw from.
        hardest: int64 [len(indices), k] from :func:`hardest_impostors`, or None.
        hard_share: share of the impostor pairs drawn from ``hardest``.

    Raises:
        XCosError: fewer than two people, or nobody with two pictures.

    >>> people = torch.tensor([0, 0, 1, 1, 2])
    >>> first, second = PairBatches(people, torch.arange(5)).draw(torch.Generator().manual_seed(0), 4)
    >>> (people[first] == people[second]).tolist()
    [True, False, True, False]
    """

    def __init__(self, people: Tensor, indices: Tensor, hardest: Tensor | None = None, hard_share: float = 0.5) -> None:
        self.members = _members(people, indices)
        self.several = [own for own in self.members if len(own) > 1]
        if len(self.members) < 2 or not self.several:
            raise XCosError(
                f"data: expected at least two people, one of them with two pictures, got {len(self.members)} people, "
                f"{len(self.several)} with two pictures"
            )
        self.indices, self.hardest, self.hard_share = indices, hardest, hard_share

    def draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Pictures of both sides, int64 [count] each, of genuine and impostor pairs in turns."""
        first, second = torch.empty(2, count, dtype=torch.int64)
        chosen = _integers((count + 1) // 2, len(self.several), generator)
        own = [self.several[int(i)] for i in chosen]
        sizes = torch.tensor([len(pictures) for pictures in own])
        a = _integers(len(own), sizes, generator)
        b = (a + 1 + _integers(len(own), sizes - 1, generator)) % sizes
        first[0::2], second[0::2] = _picked(own, a), _picked(own, b)
        if count > 1:
            first[1::2], second[1::2] = self._impostors(generator, count // 2)
        return first, second

    def _impostors(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        people = len(self.members)
        a = _integers(count, people, generator)
        b = (a + 1 + _integers(count, people - 1, generator)) % people
        sides = []
        for side in (a, b):
            own = [self.members[int(i)] for i in side]
            picks = _integers(count, torch.tensor([len(pictures) for pictures in own]), generator)
            sides.append(_picked(own, picks))
        if self.hardest is not None:
            hard = torch.rand(count, generator=generator) < self.hard_share
            row = _integers(count, len(self.indices), generator)
            column = _integers(count, self.hardest.shape[1], generator)
            sides[0] = torch.where(hard, self.indices[row], sides[0])
            sides[1] = torch.where(hard, self.hardest[row, column], sides[1])
        return sides[0], sides[1]


class IdentityBatches:
    """P people with K different pictures each, for losses over all pairs; optionally single faces of other people.

    Args:
        people: int64 [N], whose each picture is.
        indices: the pictures to draw from.
        count: P.
        pictures: K.
        others: further faces, of people with fewer than K pictures: impostors only.

    Raises:
        ConfigError: fewer than P people have K pictures, P or K is below 2, or too few others.

    >>> people = torch.tensor([0, 0, 1, 1, 2])
    >>> chosen = IdentityBatches(people, torch.arange(5), 2, 2, others=1).draw(torch.Generator().manual_seed(0))
    >>> sorted(people[chosen].tolist())
    [0, 0, 1, 1, 2]
    """

    def __init__(self, people: Tensor, indices: Tensor, count: int, pictures: int, others: int = 0) -> None:
        if count < 2 or pictures < 2:
            raise ConfigError(f"batches: expected at least 2 people with 2 pictures each, got {count} with {pictures}")
        members = _members(people, indices)
        self.members = [own for own in members if len(own) >= pictures]
        self.rest = [own for own in members if len(own) < pictures]
        self.count, self.pictures, self.others = count, pictures, others
        if len(self.members) < count:
            raise ConfigError(
                f"batches: expected at least {count} people with {pictures} pictures or more to train on, "
                f"got {len(self.members)}"
            )
        if len(self.rest) < others:
            raise ConfigError(f"batches: expected {others} people with fewer pictures, got {len(self.rest)}")

    def __len__(self) -> int:
        """Faces in a batch."""
        return self.count * self.pictures + self.others

    def draw(self, generator: torch.Generator) -> Tensor:
        """Indices of pictures [P * K + others], a person's own side by side."""
        people = torch.randperm(len(self.members), generator=generator)[: self.count]
        chosen = [self.members[int(person)] for person in people]
        drawn = [own[torch.randperm(len(own), generator=generator)[: self.pictures]] for own in chosen]
        for person in torch.randperm(len(self.rest), generator=generator)[: self.others] if self.others else ():
            own = self.rest[int(person)]
            drawn.append(own[_integers(1, len(own), generator)])
        return torch.cat(drawn)


@torch.no_grad()
def hardest_impostors(embeddings: Tensor, people: Tensor, indices: Tensor, k: int) -> Tensor:
    """For each chosen picture the ``k`` most similar chosen pictures of other people.

    Args:
        embeddings: [N, D] at unit length, e.g. the teacher's.
        people: int64 [N].
        indices: the chosen pictures, n of them.
        k: at most the number of pictures of other people.

    Returns:
        Picture indices, int64 [n, k], most similar first.

    >>> hardest_impostors(torch.eye(3), torch.tensor([0, 0, 1]), torch.arange(3), 1).shape
    torch.Size([3, 1])
    """
    own, whose = embeddings[indices], people[indices]
    k = min(k, len(indices) - int(torch.bincount(whose).max()))
    if k < 1:
        raise XCosError("data: expected pictures of at least two people to find hard impostors among")
    found = []
    for start in range(0, len(indices), 1024):
        part = slice(start, start + 1024)
        cosines = own[part] @ own.T
        cosines.masked_fill_(whose[part, None] == whose[None], -torch.inf)
        found.append(indices[cosines.topk(k, 1).indices])
    return torch.cat(found)
