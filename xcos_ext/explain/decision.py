"""What a decision is made of, in plain numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Maps", "contribution", "one_pair"]


class Maps(NamedTuple):
    """One pair's result as NumPy arrays."""

    score: float
    similarity: np.ndarray
    attention: np.ndarray


def contribution(similarity: np.ndarray, attention: np.ndarray, threshold: float) -> np.ndarray:
    """Signed part of every cell in the decision: W * (S - t). As sum W = 1, it adds up to score - t.

    Args:
        similarity: S [H, W].
        attention: W [H, W].
        threshold: t.

    Returns:
        fp64 [H, W].
    """
    return np.asarray(attention, np.float64) * (np.asarray(similarity, np.float64) - threshold)


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, np.float64)


def one_pair(result: Any) -> Maps:
    """The maps of a single pair.

    Args:
        result: has ``score``, ``similarity`` and ``attention``: [1] or [], [1, H, W] or [H, W]; tensors or
            arrays.

    Raises:
        ValueError: several pairs, other shapes, or values that are not finite.
    """
    score = _array(result.score)
    similarity, attention = _array(result.similarity), _array(result.attention)
    if score.size != 1:
        raise ValueError(f"result: expected one pair, got score of shape {list(score.shape)}")
    similarity = similarity[0] if similarity.ndim == 3 and len(similarity) == 1 else similarity
    attention = attention[0] if attention.ndim == 3 and len(attention) == 1 else attention
    if similarity.ndim != 2 or similarity.size == 0 or similarity.shape != attention.shape:
        raise ValueError(
            "result: expected similarity and attention of one shape [H, W], got "
            f"{list(similarity.shape)} and {list(attention.shape)}"
        )
    if not all(np.isfinite(a).all() for a in (score, similarity, attention)):
        raise ValueError("result: expected finite values, got NaN or infinity")
    return Maps(float(score.reshape(())), similarity, attention)
