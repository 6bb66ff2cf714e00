"""What users run today: the compositions that xcos_ext is measured against."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def eager(a: Tensor, b: Tensor, attention: Tensor) -> Tensor:
    """The composition of the public xCos implementation: normalise, cosine_similarity, multiply, sum."""
    a, b = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
    return (functional.cosine_similarity(a, b, dim=1, eps=1e-6) * attention).sum((1, 2))


def lean(a: Tensor, b: Tensor, attention: Tensor) -> Tensor:
    """The same number with the fewest operations, for torch.compile to fuse; sums in fp32."""
    a, b = a.float() if a.dtype != torch.float64 else a, b.float() if b.dtype != torch.float64 else b
    dot, aa, bb = (a * b).sum(1), (a * a).sum(1), (b * b).sum(1)
    scale = aa.sqrt().clamp_min(1e-6) * bb.sqrt().clamp_min(1e-6)
    return (dot / scale * attention).sum((1, 2))


def eager_matrix(head: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """All pairs [P, G] as the public xCos implementation has them: its attention network on every pair.

    The embedding of a face is shared by its pairs, which is kinder than running it for each.
    """
    p, g = len(a), len(b)
    embedded = head.embed(a).repeat_interleave(g, 0), head.embed(b).repeat(p, 1, 1, 1)
    logits = head.attention(torch.cat(embedded, 1)).squeeze(1)
    weights = logits.flatten(1).softmax(1).view_as(logits)
    return eager(a.repeat_interleave(g, 0), b.repeat(p, 1, 1, 1), weights).view(p, g)


def eager_grid(a: Tensor, b: Tensor) -> Tensor:
    a, b = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
    return functional.cosine_similarity(a, b, dim=1, eps=1e-6)


def with_gradients(function, *tensors):  # type: ignore[no-untyped-def]
    """A call that runs forward and backward to every tensor that requires a gradient."""
    wanted = [t for t in tensors if t.requires_grad]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*tensors).sum(), wanted)

    return run
