"""Locality: does a cell's similarity answer to the cell's own pixels?

The pixels of cell (i, j) are taken from picture A, and all cells' similarities S are looked at again:
locality = |dS_ij| / sum |dS|. Low: the change shows elsewhere, so S_ij is no statement about that place. It is a
property of the model, not of an explainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from xcos_ext.evaluation.identification import Estimate
from xcos_ext.explain.explainers.interface import PairModel, XCosPairs
from xcos_ext.explain.fills import filled

from .faces import Faces, mean_face_of
from .models import device_of, grid_of
from .regions import pixel_mask
from .statistics import Estimator, plain

__all__ = ["Locality", "LocalityRow", "locality"]

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class LocalityRow:
    """Locality with one fill.

    Attributes:
        fill: what took the place of a cell's pixels.
        own: mean over pairs and cells of |dS_ij| / sum |dS|.
        neighbourhood: the same of the 3x3 cells around (fewer at the edge).
        cells: ``own`` of every cell, mean over pairs, [rows][columns].
        unmoved: share of the occlusions that changed no cell; left out of the means.
    """

    fill: str
    own: Estimate
    neighbourhood: Estimate
    cells: tuple[tuple[float, ...], ...]
    unmoved: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "fill": self.fill,
            "own": plain(self.own),
            "neighbourhood": plain(self.neighbourhood),
            "cells": [[None if np.isnan(value) else value for value in row] for row in self.cells],
            "unmoved": self.unmoved,
        }


@dataclass(frozen=True)
class Locality:
    """All rows, and what to compare them with.

    Attributes:
        rows: one per fill.
        pairs: measured.
        chance: ``own`` of a model whose cells all answer alike: 1 / cells.
        chance_neighbourhood: its ``neighbourhood``.
        passed_over: pairs left out for want of a picture.
        unit: what the intervals' bootstrap draws.
    """

    rows: tuple[LocalityRow, ...]
    pairs: int
    chance: float
    chance_neighbourhood: float
    passed_over: int
    unit: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        names = ("pairs", "chance", "chance_neighbourhood", "passed_over", "unit")
        return {name: getattr(self, name) for name in names} | {"rows": [row.as_dict() for row in self.rows]}


@torch.no_grad()
def locality(
    model: PairModel,
    faces: Faces,
    *,
    pairs: int = 60,
    fills: Sequence[str] = ("zero",),
    seed: int = 0,
    replicates: int = 1000,
    batch_size: int = 32,
    tick: Tick | None = None,
) -> Locality:
    """Locality of a model's cells.

    Args:
        model: with cells.
        faces: the pictures.
        pairs: of each kind, genuine and impostor.
        fills: keys of ``FILLS``.
        seed: of the draw.
        replicates: for the intervals; 0 for none.
        batch_size: pictures at once.
        tick: called with (occlusions done, occlusions in all).

    Raises:
        TooFewError: fewer pairs of a kind than asked for.
        ValueError: a model without cells, or an unknown fill.
    """
    if not isinstance(model, XCosPairs):
        raise ValueError(f"model: locality is about an xCos model's cells, and {model.name} has none")
    found, _, passed = faces.draw_both(pairs, seed)
    device, preprocessing = device_of(model), model.preprocessing
    rows, columns = grid_of(model)
    cells = rows * columns
    masks = pixel_mask(torch.eye(cells, dtype=torch.bool).view(cells, rows, columns), preprocessing.size).to(device)
    window = torch.ones(1, 1, 3, 3)
    near = F.conv2d(torch.eye(cells).view(cells, 1, rows, columns), window, padding=1).view(cells, cells).numpy() > 0
    mean_face = None
    if "mean-face" in fills:
        keys = list(dict.fromkeys(key for pair in found for key in (pair.a, pair.b)))
        mean_face = mean_face_of(faces, keys, preprocessing, device)
    own = {fill: np.full((len(found), cells), np.nan) for fill in fills}
    around = {fill: np.full((len(found), cells), np.nan) for fill in fills}
    done, total = 0, len(found) * cells * len(fills)
    for number, pair in enumerate(found):
        a, b = faces.sides([pair], preprocessing, device)
        enrolled = model.features(b)
        clean = model.model.score(model.features(a), enrolled, return_maps=True).similarity
        for fill in fills:
            pixels = filled(fill, a, preprocessing, mean_face)
            moved = []
            for start in range(0, cells, batch_size):
                part = masks[start : start + batch_size].unsqueeze(1)
                features = model.features(torch.where(part, pixels, a))
                changed = model.model.score(features, enrolled.expand_as(features), return_maps=True).similarity
                moved.append((changed - clean).abs().flatten(1).double().cpu())
                done += len(part)
                if tick is not None:
                    tick(done, total)
            change = torch.cat(moved).numpy()  # [occluded cell, cell that changed]
            _shares(change, near, own[fill][number], around[fill][number])
    estimator = Estimator(len(found), faces.ids(found), replicates=replicates, seed=seed)
    made = []
    for fill in fills:
        known = ~np.isnan(own[fill])
        by_cell = [float(own[fill][known[:, c], c].mean()) if known[:, c].any() else np.nan for c in range(cells)]
        made.append(
            LocalityRow(
                fill,
                estimator.mean(_row_means(own[fill])),
                estimator.mean(_row_means(around[fill])),
                tuple(tuple(by_cell[r * columns : (r + 1) * columns]) for r in range(rows)),
                float(1 - known.mean()),
            )
        )
    return Locality(tuple(made), len(found), 1 / cells, float(near.mean()), passed, estimator.unit)


def _shares(
    change: NDArray[np.float64], near: NDArray[np.bool_], own: NDArray[np.float64], around: NDArray[np.float64]
) -> None:
    total = change.sum(1)
    moved = total > 0
    own[moved] = np.diagonal(change)[moved] / total[moved]
    around[moved] = (change * near).sum(1)[moved] / total[moved]


def _row_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of rows without their NaNs; NaN where nothing else is in one."""
    known = ~np.isnan(values)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, values, 0.0).sum(1) / np.maximum(count, 1), np.nan)
