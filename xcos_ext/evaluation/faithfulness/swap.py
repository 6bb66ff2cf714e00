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

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.evaluation.identification import Estimate
from xcos_ext.explain.explainers.interface import Explainer, PairModel

from .faces import Drawn, Faces, normalised
from .models import device_of, explained, grid_of, remembering
from .regions import REGIONS, Blend, paste, region_mask
from .resolution import to_cells, to_pixels
from .statistics import Estimator, areas, plain, standardised

__all__ = ["DIRECTIONS", "PASTES", "RegionSwap", "SwapDraw", "SwapRow", "region_swap"]

#: Direction -> what is done and asked.
DIRECTIONS = {
    "impostor-into-genuine": "an impostor's region in a genuine pair; the dissimilar map is asked",
    "genuine-into-impostor": "a region of B's person in an impostor pair; the similar map is asked",
}

#: Paste -> whose region it is.
PASTES = {
    "swap": "of the other person, as the direction says",
    "same-person": "control: of another photograph of A's own person",
}

Tick = Callable[[int, int], None]


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
    pixels: tuple[Estimate, Estimate] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        data = {name: getattr(self, name) for name in ("explainer", "direction", "paste", "region", "size")}
        data |= {name: plain(getattr(self, name)) for name in ("absolute", "difference", "centred")}
        data["behind"] = None if self.behind is None else plain(self.behind)
        if self.pixels is not None:
            data["pixels"] = {"absolute": plain(self.pixels[0]), "difference": plain(self.pixels[1])}
        return data


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
class RegionSwap:
    """All rows.

    Attributes:
        rows: per explainer, direction, paste, size and region; ``"mean"`` last of the regions.
        draws: the pairs of each direction.
        blend, match_colour: how regions were pasted.
        unit: what the intervals' bootstrap draws: people or pairs.
    """

    rows: tuple[SwapRow, ...]
    draws: tuple[SwapDraw, ...]
    blend: str
    match_colour: bool
    unit: str

    def find(
        self,
        explainer: str,
        direction: str = "impostor-into-genuine",
        region: str = "mean",
        size: str = "medium",
        paste: str = "swap",
    ) -> SwapRow:
        """One row.

        Raises:
            KeyError: there is none.
        """
        wanted = (explainer, direction, paste, region, size)
        for row in self.rows:
            if (row.explainer, row.direction, row.paste, row.region, row.size) == wanted:
                return row
        raise KeyError(wanted)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "blend": self.blend,
            "match_colour": self.match_colour,
            "unit": self.unit,
            "draws": [asdict(draw) for draw in self.draws],
            "rows": [row.as_dict() for row in self.rows],
        }


_Key = tuple[str, str, str]  # paste, size, region


class _Asked:
    """The maps of one explainer: cells of all pairs, and areas over pixels."""

    def __init__(self, count: int, cells: int, keys: Sequence[_Key], pixels: bool) -> None:
        self.clean = np.full((count, cells), np.nan)
        self.changed = {key: np.full((count, cells), np.nan) for key in keys}
        self.pixels = {key: np.full((count, 2), np.nan) for key in keys} if pixels else {}


