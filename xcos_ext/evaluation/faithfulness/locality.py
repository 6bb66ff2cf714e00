"""Locality: does a cell's similarity answer to the cell's own pixels?

The pixels of cell (i, j) are taken from picture A, and all cells' similarities S are looked at again:
locality = |dS_ij| / sum |dS|. Low: the change shows elsewhere, so S_ij is no statement about that place. It is a
property of the model, not of an explainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from xcos_ext.evaluation.figures import Estimate
from xcos_ext.explain.explainers.interface import Explainer, XCosPairs

from .regions import pixel_mask
from .study import Results, Study

__all__ = ["Locality", "LocalityRow", "locality"]


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


@dataclass(frozen=True)
class Locality(Results[LocalityRow]):
    """A row for each fill, and what to compare them with.

    Attributes:
        pairs: measured.
        chance: ``own`` of a model whose cells all answer alike: 1 / cells.
        chance_neighbourhood: its ``neighbourhood``.
        passed_over: pairs left out for want of a picture.
    """

    pairs: int
    chance: float
    chance_neighbourhood: float
    passed_over: int


@torch.no_grad()
def locality(study: Study, explainers: Sequence[Explainer]) -> Locality:
    """Locality of a model's cells.

    Args:
        study: of a model with cells; of the settings, count, fills, seed, replicates and batch_size are used.

    Raises:
        TooFewError: fewer pairs of a kind than asked for.
        ValueError: a model without cells, or an unknown fill.
    """
    if not isinstance(study.model, XCosPairs):
        raise ValueError(f"model: locality is about an xCos model's cells, and {study.model.name} has none")
    score, fills = study.model.model.score, study.settings.fills
    found, _, passed = study.faces.draw_both(study.count(), study.settings.seed)
    rows, columns = study.grid
    cells = rows * columns
    masks = pixel_mask(torch.eye(cells, dtype=torch.bool).view(cells, rows, columns), study.preprocessing.size)
    window = torch.ones(1, 1, 3, 3)
    near = F.conv2d(torch.eye(cells).view(cells, 1, rows, columns), window, padding=1).view(cells, cells).numpy() > 0
    fill_in = study.filler([key for pair in found for key in (pair.a, pair.b)])
    own = {fill: np.full((len(found), cells), np.nan) for fill in fills}
    around = {fill: np.full((len(found), cells), np.nan) for fill in fills}
    study.begin(len(found) * cells * len(fills))
    for number, pair in enumerate(found):
        a, b = study.sides([pair])
        enrolled = study.model.features(b)
        clean = score(study.model.features(a), enrolled, return_maps=True).similarity
        for fill, pixels in fill_in(a).items():
            moved = []
            for part in masks.to(study.device).unsqueeze(1).split(study.settings.batch_size):
                features = study.model.features(torch.where(part, pixels, a))
                changed = score(features, enrolled.expand_as(features), return_maps=True).similarity
                moved.append((changed - clean).abs().flatten(1).double().cpu())
                study.advance(len(part))
            change = torch.cat(moved).numpy()  # [occluded cell, cell that changed]
            _shares(change, near, own[fill][number], around[fill][number])
    estimator = study.estimator(found)
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
    return Locality(tuple(made), estimator.unit, len(found), 1 / cells, float(near.mean()), passed)


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
