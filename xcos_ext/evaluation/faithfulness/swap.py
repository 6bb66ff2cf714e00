"""Region swap: a change whose place is known, and each map asked where it is.

Two directions. Into picture A of a genuine pair a region of an impostor is pasted, and the dissimilar map is asked.
Into picture A of an impostor pair the same region of another photograph of B's person is pasted (A and B change places
where only A's person has one), and the similar map is asked. The answer is an AUC over the cells: 1 if every cell of
the region is above every other, 0.5 by chance.

Three readings, because a face has places that any map prefers:

* absolute: the map of the changed pair;
* difference: that map minus the map of the unchanged pair;
* centred: that map with each cell standardised by its values over the unchanged pairs of the draw. A map that is the
  same for all pairs gets exactly 0.5.

A control for seams and light: the region of another photograph of A's own person is pasted instead. What a map answers
there is owed to the paste, not to the person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.evaluation.bootstrap import Estimator
from xcos_ext.evaluation.figures import Estimate
from xcos_ext.explain.explainers.interface import Explainer
from xcos_ext.io.several import several

from .faces import Drawn
from .maps import areas, explained, standardised, to_cells, to_pixels
from .pasting import paste, region_mask
from .study import Results, Settings, Study

__all__ = ["DIRECTIONS", "PASTES", "OverPixels", "RegionSwap", "SwapDraw", "SwapRow", "region_swap"]

#: Direction of a region swap -> what is done and asked.
DIRECTIONS = {
    "impostor-into-genuine": "an impostor's region in a genuine pair; the dissimilar map is asked",
    "genuine-into-impostor": "a region of B's person in an impostor pair; the similar map is asked",
}

#: Paste -> whose region it is.
PASTES = {
    "swap": "of the other person, as the direction says",
    "same-person": "control: of another photograph of A's own person",
}

Floats = NDArray[np.float64]


class OverPixels(NamedTuple):
    """Attributes: absolute and difference, mean AUC over the pixels."""

    absolute: Estimate
    difference: Estimate


@dataclass(frozen=True)
class SwapRow:
    """How well one map finds one kind of paste.

    Attributes:
        explainer: its name.
        direction: a key of :data:`DIRECTIONS`.
        paste: a key of :data:`PASTES`.
        region: a key of ``REGIONS``, or ``"mean"`` over all that were asked for.
        size: of the region.
        absolute, difference, centred: mean AUC over the cells, see the module.
        behind: the first explainer's absolute AUC minus this one's, pair by pair; None for the first. Its interval says
            whether the first is better on these pairs, which two intervals side by side do not.
        pixels: absolute and difference over pixels, if asked for.
    """

    explainer: str
    direction: str
    paste: str
    region: str
    size: str
    absolute: Estimate
    difference: Estimate
    centred: Estimate
    behind: Estimate | None = None
    pixels: OverPixels | None = None


@dataclass(frozen=True)
class SwapDraw:
    """The pairs of one direction.

    Attributes:
        direction: a key of :data:`DIRECTIONS`.
        pairs: that were changed.
        controls: of them, those whose A has another photograph of the same person.
        passed_over: pairs that were drawn but lack a picture, or a donor.
    """

    direction: str
    pairs: int
    controls: int
    passed_over: int


@dataclass(frozen=True)
class RegionSwap(Results[SwapRow]):
    """A row per explainer, direction, paste, size and region; ``"mean"`` last of the regions.

    Attributes:
        draws: the pairs of each direction.
        blend, match_colour: how regions were pasted.
    """

    draws: tuple[SwapDraw, ...]
    blend: str
    match_colour: bool

    usual: ClassVar = {"direction": "impostor-into-genuine", "region": "mean", "size": "medium", "paste": "swap"}


class _Change(NamedTuple):
    paste: str
    size: str
    region: str


Masks = Mapping[_Change, Tensor]
#: By change: areas [readings, pairs] of absolute, difference, centred, and of the first two over pixels if asked for.
#: NaN where there was no change.
Areas = dict[_Change, Floats]


@torch.no_grad()
def region_swap(study: Study, explainers: Sequence[Explainer]) -> RegionSwap:
    """Ask every explainer where a region was swapped.

    A pair has one donor for all regions. Memory holds a batch of pictures and the cell maps of all pairs.

    Args:
        study: of the settings, all but fills, gallery and top are used.

    Raises:
        TooFewError: fewer pairs of a kind than asked for, none that has donors, or people unknown.
        ValueError: an unknown region or size, or a map that is not finite.
    """
    study.faces.need_people("region swap")
    several(explainers, "explainers", "explainers")
    asked = study.settings
    changes = [_Change(kind, size, region) for kind in PASTES for size in asked.sizes for region in asked.regions]
    grid = study.grid
    masks = {change: region_mask(change.region, change.size, grid) for change in changes}
    drawn = {direction: draw(study, direction) for direction in DIRECTIONS}
    study.begin(sum(len(found) for found, _ in drawn.values()) * (1 + len(masks)) * len(explainers))
    rows: list[SwapRow] = []
    draws: list[SwapDraw] = []
    for direction, (found, passed) in drawn.items():
        controls = sum(pair.own is not None for pair in found)
        draws.append(SwapDraw(direction, len(found), controls, passed))
        estimator = study.estimator(found)
        by_explainer = _ask(study, explainers, found, direction == "impostor-into-genuine", masks)
        for explainer, by_change in zip(explainers, by_explainer, strict=True):
            for kind in PASTES if controls else ["swap"]:
                about = (explainer.name, direction, kind)
                rows += _rows(about, by_change, by_explainer[0], asked, estimator)
    return RegionSwap(tuple(rows), estimator.unit, tuple(draws), asked.blend, asked.match_colour)


def draw(study: Study, direction: str) -> tuple[list[Drawn], int]:
    """Pairs with the donors of a direction and, where there is one, of the control; how many were passed over."""
    faces, rng = study.faces, np.random.default_rng(study.settings.seed)
    genuine = direction == "impostor-into-genuine"

    def complete(pair: Drawn) -> Drawn | None:
        found = faces.with_donor(pair, genuine, rng)
        if found is None:
            return None
        # B itself as a donor would make pixels equal.
        return found._replace(own=faces.another(faces.person(found.a), rng, (found.a, found.b)))

    return faces.draw(genuine, study.count(), rng, complete)


def _ask(
    study: Study, explainers: Sequence[Explainer], found: Sequence[Drawn], which: int, masks: Masks
) -> list[Areas]:
    """The areas of each explainer; ``which`` of (similar, dissimilar) is asked."""
    faces, settings, grid = study.faces, study.settings, study.grid
    shape = (len(explainers), len(found), grid[0] * grid[1])
    clean = np.empty(shape)
    changed = {change: np.full(shape, np.nan) for change in masks}
    over_pixels = {change: np.full((len(explainers), 2 * settings.pixels, len(found)), np.nan) for change in masks}
    for block in study.blocks(len(found)):
        part = found[block]
        first = faces.stacked([pair.a for pair in part])
        a, b = study.normalised(first), study.pictures([pair.b for pair in part])
        before: list[Tensor] = []
        for number, explainer in enumerate(explainers):
            before.append(explained(explainer, study.model, a, b)[which])
            clean[number, block] = _flat(to_cells(before[-1], grid))
            study.advance(len(part))
        for change, mask in masks.items():
            donors = [pair.donor if change.paste == "swap" else pair.own for pair in part]
            # The control is made only where there is a picture for it.
            used = [place for place, key in enumerate(donors) if key is not None]
            if not used:
                study.advance(len(part) * len(explainers))
                continue
            given = faces.stacked([key for key in donors if key is not None])
            made = paste(first[used], given, mask, blend=settings.blend, match_colour=settings.match_colour)
            images, pairs = study.normalised(made.images), block.start + np.array(used)
            for number, explainer in enumerate(explainers):
                maps = explained(explainer, study.model, images, b[used])[which]
                changed[change][number, pairs] = _flat(to_cells(maps, grid))
                if settings.pixels:
                    truth = made.pixels[0].flatten().numpy()
                    two = [to_pixels(m, study.preprocessing.size) for m in (maps, maps - before[number][used])]
                    over_pixels[change][number][:, pairs] = [areas(_flat(m), truth) for m in two]
                study.advance(len(part))
    return [
        {
            key: np.concatenate((_readings(changed[key][number], clean[number], mask), over_pixels[key][number]))
            for key, mask in masks.items()
        }
        for number in range(len(explainers))
    ]


def _readings(maps: Floats, clean: Floats, mask: Tensor) -> Floats:
    """Areas [3, pairs] of maps [pairs, cells]: absolute, difference, centred."""
    known, truth = ~np.isnan(maps[:, 0]), mask.flatten().numpy()
    made = np.full((3, len(maps)), np.nan)
    if known.any():
        made[:, known] = [areas(values[known], truth) for values in (maps, maps - clean, standardised(maps, clean))]
    return made


def _flat(maps: Tensor) -> Floats:
    return maps.flatten(1).double().cpu().numpy()


def _rows(
    about: tuple[str, str, str], by_change: Areas, first: Areas, settings: Settings, estimator: Estimator
) -> list[SwapRow]:
    """The rows of one explainer, direction and paste, beside the first explainer's; each size's mean over its regions
    behind them."""

    def with_mean(values: Areas, size: str) -> list[Floats]:
        by_region = [values[_Change(about[2], size, region)] for region in settings.regions]
        return [*by_region, np.mean(by_region, axis=0)]

    rows = []
    for size in settings.sizes:
        both = zip(with_mean(by_change, size), with_mean(first, size), strict=True)
        for region, (figures, firsts) in zip((*settings.regions, "mean"), both, strict=True):
            absolute, difference, centred, *pixels = map(estimator.mean, figures)
            behind = None if by_change is first else estimator.mean(firsts[0] - figures[0])
            over_pixels = OverPixels(*pixels) if pixels else None
            rows.append(SwapRow(*about, region, size, absolute, difference, centred, behind, over_pixels))
    return rows
