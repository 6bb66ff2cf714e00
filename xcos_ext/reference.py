"""Every operator in plain torch: what the compiled ones must compute, and the oracle of their tests.

Same signatures, contracts and results as :mod:`xcos_ext.ops`; slower, larger, and differentiable any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xcos_ext.ops.xcos_score import XCosScore

__all__ = ["cell_norm", "grid_cosine", "xcos_score"]


def _accumulate(x: Tensor) -> Tensor:
    """Half precision is summed in fp32."""
    return x if x.dtype == torch.float64 else x.float()


def cell_norm(x: Tensor) -> Tensor:
    """Euclidean norm over channels, [N, C, H, W] to [N, H, W], with gradient 0 (not NaN) at a zero cell."""
    squared = (x * x).sum(1)
    zero = squared == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())


def grid_cosine(a: Tensor, b: Tensor, *, eps: float = 1e-6) -> Tensor:
    """S = x.y / (max(|x|, eps) max(|y|, eps)) for the two feature vectors of each cell; a zero cell has gradient 0."""
    a, b = _accumulate(a), _accumulate(b)
    norm_a, norm_b = cell_norm(a), cell_norm(b)
    # By contract nothing flows into a zero cell, where the clamped formula alone would send y / eps.
    a = torch.where((norm_a == 0).unsqueeze(1), a.detach(), a)
    b = torch.where((norm_b == 0).unsqueeze(1), b.detach(), b)
    return (a * b).sum(1) / (norm_a.clamp_min(eps) * norm_b.clamp_min(eps))


def xcos_score(
    a: Tensor,
    b: Tensor,
    attention: Tensor | str | None = None,
    *,
    logits: bool = False,
    temperature: float = 1.0,
    eps: float = 1e-6,
    return_maps: bool = False,
) -> Tensor | XCosScore:
    """score = sum over cells of W * S, with W uniform, by norms, given, or the softmax of given logits."""
    similarity = grid_cosine(a, b, eps=eps)
    cells = similarity.shape[1] * similarity.shape[2]
    uniform = torch.full_like(similarity, 1.0 / cells)
    if attention is None:
        weights = uniform
    elif isinstance(attention, str):
        product = cell_norm(_accumulate(a)) * cell_norm(_accumulate(b))
        total = product.sum((1, 2), keepdim=True)
        # Where nothing has a norm there is nothing to weigh by.
        weights = torch.where(total == 0, uniform, product / torch.where(total == 0, 1.0, total))
    else:
        weights = attention.to(similarity.dtype).expand_as(similarity)
        if logits:
            weights = (weights / temperature).flatten(1).softmax(1).view_as(similarity)
    score = (weights * similarity).sum((1, 2))
    return XCosScore(score, similarity, weights) if return_maps else score
