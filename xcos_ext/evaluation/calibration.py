"""Decision thresholds from pictures of people, without any protocol's pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.nn.model import XCosModel
from xcos_ext.nn.statistics import Calibration

from .verification import operating_point

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
        assert isinstance(row, Tensor)
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
    decision_fmr: float = 1e-3,
    fmrs: Sequence[float] = (1e-1, 1e-2, 1e-3),
) -> Calibration:
    """Thresholds at false match rates, over all impostor pairs of a set of people.

    The decision threshold is the one at ``decision_fmr``. It needs no genuine pairs, so people with one picture each
    are enough, and thousands of people give a rate of 1e-3 with confidence.

    Args:
        model: the model to calibrate; only its score is used.
        features: grid features F [N, C, H, W] of different pictures.
        people: N names.
        decision_fmr: false match rate of the decision threshold.
        fmrs: further rates to note.

    Returns:
        The calibration, for :class:`~xcos_ext.nn.PlugStatistics` or ``XCosModel(threshold=..., fmr_thresholds=...)``.

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
    # operating_point() wants both kinds; the genuine score given here has no influence on thresholds.
    values = np.append(impostors.astype(np.float64), 2.0)
    labels = np.append(np.zeros(impostors.size, bool), True)
    at = {rate: operating_point(values, labels, rate).threshold for rate in {*fmrs, decision_fmr}}
    return Calibration(
        threshold=at[decision_fmr],
        rule=f"false match rate {decision_fmr:g} over all impostor pairs",
        fmr={rate: at[rate] for rate in fmrs},
        impostor_pairs=int(impostors.size),
        genuine_pairs=0,
    )
