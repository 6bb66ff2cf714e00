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
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.evaluation.bootstrap import Estimator
from xcos_ext.evaluation.figures import Estimate
from xcos_ext.explain.explainers.interface import Explainer

from .curves import areas, standardised
from .faces import Drawn
from .maps import explained, to_cells, to_pixels
from .regions import paste, region_mask
from .study import DIRECTIONS, Results, Settings, Study

__all__ = ["PASTES", "OverPixels", "RegionSwap", "SwapDraw", "SwapRow", "region_swap"]

#: Paste -> whose region it is.
PASTES = {
    "swap": "of the other person, as the direction says",
    "same-person": "control: of another photograph of A's own person",
}


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


class _Key(NamedTuple):
    paste: str
    size: str
    region: str


@dataclass
class _Asked:
    """The maps [pairs, cells] of one explainer, of the unchanged pairs and of each change; areas over pixels [pairs, 2]
    if they are asked for. NaN where there was no change."""

    clean: NDArray[np.float64]
    changed: dict[_Key, NDArray[np.float64]] = field(default_factory=dict)
    pixels: dict[_Key, NDArray[np.float64]] = field(default_factory=dict)


@torch.no_grad()
def region_swap(study: Study, explainers: Sequence[Explainer]) -> RegionSwap:
    """Ask every explainer where a region was swapped.

    A pair has one donor for all regions. Memory holds a batch of pictures and the cell maps of all pairs.

    Args:
        study: of the settings, all but fills, gallery and top are used.

    Raises:
        TooFewError: fewer pairs of a kind than asked for, none that has donors, or people unknown.
        ValueError: an unknown direction, region or size, or a map that is not finite.
    """
    study.faces.need_people("region swap")
    asked = study.settings
    for name in asked.directions:
        if name not in DIRECTIONS:
            raise ValueError(f"directions: expected some of {', '.join(DIRECTIONS)}, got {name!r}")
    grid = study.grid
    masks = {
        _Key(kind, size, region): region_mask(region, size, grid)
        for kind in PASTES
        for size in asked.sizes
        for region in asked.regions
    }
    drawn = {name: _draw(study, name) for name in asked.directions}
    study.begin(sum(len(found) for found, _ in drawn.values()) * (1 + len(masks)) * len(explainers))
    rows: list[SwapRow] = []
    draws: list[SwapDraw] = []
    for direction, (found, passed) in drawn.items():
        kept = _ask(study, explainers, found, 1 if direction == "impostor-into-genuine" else 0, masks)
        estimator = study.estimator(found)
        controls = sum(pair.own is not None for pair in found)
        draws.append(SwapDraw(direction, len(found), controls, passed))
        first_of: dict[_Key, NDArray[np.float64]] = {}
        for explainer, maps in zip(explainers, kept, strict=True):
            for kind in PASTES if controls else ["swap"]:
                rows += _rows(explainer.name, direction, kind, maps, masks, asked, estimator, first_of)
    unit = estimator.unit if drawn else "people"
    return RegionSwap(tuple(rows), unit, tuple(draws), asked.blend, asked.match_colour)


def _draw(study: Study, direction: str) -> tuple[list[Drawn], int]:
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
    study: Study, explainers: Sequence[Explainer], found: Sequence[Drawn], which: int, masks: Mapping[_Key, Tensor]
) -> list[_Asked]:
    """The maps of each explainer over all pairs; ``which`` of (similar, dissimilar)."""
    faces, settings, grid = study.faces, study.settings, study.grid
    cells = grid[0] * grid[1]
    asked = [
        _Asked(
            np.full((len(found), cells), np.nan),
            {key: np.full((len(found), cells), np.nan) for key in masks},
            {key: np.full((len(found), 2), np.nan) for key in masks} if settings.pixels else {},
        )
        for _ in explainers
    ]
    for block in study.blocks(len(found)):
        part = found[block]
        first = faces.stacked([pair.a for pair in part])
        donors = {
            "swap": faces.stacked([pair.donor or pair.a for pair in part]),
            "same-person": faces.stacked([pair.own or pair.a for pair in part]),
        }
        # The control is made only where there is a picture for it.
        usable = {"swap": np.ones(len(part), bool), "same-person": np.array([pair.own is not None for pair in part])}
        a, b = study.normalised(first), study.pictures([pair.b for pair in part])
        before: list[Tensor] = []
        for explainer, kept in zip(explainers, asked, strict=True):
            before.append(explained(explainer, study.model, a, b)[which])
            kept.clean[block] = _flat(to_cells(before[-1], grid))
            study.advance(len(part))
        for key, mask in masks.items():
            used = usable[key.paste]
            if not used.any():
                study.advance(len(part) * len(explainers))
                continue
            chosen, rows = torch.from_numpy(used), block.start + np.flatnonzero(used)
            made = paste(
                first[chosen],
                donors[key.paste][chosen],
                mask,
                blend=settings.blend,
                match_colour=settings.match_colour,
            )
            changed, others = study.normalised(made.images), b[chosen]
            for explainer, kept, clean in zip(explainers, asked, before, strict=True):
                maps = explained(explainer, study.model, changed, others)[which]
                kept.changed[key][rows] = _flat(to_cells(maps, grid))
                if settings.pixels:
                    truth = made.pixels[0].flatten().numpy()
                    two = [_flat(to_pixels(m, study.preprocessing.size)) for m in (maps, maps - clean[chosen])]
                    kept.pixels[key][rows] = np.stack([areas(m, truth) for m in two], 1)
                study.advance(len(part))
    return asked


def _flat(maps: Tensor) -> NDArray[np.float64]:
    return maps.flatten(1).double().cpu().numpy()


def _rows(
    explainer: str,
    direction: str,
    kind: str,
    kept: _Asked,
    masks: Mapping[_Key, Tensor],
    settings: Settings,
    estimator: Estimator,
    first_of: dict[_Key, NDArray[np.float64]],
) -> list[SwapRow]:
    """The rows of one explainer, each size's mean over its regions behind them; ``first_of`` holds the absolute AUC of
    every pair by the first explainer that comes here."""
    made = []
    for size in settings.sizes:
        by_region: list[list[NDArray[np.float64]]] = []
        for region in settings.regions:
            key = _Key(kind, size, region)
            maps, truth = kept.changed[key], masks[key].flatten().numpy()
            known = ~np.isnan(maps[:, 0])
            figures = []
            for reading in (maps, maps - kept.clean, standardised(maps, kept.clean)):
                values = np.full(len(maps), np.nan)
                values[known] = areas(reading[known], truth)
                figures.append(values)
            if kept.pixels:
                figures += list(kept.pixels[key].T)
            by_region.append(figures)
        means = [np.mean([figures[i] for figures in by_region], axis=0) for i in range(len(by_region[0]))]
        for region, figures in zip((*settings.regions, "mean"), (*by_region, means), strict=True):
            absolute, difference, centred, *over_pixels = map(estimator.mean, figures)
            pixels = OverPixels(*over_pixels) if over_pixels else None
            first = first_of.setdefault(_Key(kind, size, region), figures[0])
            behind = None if first is figures[0] else estimator.mean(first - figures[0])
            made.append(
                SwapRow(explainer, direction, kind, region, size, absolute, difference, centred, behind, pixels)
            )
    return made
