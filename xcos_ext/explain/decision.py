"""What a decision is made of, in plain numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from xcos_ext.io.arrays import refuse_masked

__all__ = ["Maps", "contribution", "one_pair"]


class Maps(NamedTuple):
    """One pair's result as NumPy arrays."""

    score: float
    similarity: np.ndarray
    attention: np.ndarray


def contribution(similarity: np.ndarray, attention: np.ndarray, threshold: float) -> np.ndarray:
    """Signed part of every cell in the decision: W * (S - t), fp64. As sum W = 1, it adds up to score - t.

    >>> contribution(np.array([[0.5, 0.1]]), np.array([[0.25, 0.75]]), 0.3)
    array([[ 0.05, -0.15]])
    """
    return np.asarray(attention, np.float64) * (np.asarray(similarity, np.float64) - threshold)


def one_pair(result: Any) -> Maps:
    """The maps of a single pair.

    Args:
        result: has ``score``, ``similarity`` and ``attention``: [1] or [], [1, H, W] or [H, W]; tensors or
            arrays.

    Raises:
        ValueError: several pairs, other shapes, or values that are not finite.
    """
    given = (result.score, result.similarity, result.attention)
    refuse_masked(score=given[0], similarity=given[1], attention=given[2])
    score, *maps = (np.asarray(v.detach().cpu().double() if hasattr(v, "detach") else v, np.float64) for v in given)
    if score.size != 1:
        raise ValueError(f"result: expected one pair, got score of shape {list(score.shape)}")
    similarity, attention = (part[0] if part.ndim == 3 and len(part) == 1 else part for part in maps)
    if similarity.ndim != 2 or similarity.size == 0 or similarity.shape != attention.shape:
        raise ValueError(
            "result: expected similarity and attention of one shape [H, W], got "
            f"{list(similarity.shape)} and {list(attention.shape)}"
        )
    if not all(np.isfinite(a).all() for a in (score, similarity, attention)):
        raise ValueError("result: expected finite values, got NaN or infinity")
    return Maps(score.item(), similarity, attention)
