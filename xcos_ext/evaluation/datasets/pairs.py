"""What every list of pairs offers, whatever the file that it comes from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xcos_ext.io.several import several

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PairList", "made_folds"]


class PairList:
    """Pairs of pictures to be compared.

    Readers are subclasses that hand over what their file says.

    >>> pairs = PairList([("b", "a"), ("a", "c")], [True, False])
    >>> pairs.keys, pairs.first.tolist(), pairs.second.tolist(), pairs.folds.tolist()
    (('a', 'b', 'c'), [1, 0], [0, 2], [0, 0])

    Args:
        named: the pairs as keys of pictures.
        genuine: whether each pair shows one person.
        folds: fold of each pair, or None for :func:`made_folds`.
        person: gives the person of a key; None where the list does not say who is who.
        pictures: gives the pictures by their keys; None for readers with a :meth:`read` of their own.

    Attributes:
        keys: keys of the pictures that the pairs name, each once, sorted.
        first, second: int64 [N], the pairs as indices into ``keys``.
        genuine: bool [N].
        folds: int64 [N].
        own_folds: whether the folds are the list's own; if not, people may be in several.
        people: the person of every key, or None.
        aligned: whether the pictures are aligned crops by the format's definition.
    """

    #: What the format is called, as in ``xcos evaluate verification --format``.
    format: str = ""
    aligned: bool = False

    def __init__(
        self,
        named: Sequence[tuple[str, str]],
        genuine: Sequence[bool],
        folds: Sequence[int] | NDArray[np.int64] | None = None,
        person: Callable[[str], str] | None = None,
        *,
        pictures: Any = None,
    ) -> None:
        several(named, "named", "pairs", ordered=True)
        several(genuine, "genuine", "bools", ordered=True)
        several(() if folds is None else folds, "folds", "numbers", ordered=True)
        self.pictures = pictures
        self.keys = tuple(sorted({key for pair in named for key in pair}))
        index = {key: i for i, key in enumerate(self.keys)}
        self.first = np.array([index[a] for a, _ in named], dtype=np.int64)
        self.second = np.array([index[b] for _, b in named], dtype=np.int64)
        self.genuine = np.array(genuine, dtype=bool)
        self.own_folds = folds is not None
        self.folds = made_folds(self.genuine) if folds is None else np.array(folds, dtype=np.int64)
        self.people = None if person is None else tuple(map(person, self.keys))

    def __len__(self) -> int:
        """Number of pairs."""
        return self.genuine.size

    def file(self, key: str) -> Path | None:
        """Where a picture lies on the disk; None for one in an archive."""
        root: Path | None = getattr(self.pictures, "path", None)
        return None if root is None or root.is_file() else root / key

    def fold_numbers(self) -> dict[int, int]:
        """The number that a fold has on the command line -> in ``folds``: a CSV file's own numbers, else from 1.

        >>> PairList([("a", "b"), ("a", "c")], [True, False], folds=[0, 4]).fold_numbers()
        {1: 0, 5: 4}
        """
        first = 0 if self.format == "csv" and self.own_folds else 1
        return {int(fold) + first: int(fold) for fold in np.unique(self.folds)}

    def of_folds(self, folds: Sequence[int]) -> Self:
        """The same list with the pairs of some folds only, and the pictures of these.

        Args:
            folds: numbers as in ``folds``.

        Raises:
            ValueError: none, or one that is not there.

        >>> PairList([("a", "b"), ("a", "c")], [True, False], folds=[0, 4]).of_folds([4]).keys
        ('a', 'c')
        """
        known = set(self.folds.tolist())
        several(folds, "folds", "numbers")
        if not folds or not set(folds) <= known:
            raise ValueError(f"folds: expected some of {sorted(known)}, got {sorted(folds)}")
        chosen = np.isin(self.folds, list(folds))
        used, places = np.unique(np.stack((self.first[chosen], self.second[chosen])), return_inverse=True)
        part = copy.copy(self)
        part.first, part.second = places.reshape(2, -1)
        part.genuine, part.folds = self.genuine[chosen], self.folds[chosen]
        part.keys = tuple(self.keys[i] for i in used)
        part.people = None if self.people is None else tuple(self.people[i] for i in used)
        return part

    def read(self, key: str) -> NDArray[np.uint8]:
        """Decode one picture: uint8 RGB [height, width, 3].

        Raises:
            PictureError: the picture cannot be decoded.
        """
        picture: NDArray[np.uint8] = self.pictures.read(key)
        return picture


def made_folds(genuine: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Ten folds, or fewer where there are fewer pairs of a kind, for a list that has none: pairs of each kind are dealt
    out in turn, so that every fold has both.

    >>> made_folds(np.array([True, True, True, False, False])).tolist()
    [0, 1, 0, 0, 1]
    """
    count = max(1, min(10, int(genuine.sum()), int((~genuine).sum())))
    folds = np.empty(genuine.size, dtype=np.int64)
    for kind in (genuine, ~genuine):
        folds[kind] = np.arange(int(kind.sum())) % count
    return folds
