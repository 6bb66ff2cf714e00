"""Decision thresholds from pictures of people, without any protocol's pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.nn.model import XCosModel
from xcos_ext.nn.plugin import DEFAULT_SPREAD
from xcos_ext.nn.statistics import Calibration

from .verification import fmr_threshold

__all__ = ["all_pair_scores", "calibrate"]


@torch.no_grad()
def all_pair_scores(
    model: XCosModel, features: Tensor, people: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Scores of every unordered pair of different pictures.

    Args:
        model: scores the features.
        features: grid features F [N, C, H, W].
        people: N names.

    Returns:
        (scores [N (N - 1) / 2], genuine): pairs (0, 1), (0, 2), ..., (1, 2), ...

    Raises:
        ValueError: lengths differ.
    """
    count = features.shape[0]
    if len(people) != count:
        raise ValueError(f"people: expected {count} names, got {len(people)}")
    names = np.asarray(people)
    scores, genuine = [], []
    for i in range(count - 1):
        others = features[i + 1 :]
        row = model.score(features[i : i + 1].expand_as(others), others)
        scores.append(row.float().cpu().numpy())
        genuine.append(names[i + 1 :] == names[i])
    if not scores:
        return np.empty(0, np.float32), np.empty(0, bool)
    return np.concatenate(scores), np.concatenate(genuine)


def calibrate(
    model: XCosModel,
    features: Tensor,
    people: Sequence[str],
    *,
    centre: bool = True,
    spread: float = DEFAULT_SPREAD,
    project: int | None = None,
    decision_fmr: float = 5e-3,
    fmrs: Sequence[float] = (1e-1, 1e-2, 1e-3),
) -> Calibration:
    """Thresholds at false match rates, over all impostor pairs of a set of people.

    The decision threshold is the one at ``decision_fmr``. It needs no genuine pairs, so people with one
    picture each are enough, and a thousand people give a rate of 1e-3 with confidence. The default rate is
    close to the best accuracy on balanced pairs for the networks measured; where a false match costs more
    than a false rejection, use the thresholds noted at lower rates.

    Args:
        model: the model to calibrate; only its score is used.
        features: grid features F [N, C, H, W] of different pictures.
        people: N names.
        centre, spread, project: how the model was plugged; noted in the result.
        decision_fmr: false match rate of the decision threshold.
        fmrs: further rates to note.

    Returns:
        The calibration, for :class:`~xcos_ext.nn.PlugStatistics` or ``XCosModel(threshold=...,
        fmr_thresholds=...)``.

    Raises:
        ValueError: too few impostor pairs for the smallest rate (fewer than 30 expected false matches).
    """
    scores, genuine = all_pair_scores(model, features, people)
    impostors = scores[~genuine]
    smallest = min(decision_fmr, *fmrs)
    if impostors.size * smallest < 30:
        raise ValueError(
            f"people: {impostors.size} impostor pairs cannot tell a false match rate of {smallest:g}; "
            f"at least {int(np.ceil(30 / smallest))} are needed"
        )
    at = {rate: fmr_threshold(impostors, rate) for rate in {*fmrs, decision_fmr}}
    return Calibration(
        centre=centre,
        spread=spread,
        project=project,
        threshold=at[decision_fmr],
        rule=f"false match rate {decision_fmr:g} over all impostor pairs",
        fmr={rate: at[rate] for rate in fmrs},
        impostor_pairs=int(impostors.size),
        genuine_pairs=0,
    )
