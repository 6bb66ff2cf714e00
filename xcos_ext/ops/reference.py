"""Every operator in plain torch: what the compiled ones must compute, and the oracle of their tests.

Same signatures, contracts and results as :mod:`xcos_ext.ops`; slower, larger, and differentiable any number of times.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid_match import GridMatch
from .templates import Templates, check_sides, exact_convolutions, resolve_attention
from .xcos_head import HeadLayer, HeadParameters
from .xcos_maps import XCosMaps
from .xcos_matrix import NORMALIZE
from .xcos_score import XCosScore
from .xcos_topk import XCosTopk

__all__ = ["cell_norm", "grid_cosine", "grid_match", "xcos_head", "xcos_maps", "xcos_matrix", "xcos_score", "xcos_topk"]


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


def _candidates(a: Tensor, b: Tensor, radius: int, eps: float) -> Tensor:
    """Cosines of each cell of ``a`` with its neighbours in ``b``, [N, K, H, W], -inf outside the grid."""
    a, b = _accumulate(a), _accumulate(b)
    h, w = a.shape[2:]
    norm_a, norm_b = cell_norm(a), cell_norm(b)
    a = torch.where((norm_a == 0).unsqueeze(1), a.detach(), a)
    b = torch.where((norm_b == 0).unsqueeze(1), b.detach(), b)
    norm_a, norm_b = norm_a.clamp_min(eps), norm_b.clamp_min(eps)
    border = (radius,) * 4
    wide_b, wide_norm = F.pad(b, border), F.pad(norm_b, border, value=1.0)
    inside = F.pad(torch.ones((h, w), dtype=torch.bool, device=a.device), border)
    cosines = []
    for row in range(2 * radius + 1):
        for column in range(2 * radius + 1):
            rows, columns = slice(row, row + h), slice(column, column + w)
            cosine = (a * wide_b[:, :, rows, columns]).sum(1) / (norm_a * wide_norm[:, rows, columns])
            cosines.append(torch.where(inside[rows, columns], cosine, -torch.inf))
    return torch.stack(cosines, 1)


def grid_match(
    a: Tensor,
    b: Tensor,
    *,
    radius: int = 1,
    match: str = "best",
    temperature: float = 0.1,
    symmetric: bool = True,
    eps: float = 1e-6,
    return_offsets: bool = False,
) -> Tensor | GridMatch:
    """S = max, or softmax-weighted mean, of the cosines of a cell with the cells of its neighbourhood."""
    results, offsets = [], []
    for x, y in ((a, b), (b, a))[: 2 if symmetric else 1]:
        cosines = _candidates(x, y, radius, eps)
        if match == "best":
            best = cosines.amax(1, keepdim=True)
            first = ((cosines == best) | cosines.isnan()).int().argmax(1)  # of equals; of NaN where there is any
            results.append(cosines.gather(1, first[:, None])[:, 0])
            side = 2 * radius + 1
            offsets.append(torch.stack((first // side - radius, first % side - radius), 1).to(torch.int8))
        else:
            outside = cosines == -torch.inf
            weights = (cosines / temperature).softmax(1)
            results.append((weights * torch.where(outside, 0.0, cosines)).sum(1))
    similarity = torch.stack(results).mean(0)
    return GridMatch(similarity, torch.stack(offsets, 1)) if return_offsets else similarity


def _head_layer(x: Tensor, layer: HeadLayer) -> Tensor:
    x = F.conv2d(x, layer.weight, layer.bias, padding=1)
    running = layer.norm_mean, layer.norm_variance
    x = F.batch_norm(x, *running, layer.norm_weight, layer.norm_bias, training=False, eps=layer.norm_eps)
    return F.prelu(x, layer.slope)


def xcos_head(
    a: Tensor,
    b: Tensor,
    parameters: HeadParameters,
    *,
    temperature: float = 1.0,
    symmetric: bool = True,
    eps: float = 1e-6,
    return_maps: bool = False,
) -> Tensor | XCosScore:
    """W = softmax(g(A, B) / temperature), g being two convolutions over both faces' embeddings; score = sum W * S.

    Parameters in the features' precision (fp64 for fp64 features), which half precision is not computed in.
    """
    a, b = _accumulate(a), _accumulate(b)
    embedded = [_head_layer(x, parameters.embed) for x in (a, b)]
    weights = []
    for first, second in (embedded, embedded[::-1])[: 2 if symmetric else 1]:
        hidden = _head_layer(torch.cat((first, second), 1), parameters.first)
        if isinstance(parameters.last, HeadLayer):
            logits = _head_layer(hidden, parameters.last).squeeze(1)
        else:
            logits = F.conv2d(hidden, *parameters.last, padding=1).squeeze(1)
            logits = logits + temperature * (cell_norm(a).clamp_min(eps).log() + cell_norm(b).clamp_min(eps).log())
        weights.append((logits.flatten(1) / temperature).softmax(1).view_as(logits))
    return xcos_score(a, b, torch.stack(weights).mean(0), eps=eps, return_maps=return_maps)


def xcos_score(
    a: Tensor,
    b: Tensor,
    attention: Tensor | str | None = None,
    *,
    logits: bool = False,
    temperature: float = 1.0,
    eps: float = 1e-6,
    radius: int = 0,
    match: str = "best",
    match_temperature: float = 0.1,
    return_maps: bool = False,
) -> Tensor | XCosScore:
    """score = sum over cells of W * S, with W uniform, by norms, given, or the softmax of given logits."""
    if radius == 0:
        similarity = grid_cosine(a, b, eps=eps)
    else:
        matched = grid_match(a, b, radius=radius, match=match, temperature=match_temperature, eps=eps)
        assert isinstance(matched, Tensor)
        similarity = matched
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


def _similarity(features_p: Tensor, features_g: Tensor) -> Tensor:
    """S of all pairs of unit cells, [P, G, cells]."""
    return torch.einsum("pic,gic->pgi", _accumulate(features_p), _accumulate(features_g))


def _learned_weights(
    projection_p: Tensor,
    bias_p: Tensor,
    projection_g: Tensor,
    bias_g: Tensor,
    weight: Tensor,
    slope: Tensor,
    height: int,
    width: int,
    normalize: int,
    temperature: float,
) -> Tensor:
    """W [P, G, cells] of learned attention, from what the templates keep (see csrc/core/xcos_matrix.h)."""
    weights = []
    for order in range(projection_p.shape[1]):
        u, minus_v = _accumulate(projection_p[:, None, order]), _accumulate(projection_g[None, :, order])
        if order == 1:  # the gallery face comes first
            u, minus_v = minus_v, u
        # At a tie -v takes the gradient, as in the kernels and, for the activation at 0, in torch's PReLU.
        hidden = torch.where((u > minus_v) | u.isnan(), u, minus_v)
        maps = hidden.flatten(0, 1).unflatten(2, (height, width))
        with exact_convolutions(maps.device):
            shared = F.conv2d(maps, weight[None], padding=1).view(*hidden.shape[:2], height * width)
        logits = F.prelu(bias_p[:, None, order] + bias_g[None, :, order] + shared, slope)
        if normalize == NORMALIZE["softmax"]:
            weights.append((logits / temperature).softmax(2))
        else:
            shifted = logits - logits.amin(2, keepdim=True)
            total = shifted.sum(2, keepdim=True)
            equal = total == 0  # all cells alike
            weights.append(torch.where(equal, 1.0 / logits.shape[2], shifted / torch.where(equal, 1.0, total)))
    return torch.stack(weights).mean(0)


def learned_scores(
    features_p: Tensor,
    projection_p: Tensor,
    bias_p: Tensor,
    features_g: Tensor,
    projection_g: Tensor,
    bias_g: Tensor,
    *rest: Any,
) -> Tensor:
    """The compiled operator xcos_matrix, by its arguments: [P, G]."""
    weights = _learned_weights(projection_p, bias_p, projection_g, bias_g, *rest)
    return (weights * _similarity(features_p, features_g)).sum(2)


def _all_maps(op: str, probes: Templates, gallery: Templates, attention: Tensor | str) -> tuple[Tensor, Tensor]:
    """S and W of all pairs, [P, G, cells] each."""
    check_sides(op, probes, gallery, attention)
    how = resolve_attention(op, attention, probes, gallery)
    similarity = _similarity(probes.features, gallery.features)
    if how.parameters is not None:
        first, second, p = probes.as_probe(), gallery.as_gallery(), how.parameters
        assert first.projection is not None and second.projection is not None
        assert first.bias is not None and second.bias is not None
        sides = (first.projection, first.bias, second.projection, second.bias)
        options = (*probes.grid, NORMALIZE[p.normalize], p.temperature)
        return similarity, _learned_weights(*sides, p.weight, p.slope, *options)
    if how.weights is not None:
        return similarity, how.weights[:, None].expand_as(similarity)
    product = probes.norms[:, None] * gallery.norms[None]
    total = product.sum(2, keepdim=True)
    nothing = total == 0  # no norm to weigh by
    return similarity, torch.where(nothing, 1.0 / product.shape[2], product / torch.where(nothing, 1.0, total))


def xcos_matrix(probes: Templates, gallery: Templates, attention: Tensor | str = "own") -> Tensor:
    """score[p, g] = sum over cells of W * S for all pairs, [P, G]."""
    similarity, weights = _all_maps("xcos_matrix", probes, gallery, attention)
    return (weights * similarity).sum(2)


def xcos_topk(
    probes: Templates,
    gallery: Templates,
    k: int,
    attention: Tensor | str = "own",
    *,
    min_score: float | None = None,
    exclude: Tensor | None = None,
    first_index: int = 0,
) -> XCosTopk:
    """Each probe's k best gallery faces, best first, the lower index first among equal scores; NaN is no hit."""
    scores = xcos_matrix(probes, gallery, attention)
    indices = torch.arange(first_index, first_index + len(gallery), device=scores.device).expand_as(scores)
    allowed = ~scores.isnan()
    if min_score is not None:
        allowed &= scores >= min_score
    if exclude is not None and exclude.dtype == torch.bool:
        allowed &= ~exclude
    elif exclude is not None:
        unwanted = exclude if exclude.dim() == 2 else exclude[:, None]
        allowed &= ~(indices[:, :, None] == unwanted[:, None, :]).any(2)
    missing = scores.shape[1] - k
    scores = torch.where(allowed, scores, -torch.inf)
    indices = torch.where(allowed, indices, -1)
    if missing < 0:
        scores, indices = F.pad(scores, (0, -missing), value=-torch.inf), F.pad(indices, (0, -missing), value=-1)
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return XCosTopk(values[:, :k], indices.gather(1, order)[:, :k])


def xcos_maps(
    probes: Templates,
    gallery: Templates,
    index_pairs: Tensor,
    attention: Tensor | str = "own",
    *,
    threshold: float | None = None,
) -> XCosMaps:
    """Score, S, W and W * (S - threshold) of the pairs (probe, gallery) in the rows of ``index_pairs``."""
    maps = _all_maps("xcos_maps", probes, gallery, attention)
    p, g = index_pairs.unbind(1)
    similarity, weights = (part[p, g].unflatten(1, probes.grid) for part in maps)
    contribution = None if threshold is None else weights * (similarity - threshold)
    return XCosMaps((weights * similarity).sum((1, 2)), similarity, weights, contribution)
