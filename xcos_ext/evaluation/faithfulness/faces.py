"""The aligned faces that a protocol draws from: pairs, donors of the same and of other people, galleries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.evaluation.datasets import LFW, PairList
from xcos_ext.evaluation.scoring import crops
from xcos_ext.faces.detector import Detector
from xcos_ext.io.errors import PictureError, XCosError
from xcos_ext.io.several import several

__all__ = ["Drawn", "Faces", "TooFewError"]

_KEPT = 2048  # crops in memory: 77 MB of 112x112


class TooFewError(XCosError, ValueError):
    """A list has fewer pairs, people or pictures than a protocol needs."""


class Drawn(NamedTuple):
    """One pair that can be used.

    Attributes:
        a, b: keys of the pictures.
        donor: key of the picture that a protocol pastes from, or None.
        own: key of another picture of A's person, or None.
    """

    a: str
    b: str
    donor: str | None = None
    own: str | None = None


class Faces:
    """Aligned crops of a list's pictures, each found and cut out when it is first needed.

    Crops are kept, the last 2,048. A picture without a face is left out and counted in ``failures``.

    >>> from types import SimpleNamespace
    >>> named = [("Ann/1", "Ann/2"), ("Ann/1", "Bob/1")]
    >>> crops = SimpleNamespace(read=lambda key: np.full((112, 112, 3), 50 * int(key[-1]), np.uint8))
    >>> pairs = PairList(named, [True, False], person=lambda key: key[:3], pictures=crops)
    >>> faces = Faces(pairs)
    >>> faces.people, faces.of("Ann"), faces.stacked(["Ann/2"]).shape
    (('Ann', 'Bob'), ('Ann/1', 'Ann/2'), torch.Size([1, 3, 112, 112]))

    Args:
        pairs: the list. Of LFW, all pictures of the people in the pairs can be donors and probes, of other lists those
            that the pairs name.
        size: (height, width) of the crops.
        detector: finds the faces; None for aligned crops.
        folds: use only pairs of these (numbers as in ``pairs.folds``) and their people.

    Attributes:
        failures: key of a picture that cannot be used -> why.
        several: key of a picture with more than one face, of which the most prominent is taken -> how many.

    Raises:
        ValueError: an unknown fold.
    """

    def __init__(
        self,
        pairs: PairList,
        size: tuple[int, int] = (112, 112),
        *,
        detector: Detector | None = None,
        folds: Sequence[int] | None = None,
    ) -> None:
        self.pairs = pairs = pairs if folds is None else pairs.of_folds(folds)
        self.failures: dict[str, str] = {}
        self.several: dict[str, int] = {}
        self._read = lru_cache(_KEPT)(crops(pairs, detector, size, self.several))
        self._person: dict[str, str] = {}
        self._pictures: dict[str, tuple[str, ...]] = {}
        if pairs.people is not None:
            found: dict[str, list[str]] = {}
            for person, key in zip(pairs.people, pairs.keys, strict=True):
                found.setdefault(person, []).append(key)
            if isinstance(pairs, LFW):
                found = {person: list(pairs.pictures.of(person)) for person in found}
            self._pictures = {person: tuple(keys) for person, keys in sorted(found.items())}
            self._person = {key: person for person, keys in self._pictures.items() for key in keys}
        self._ids = {person: number for number, person in enumerate(self._pictures)}

    @property
    def people(self) -> tuple[str, ...]:
        """Everybody, sorted; empty where the list does not say who is who."""
        return tuple(self._pictures)

    def of(self, person: str) -> tuple[str, ...]:
        """Keys of one person's pictures."""
        return self._pictures[person]

    def person(self, key: str) -> str:
        """Who is on a picture."""
        return self._person[key]

    def need_people(self, purpose: str) -> None:
        """Raise TooFewError if the list does not say who is who."""
        if not self._pictures:
            raise TooFewError(f"pairs: {purpose} needs to know who is on a picture, and this list does not say")

    def ids(self, drawn: Sequence[Drawn]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """The two people of pairs, as numbers, for the bootstrap; None where they are unknown."""
        if not self._pictures:
            return None
        ids = [[self._ids[self._person[key]] for key in (pair.a, pair.b)] for pair in drawn]
        first, second = np.array(ids, dtype=np.int64).T
        return first, second

    def crop(self, key: str) -> NDArray[np.uint8] | None:
        """An aligned face, uint8 RGB [height, width, 3]; None if the picture cannot be used."""
        if key in self.failures:
            return None
        try:
            return self._read(key)
        except PictureError as error:
            self.failures[key] = str(error)
            return None

    def stacked(self, keys: Sequence[str]) -> Tensor:
        """Pictures that were found usable, uint8 [N, 3, H, W].

        Raises:
            PictureError: one that is not, or no longer.
        """
        found = []
        for key in several(keys, "keys"):
            crop = self.crop(key)
            if crop is None:
                raise PictureError(self.failures[key])
            found.append(crop)
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)

    def another(self, person: str, rng: np.random.Generator, avoid: Sequence[str] = ()) -> str | None:
        """A usable picture of a person other than some; None: there is none."""
        several(avoid, "avoid")
        keys = [key for key in self._pictures[person] if key not in avoid]
        return next((key for key in _shuffled(keys, rng) if self.crop(key) is not None), None)

    def with_donor(self, pair: Drawn, genuine: bool, rng: np.random.Generator) -> Drawn | None:
        """A pair with a picture whose regions would turn its verdict; None where there is none.

        Of a genuine pair the donor is a stranger; of an impostor pair another picture of B's person (A and B change
        places where only A's person has one).
        """
        if genuine:
            others = [person for person in self._pictures if person != self.person(pair.a)]
            found = (self.another(person, rng) for person in _shuffled(others, rng))
            donor = next((key for key in found if key is not None), None)
            return None if donor is None else pair._replace(donor=donor)
        for a, b in ((pair.a, pair.b), (pair.b, pair.a)):
            donor = self.another(self.person(b), rng, (b,))
            if donor is not None:
                return Drawn(a, b, donor)
        return None

    def draw(
        self,
        genuine: bool,
        count: int,
        rng: np.random.Generator,
        complete: Callable[[Drawn], Drawn | None] = lambda pair: pair,
    ) -> tuple[list[Drawn], int]:
        """So many pairs of one kind whose pictures can be used, in random order, as far as there are.

        ``complete`` finds donors for a pair; None from it leaves the pair out. Returned are the pairs, and how many
        were passed over because a picture or a donor could not be had.

        Raises:
            TooFewError: the list has fewer pairs of the kind, or none that can be used.
        """
        kind = "genuine" if genuine else "impostor"
        rows = np.flatnonzero(self.pairs.genuine == genuine)
        if not 1 <= count <= rows.size:
            raise TooFewError(f"count: expected 1..{rows.size}, the {kind} pairs that there are, got {count}")
        found: list[Drawn] = []
        passed = 0
        for row in rng.permutation(rows).tolist():
            if len(found) == count:
                break
            keys = [self.pairs.keys[side[row]] for side in (self.pairs.first, self.pairs.second)]
            pair = None if any(self.crop(key) is None for key in keys) else complete(Drawn(*keys))
            if pair is None:
                passed += 1
            else:
                found.append(pair)
        if not found:
            why = f": {next(iter(self.failures.values()))}" if self.failures else ""
            raise TooFewError(f"pairs: none of the {rows.size} {kind} pairs has the pictures that are needed{why}")
        return found, passed

    def draw_both(self, count: int, seed: int) -> tuple[list[Drawn], NDArray[np.bool_], int]:
        """So many genuine and as many impostor pairs, in turns, so that a batch has both.

        Returned are the pairs, bool [N] whether they are genuine, and how many were passed over.

        Raises:
            TooFewError: as :meth:`draw`.
        """
        rng = np.random.default_rng(seed)
        (genuine, passed), (impostor, also) = (self.draw(same, count, rng) for same in (True, False))
        turns = itertools.zip_longest(((pair, True) for pair in genuine), ((pair, False) for pair in impostor))
        drawn = [labelled for turn in turns for labelled in turn if labelled is not None]
        return [pair for pair, _ in drawn], np.array([same for _, same in drawn]), passed + also


def _shuffled(items: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """The items in random order, drawn as they are asked for."""
    left = list(items)
    while left:
        place = int(rng.integers(len(left)))
        left[place], left[-1] = left[-1], left[place]
        yield left.pop()
