"""What all protocols share: settings, the model that is asked, pictures as it wants them, progress, results as rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.devices import module_device
from xcos_ext.evaluation.bootstrap import Estimator
from xcos_ext.evaluation.figures import plain
from xcos_ext.explain.explainers.interface import EmbeddingCosine, PairModel, XCosPairs
from xcos_ext.explain.fills import filled
from xcos_ext.io.several import several
from xcos_ext.ops import xcos_matrix

from .faces import Drawn, Faces
from .pasting import REGIONS, Blend

__all__ = ["Results", "Settings", "Study", "Tick", "mate_scorer", "remembering"]

_COUNT = 60
_REMEMBERED = 4  # batches of features
_PAIRS_AT_ONCE = 1024
_GRID = (7, 7)

Tick = Callable[[int, int], None]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Settings:
    """What the protocols share.

    >>> Settings(count=10, fills=("blur",)).sizes
    ('medium',)

    Attributes:
        count: pairs of each kind; probes of identification. None: 60, or as many as there are.
        regions: of region swaps, keys of ``REGIONS``.
        sizes: of the regions.
        blend, match_colour: of region swaps and patch replacement, see :func:`~.pasting.paste`.
        pixels: also give a region swap's areas over pixels; cell maps are made larger bilinearly for it.
        fills: of deletion, identification and locality, keys of ``FILLS``; the mean face is that of the pictures used.
        gallery: people enrolled for identification, at most; those of the probes first.
        top: gallery entries that a probe is explained against.
        seed: of everything that is drawn: pairs, donors, the order of equal values, the bootstrap.
        replicates: of the bootstrap, 0 for no intervals. What was chosen on all pairs, such as a threshold or the
            gallery, stays fixed in them.
        batch_size: pairs at once.
    """

    count: int | None = None
    regions: tuple[str, ...] = tuple(REGIONS)
    sizes: tuple[str, ...] = ("medium",)
    blend: Blend = "hard"
    match_colour: bool = False
    pixels: bool = False
    fills: tuple[str, ...] = ("zero",)
    gallery: int = 1000
    top: int = 1
    seed: int = 0
    replicates: int = 1000
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("regions", "sizes", "fills"):
            several(getattr(self, name), name)


@dataclass(frozen=True)
class Results(Generic[Row]):
    """What a protocol measured.

    Attributes:
        rows: the figures.
        unit: what the intervals' bootstrap draws: people or pairs.
    """

    rows: tuple[Row, ...]
    unit: str

    usual: ClassVar[dict[str, str]] = {}

    def find(self, explainer: str, **wanted: str) -> Row:
        """The first row of an explainer whose attributes are as asked for, or the usual ones.

        Raises:
            KeyError: there is none.
        """
        asked = {"explainer": explainer} | self.usual | wanted
        for row in self.rows:
            if all(getattr(row, name) == value for name, value in asked.items()):
                return row
        raise KeyError(asked)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dict(plain(self))


class Study:
    """What protocols are run on, and what all of them do alike. One protocol does not change the next one's figures.

    Args:
        model: whose decisions are explained.
        faces: the pictures.
        settings: how much of what; by default as in :class:`Settings`.

    Attributes:
        model: the model, which keeps the features of the last few batches.
        tick: called with (pictures or maps done, how many in all).
        generator: of the order of equal values.
    """

    def __init__(self, model: PairModel, faces: Faces, settings: Settings | None = None) -> None:
        self.faces, self.settings = faces, settings or Settings()
        self.model, self.preprocessing = remembering(model), model.preprocessing
        self.device = module_device(getattr(model, "module", None))
        self.tick: Tick | None = None
        self.begin(0)

    def begin(self, total: int) -> None:
        """Start anew: seeds, and the count of what is done of so many pictures or maps."""
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self._done, self._total = 0, total

    def advance(self, count: int) -> None:
        """Report that so many more are done."""
        self._done += count
        if self.tick is not None:
            self.tick(self._done, self._total)

    def count(self, most: int | None = None) -> int:
        """Pairs of each kind, or probes, of which there are so many (None: the rarer kind of pairs): the number asked
        for, else the usual one as far as there are."""
        if self.settings.count is not None:
            return self.settings.count
        if most is None:
            most = int(np.bincount(self.faces.pairs.genuine, minlength=2).min())
        return max(1, min(_COUNT, most))

    @property
    @torch.no_grad()
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an xCos model's cells; 7x7 for models without cells."""
        if not isinstance(self.model, XCosPairs):
            return _GRID
        blank = torch.zeros(1, 3, *self.preprocessing.size, device=self.device)
        return cast(tuple[int, int], tuple(self.model.features(blank).shape[2:]))

    def blocks(self, *counts: int) -> Iterator[slice]:
        """Batches of pairs that follow one another, so many of each kind; none holds pairs of two kinds."""
        start = 0
        for stop in np.cumsum(counts).tolist():
            for first in range(start, stop, self.settings.batch_size):
                yield slice(first, min(first + self.settings.batch_size, stop))
            start = stop

    def normalised(self, pictures: Tensor) -> Tensor:
        """uint8 pictures [N, 3, H, W] as the network wants them."""
        return self.preprocessing(pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()).to(self.device)

    def pictures(self, keys: Sequence[str]) -> Tensor:
        """Pictures by their keys as the network wants them, [N, 3, H, W]."""
        return self.normalised(self.faces.stacked(keys))

    def sides(self, pairs: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
        """Pictures A and pictures B of pairs, each [N, 3, H, W]."""
        return self.pictures([pair.a for pair in pairs]), self.pictures([pair.b for pair in pairs])

    def scores(self, images: Tensor, enrolled: Tensor) -> NDArray[np.float64]:
        """Scores [N] of images against features."""
        return self.model.score(self.model.features(images), enrolled).double().cpu().numpy()

    def pair_scores(self, pairs: Sequence[Drawn]) -> NDArray[np.float64]:
        """Scores [N] of untouched pairs."""
        sides = (self.sides(pairs[block]) for block in self.blocks(len(pairs)))
        return np.concatenate([self.scores(a, self.model.features(b)) for a, b in sides])

    def mean_face(self, keys: Sequence[str]) -> Tensor:
        """The mean of pictures, each counted once, as the network wants it [3, H, W]."""
        keys = list(dict.fromkeys(keys))
        wanted = self.preprocessing
        total = torch.zeros(3, *wanted.size, dtype=torch.float64)
        for key in keys:
            total += self.faces.stacked([key])[0]
        mean, std = (torch.tensor(v, dtype=total.dtype).view(3, 1, 1) for v in (wanted.mean, wanted.std))
        return ((total / len(keys) / 255 - mean) / std).float().to(self.device)

    def filler(self, keys: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
        """A function from images to what takes the place of their pixels, by fill; the mean face is of these keys."""
        fills = self.settings.fills
        mean = self.mean_face(keys) if "mean-face" in fills else None
        return lambda images: {fill: filled(fill, images, self.preprocessing, mean) for fill in fills}

    def estimator(self, pairs: Sequence[Drawn]) -> Estimator:
        """For means over these pairs."""
        settings = self.settings
        return Estimator(len(pairs), self.faces.ids(pairs), replicates=settings.replicates, seed=settings.seed)


def remembering(model: PairModel) -> PairModel:
    """The same model, which keeps the features of the last few batches while no gradients are wanted.

    Explainers that run one after another then do not compute them anew. A batch is known again as the same tensor
    object, so it must not be changed in place. Models of other classes come back as they are.
    """
    if type(model) not in (XCosPairs, EmbeddingCosine):
        return model
    kept, compute = copy.copy(model), model.features
    known = lru_cache(_REMEMBERED)(compute)  # tensors are hashed by identity

    def features(images: Tensor) -> Tensor:
        return compute(images) if torch.is_grad_enabled() else known(images)

    kept.features = features  # type: ignore[method-assign]
    return kept


def mate_scorer(model: PairModel, gallery: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that scores probes' features [P, ...] against all of a gallery's [G, ...]: [P, G].

    xCos scores and cosines are matrix products; other models are asked pair by pair.
    """
    if isinstance(model, XCosPairs):
        head = model.model
        enrolled = head.templates(gallery, "gallery")
        return lambda probes: xcos_matrix(head.templates(probes, "probe"), enrolled)
    if isinstance(model, EmbeddingCosine):
        return lambda probes: probes @ gallery.T
    parts = gallery.split(_PAIRS_AT_ONCE)

    def paired(probe: Tensor) -> Tensor:
        return torch.cat([model.score(probe.expand_as(part), part) for part in parts])

    return lambda probes: torch.stack([paired(probe) for probe in probes])
