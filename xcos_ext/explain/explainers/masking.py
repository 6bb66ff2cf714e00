"""Scores of a pair while parts of picture A are hidden: what occlusion and CorrRISE are made of."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor

from xcos_ext.card import Preprocessing
from xcos_ext.explain.fills import filled

from .interface import PairModel

__all__ = ["Fill", "check_fill", "fill_pictures", "masked_scores"]

#: What is shown where a picture is hidden: black, its own mean colour, or the picture itself, blurred.
Fill = Literal["black", "mean", "blur"]


def check_fill(fill: str) -> Fill:
    """The name of a fill.

    Raises:
        ValueError: no such fill.
    """
    if fill not in get_args(Fill):
        raise ValueError(f"fill: expected one of {', '.join(get_args(Fill))}, got {fill!r}")
    return cast(Fill, fill)


def fill_pictures(fill: Fill, images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The pictures to show where others are hidden.

    Args:
        fill: which.
        images: normalised [N, 3, H, W].
        preprocessing: they were normalised by: black is pixel value 0, not 0 after normalisation.

    Returns:
        [N, 3, H, W], possibly expanded.
    """
    if fill == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    return filled({"black": "zero", "blur": "blur"}[fill], images, preprocessing)


@torch.no_grad()
def masked_scores(
    model: PairModel, a: Tensor, features_b: Tensor, keep: Tensor, fill: Tensor, batch_size: int
) -> Tensor:
    """Scores of all pairs under all masks; memory holds ``batch_size`` masked pictures.

    Args:
        model: of the score.
        a: normalised images [N, 3, H, W].
        features_b: of the faces that they are compared with [N, ...], computed once.
        keep: bool [M, H, W]: True where A stays.
        fill: what takes the place of the rest [N, 3, H, W].
        batch_size: masked pictures per forward pass.

    Returns:
        [N, M].
    """
    count, masks = a.shape[0], keep.shape[0]
    index = torch.arange(count * masks, device=a.device)
    scores = []
    for part in index.split(batch_size):
        pair, mask = part // masks, part % masks
        pictures = torch.where(keep[mask].unsqueeze(1), a[pair], fill[pair])
        scores.append(model.score(model.features(pictures), features_b[pair]))
    return torch.cat(scores).view(count, masks)
