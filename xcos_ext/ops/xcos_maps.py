"""xcos_maps: the maps behind chosen entries of the all-pairs matrix, such as the hits of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._kept import kept
from .templates import (
    AttentionParameters,
    Templates,
    check_sides,
    exact_convolutions,
    in_chunks,
    resolve_attention,
    result_dtype,
)

__all__ = ["XCosMaps", "xcos_maps"]

_OP = "xcos_maps"


@kept
class XCosMaps(NamedTuple):
    """Scores of M pairs with what they are made of: ``score = (attention * similarity).sum((1, 2))``.

    Attributes:
        score: [M].
        similarity: S [M, H, W], the cell cosines.
        attention: W [M, H, W], the weights as used.
        contribution: W * (S - threshold) [M, H, W]; where W sums to 1 it adds up to score - threshold. None without
            a threshold.

    >>> from xcos_ext import Templates
    >>> faces = Templates.from_features(torch.ones(1, 8, 7, 7))
    >>> xcos_maps(faces, faces, torch.tensor([[0, 0]])).contribution is None
    True
    """

    score: Tensor
    similarity: Tensor
    attention: Tensor
    contribution: Tensor | None


def _check_pairs(pairs: Tensor, probes: Templates, gallery: Templates) -> Tensor:
    if not isinstance(pairs, Tensor):
        raise TypeError(f"{_OP}: index_pairs: expected a tensor, got {type(pairs).__name__}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise RuntimeError(
            f"{_OP}: index_pairs: expected shape [M, 2] of rows (probe, gallery), "
            f"got {_checks.shape_string(pairs.shape)}"
        )
    if pairs.dtype != torch.int64:
        raise RuntimeError(f"{_OP}: index_pairs: expected dtype int64, got {_checks.dtype_name(pairs.dtype)}")
    if pairs.device.type == "meta" or pairs.layout != torch.strided:
        raise RuntimeError(
            f"{_OP}: index_pairs: expected a dense tensor with values, got {pairs.layout}, {pairs.device}"
        )
    if pairs.shape[0]:
        smallest, largest = (ends.tolist() for ends in pairs.aminmax(dim=0))
        for column, (name, faces) in enumerate((("probe", len(probes)), ("gallery", len(gallery)))):
            if smallest[column] < 0 or largest[column] >= faces:
                wrong = smallest[column] if smallest[column] < 0 else largest[column]
                hint = "; index -1 marks a missing place of a top-k: leave it out" if wrong == -1 else ""
                raise RuntimeError(
                    f"{_OP}: index_pairs: expected {name} indices from 0 to {faces - 1} in column {column}, "
                    f"got {wrong}{hint}"
                )
    return pairs.to(probes.device)


def _normalised(logits: Tensor, parameters: AttentionParameters) -> Tensor:
    """Logits [M, cells] to weights that sum to 1."""
    if parameters.normalize == "softmax":
        return (logits / parameters.temperature).softmax(1)
    shifted = logits - logits.amin(1, keepdim=True)
    total = shifted.sum(1, keepdim=True)
    equal = total == 0
    return torch.where(equal, 1.0 / logits.shape[1], shifted / torch.where(equal, 1.0, total))


def _learned(first: Templates, second: Templates, pairs: Tensor, parameters: AttentionParameters) -> Tensor:
    """W [M, cells] of learned attention."""
    p, g = pairs.unbind(1)
    assert first.projection is not None and second.projection is not None
    assert first.bias is not None and second.bias is not None
    wide = result_dtype(first.dtype)
    one, two = first.projection[p].to(wide), second.projection[g].to(wide)  # [M, orders, hidden, cells]
    if parameters.symmetric:  # -v stands first in the gallery's first order and in the probe's second
        u = torch.stack((one[:, 0], two[:, 1]), 1)
        minus_v = torch.stack((two[:, 0], one[:, 1]), 1)
    else:
        u, minus_v = one, two
    # At a tie -v takes the gradient, as in xcos_matrix.
    hidden = torch.where((u > minus_v) | u.isnan(), u, minus_v).flatten(0, 1).unflatten(2, first.grid)
    shared = F.conv2d(hidden, parameters.weight[None], padding=1).view(len(p), parameters.orders, one.shape[3])
    logits = F.prelu(first.bias[p] + second.bias[g] + shared, parameters.slope)
    return torch.stack([_normalised(order, parameters) for order in logits.unbind(1)]).mean(0)


def _by_norms(probe_norms: Tensor, gallery_norms: Tensor) -> Tensor:
    """W [M, cells] proportional to the product of norms; uniform where nothing has one."""
    product = probe_norms * gallery_norms
    total = product.sum(1, keepdim=True)
    nothing = total == 0
    return torch.where(nothing, 1.0 / product.shape[1], product / torch.where(nothing, 1.0, total))


def xcos_maps(
    probes: Templates,
    gallery: Templates,
    index_pairs: Tensor,
    attention: Tensor | str = "own",
    *,
    threshold: float | None = None,
) -> XCosMaps:
    """S, W and contributions of chosen pairs: the explanation of entries of ``xcos_matrix`` or hits of ``xcos_topk``.

    Without gradients in bounded memory beside the result; otherwise differentiable to both sides' templates, their
    parameters and ``attention``, any number of times.

    Args:
        probes: :class:`xcos_ext.Templates` of the pairs' first faces, P of them.
        gallery: templates of the second faces, G of them; same channels, grid, dtype, device and head.
        index_pairs: [M, 2] int64, rows (probe, gallery). They are looked at, which on a GPU waits for it: not for
            CUDA graphs. The hits of a top-k with all places filled::

                rows = torch.arange(len(probes), device=hits.indices.device).repeat_interleave(k)
                torch.stack((rows, hits.indices.flatten()), 1)

        attention: ``"own"`` (the templates'), ``"uniform"``, ``"norm"``, or weights [H, W] or [P, H, W], used as
            they are.
        threshold: t of the contributions W * (S - t); None: none.

    Returns:
        :class:`XCosMaps`, float32 (float64 for float64 templates).

    Raises:
        TypeError: an argument of another type.
        RuntimeError: templates that do not fit each other, an index outside, or a wrong shape, dtype, device or value.

    >>> from xcos_ext import Templates
    >>> faces = Templates.from_features(torch.ones(2, 8, 7, 7))
    >>> maps = xcos_maps(faces, faces, torch.tensor([[0, 1]]), threshold=0.25)
    >>> round(maps.contribution.sum().item(), 4), tuple(maps.similarity.shape)
    (0.75, (1, 7, 7))
    """
    check_sides(_OP, probes, gallery, attention)
    how = resolve_attention(_OP, attention, probes, gallery)
    pairs = _check_pairs(index_pairs, probes, gallery)
    if threshold is not None:
        threshold = _checks.checked_number(_OP, "threshold", threshold)
        if not math.isfinite(threshold):
            raise RuntimeError(f"{_OP}: threshold: expected a finite number or None, got {threshold:g}")
    parameters, weights = how.parameters, how.weights
    first, second = (probes.as_probe(), gallery.as_gallery()) if parameters is not None else (probes, gallery)
    wide = result_dtype(probes.dtype)

    def compute(part: Tensor) -> Sequence[Tensor]:
        p, g = part.unbind(1)
        similarity = (first.features[p].to(wide) * second.features[g].to(wide)).sum(2)
        if parameters is not None:
            attended = _learned(first, second, part, parameters)
        elif weights is not None:
            attended = weights.expand_as(similarity) if weights.shape[0] == 1 else weights[p]
        else:
            attended = _by_norms(first.norms[p], second.norms[g])
        parts = [(attended * similarity).sum(1), similarity, attended]
        if threshold is not None:
            parts.append(attended * (similarity - threshold))
        return parts

    tensors = [*first.tensors, *second.tensors]
    if parameters is not None:
        tensors += [parameters.weight, parameters.slope]
    with exact_convolutions(probes.device):
        parts = in_chunks(compute, pairs, *tensors, weights)
    score, *maps = parts
    maps = [part.unflatten(1, probes.grid) for part in maps]
    return XCosMaps(score, maps[0], maps[1], maps[2] if threshold is not None else None)