@torch.no_grad()
def region_swap(
    model: PairModel,
    explainers: Sequence[Explainer],
    faces: Faces,
    *,
    pairs: int = 60,
    directions: Sequence[str] = tuple(DIRECTIONS),
    regions: Sequence[str] = tuple(REGIONS),
    sizes: Sequence[str] = ("medium",),
    blend: Blend = "hard",
    match_colour: bool = False,
    pixels: bool = False,
    seed: int = 0,
    replicates: int = 1000,
    batch_size: int = 16,
    tick: Tick | None = None,
) -> RegionSwap:
    """Ask every explainer where a region was swapped.

    A pair has one donor for all regions. Memory holds a batch of pictures and the cell maps of all pairs.

    Args:
        model: whose decisions are explained.
        explainers: with the controls that are to be beside them.
        faces: with people.
        pairs: changed pairs of each direction.
        directions: keys of :data:`DIRECTIONS`.
        regions: keys of ``REGIONS``.
        sizes: of the regions.
        blend, match_colour: see :func:`~.regions.paste`.
        pixels: also give areas over pixels; cell maps are made larger bilinearly for it.
        seed: of the draw.
        replicates: for the intervals, over people; 0 for none.
        batch_size: pairs at once.
        tick: called with (maps made, maps in all).

    Raises:
        TooFewError: fewer pairs of a kind than asked for, none that has donors, or people unknown.
        ValueError: an unknown direction, region or size, or a map that is not finite.
    """
    faces.need_people("region swap")
    for name in directions:
        if name not in DIRECTIONS:
            raise ValueError(f"directions: expected some of {', '.join(DIRECTIONS)}, got {name!r}")
    grid, size = grid_of(model), model.preprocessing.size
    masks = {(which, region): region_mask(region, which, grid) for which in sizes for region in regions}
    keys = [(kind, *key) for kind in PASTES for key in masks]
    drawn = {name: _draw(faces, name, pairs, seed) for name in directions}
    total = sum(len(found) for found, _ in drawn.values()) * (1 + len(keys)) * len(explainers)
    done = 0
    model = remembering(model)
    device = device_of(model)
    rows: list[SwapRow] = []
    draws: list[SwapDraw] = []
    unit = "people"
    for direction, (found, passed) in drawn.items():
        which = 1 if direction == "impostor-into-genuine" else 0  # of the maps (similar, dissimilar)
        asked = [_Asked(len(found), grid[0] * grid[1], keys, pixels) for _ in explainers]
        for start in range(0, len(found), batch_size):
            part = found[start : start + batch_size]
            block = slice(start, start + len(part))
            first = faces.stacked([pair.a for pair in part])
            donors = {
                "swap": faces.stacked([pair.donor or pair.a for pair in part]),
                "same-person": faces.stacked([pair.own or pair.a for pair in part]),
            }
            has_own = np.array([pair.own is not None for pair in part])
            a, b = (normalised(model.preprocessing, p, device) for p in (first, faces.stacked([p.b for p in part])))
            before: list[Tensor] = []
            for explainer, kept in zip(explainers, asked, strict=True):
                before.append(explained(explainer, model, a, b)[which])
                kept.clean[block] = _cells(before[-1], grid)
                done += len(part)
                if tick is not None:
                    tick(done, total)
            for kind, *key in keys:
                # The control is made only where there is a picture for it.
                used = np.ones(len(part), bool) if kind == "swap" else has_own
                done += int((~used).sum()) * len(explainers)
                if not used.any():
                    continue
                chosen = torch.from_numpy(used)
                mask = masks[key[0], key[1]]
                made = paste(first[chosen], donors[kind][chosen], mask, blend=blend, match_colour=match_colour)
                changed = normalised(model.preprocessing, made.images, device)
                for explainer, kept, clean in zip(explainers, asked, before, strict=True):
                    maps = explained(explainer, model, changed, b[chosen])[which]
                    cells = np.full((len(part), grid[0] * grid[1]), np.nan)
                    cells[used] = _cells(maps, grid)
                    kept.changed[kind, key[0], key[1]][block] = cells
                    if pixels:
                        truth = made.pixels[0].flatten().numpy()
                        two = [_flat(to_pixels(m, size)) for m in (maps, maps - clean[chosen])]
                        areas_of = np.full((len(part), 2), np.nan)
                        areas_of[used] = np.stack([areas(m, truth) for m in two], 1)
                        kept.pixels[kind, key[0], key[1]][block] = areas_of
                    done += int(used.sum())
                    if tick is not None:
                        tick(done, total)
        estimator = Estimator(len(found), faces.ids(found), replicates=replicates, seed=seed)
        unit = estimator.unit
        controls = sum(pair.own is not None for pair in found)
        draws.append(SwapDraw(direction, len(found), controls, passed))
        truths = {key: mask.flatten().numpy() for key, mask in masks.items()}
        first_of: dict[_Key, NDArray[np.float64]] = {}
        for explainer, kept in zip(explainers, asked, strict=True):
            for kind in PASTES if controls else ["swap"]:
                rows += _rows(explainer.name, direction, kind, kept, truths, sizes, regions, estimator, first_of)
    return RegionSwap(tuple(rows), tuple(draws), blend, match_colour, unit)


def _draw(faces: Faces, direction: str, count: int, seed: int) -> tuple[list[Drawn], int]:
    rng = np.random.default_rng(seed)

    def complete(pair: Drawn) -> Drawn | None:
        if direction == "genuine-into-impostor":
            found = faces.with_relative(pair, rng)
            return None if found is None else found._replace(own=faces.another(faces.person(found.a), rng, (found.a,)))
        person = faces.person(pair.a)
        donor = faces.stranger((person,), rng)
        if donor is None:
            return None
        # B itself as a donor, in either role, would make pixels equal.
        return pair._replace(donor=donor, own=faces.another(person, rng, (pair.a, pair.b)))

    return faces.draw(direction == "impostor-into-genuine", count, rng, complete)


def _flat(maps: Tensor) -> NDArray[np.float64]:
    return maps.flatten(1).double().cpu().numpy()


def _cells(maps: Tensor, grid: tuple[int, int]) -> NDArray[np.float64]:
    return _flat(to_cells(maps, grid))


def _rows(
    explainer: str,
    direction: str,
    kind: str,
    kept: _Asked,
    truths: dict[tuple[str, str], NDArray[np.bool_]],
    sizes: Sequence[str],
    regions: Sequence[str],
    estimator: Estimator,
    first_of: dict[_Key, NDArray[np.float64]],
) -> list[SwapRow]:
    """The rows of one explainer, each size's mean over its regions behind them; ``first_of`` holds the absolute AUC of
    every pair by the first explainer that comes here."""
    made = []
    for size in sizes:
        by_region: list[list[NDArray[np.float64]]] = []
        for region in regions:
            maps, truth = kept.changed[kind, size, region], truths[size, region]
            known = ~np.isnan(maps[:, 0])
            readings = [maps, maps - kept.clean, standardised(maps, kept.clean)]
            figures = []
            for reading in readings:
                values = np.full(len(maps), np.nan)
                values[known] = areas(reading[known], truth)
                figures.append(values)
            if kept.pixels:
                figures += list(kept.pixels[kind, size, region].T)
            by_region.append(figures)
        means = [np.mean([figures[i] for figures in by_region], axis=0) for i in range(len(by_region[0]))]
        for region, figures in zip((*regions, "mean"), (*by_region, means), strict=True):
            absolute, difference, centred, *over_pixels = map(estimator.mean, figures)
            pair = (over_pixels[0], over_pixels[1]) if over_pixels else None
            first = first_of.setdefault((kind, size, region), figures[0])
            behind = None if first is figures[0] else estimator.mean(first - figures[0])
            made.append(SwapRow(explainer, direction, kind, region, size, absolute, difference, centred, behind, pair))
    return made
