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
from torch import Tensor

from xcos_ext.evaluation.figures import Estimate
from xcos_ext.explain.explainers.interface import Explainer, XCosPairs

from .pasting import pixel_mask
from .study import Results, Study

__all__ = ["Locality", "LocalityRow", "locality"]


@dataclass(frozen=True)
class LocalityRow:
    """Locality with one fill.

    Attributes:
        fill: what took the place of a cell's pixels.
        own: mean over pairs and cells of |dS_ij| / sum |dS|.
        neighbourhood: the same of the 3x3 cells around (fewer at the edge).
        unmoved: share of the occlusions that changed no cell; left out of the means.
    """

    fill: str
    own: Estimate
    neighbourhood: Estimate
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
def locality(study: Study, explainers: Sequence[Explainer] = ()) -> Locality:
    """Locality of a model's cells, whatever the explainers.

    Args:
        study: of a model with cells; of the settings, count, fills, seed, replicates and batch_size are used.

    Raises:
        TooFewError: fewer pairs of a kind than asked for.
        ValueError: a model without cells, or an unknown fill.
    """
    if not isinstance(study.model, XCosPairs):
        raise ValueError(f"model: locality is about an xCos model's cells, and {study.model.name} has none")
    features_of, score, fills = study.model.features, study.model.model.score, study.settings.fills
    found, _, passed = study.faces.draw_both(study.count(), study.settings.seed)
    grid = study.grid
    cells = grid[0] * grid[1]
    each = torch.eye(cells).view(cells, 1, *grid)
    masks = pixel_mask(each.bool(), study.preprocessing.size).to(study.device)
    near = F.conv2d(each, torch.ones(1, 1, 3, 3), padding=1).view(cells, cells).bool()
    fill_in = study.filler([key for pair in found for key in (pair.a, pair.b)])
    # [own or around, pairs, cells]
    shares = {fill: np.full((2, len(found), cells), np.nan) for fill in fills}
    study.begin(len(found) * cells * len(fills))
    for number, pair in enumerate(found):
        a, b = study.sides([pair])
        enrolled = features_of(b)
        clean = score(features_of(a), enrolled, return_maps=True).similarity
        for fill, pixels in fill_in(a).items():
            moved: list[Tensor] = []
            for part in masks.split(study.settings.batch_size):
                features = features_of(torch.where(part, pixels, a))
                changed = score(features, enrolled.expand_as(features), return_maps=True).similarity
                moved.append((changed - clean).abs().flatten(1).double().cpu())
                study.advance(len(part))
            change = torch.cat(moved)  # [occluded cell, cell that changed]
            answers = torch.stack([change.diagonal(), (change * near).sum(1)])
            shares[fill][:, number] = answers / change.sum(1)  # NaN where nothing changed
    estimator = study.estimator(found)
    rows = []
    for fill, both in shares.items():
        own, around = map(estimator.mean, np.ma.masked_invalid(both).mean(2).filled(np.nan))
        rows.append(LocalityRow(fill, own, around, float(np.isnan(both[0]).mean())))
    return Locality(tuple(rows), estimator.unit, len(found), 1 / cells, near.double().mean().item(), passed)
