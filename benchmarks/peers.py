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


def _matched(cosines: Tensor, match: str) -> Tensor:
    """[N, K, H, W] with -2 outside the grid to [N, H, W]."""
    if match == "best":
        return cosines.amax(1)
    outside = cosines == -2
    return (cosines.masked_fill(outside, -torch.inf).div(0.1).softmax(1) * cosines).sum(1)


def matched_by_shifts(a: Tensor, b: Tensor, radius: int, match: str) -> Tensor:
    """Symmetric matching with each neighbour as a shifted view, which torch.compile can fuse: no copy per neighbour."""
    a, b = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
    h, w = a.shape[2:]
    inside = functional.pad(torch.ones(h, w, dtype=torch.bool, device=a.device), (radius,) * 4)

    def one_way(x: Tensor, y: Tensor) -> Tensor:
        y = functional.pad(y, (radius,) * 4)
        cosines = [
            (x * y[:, :, r : r + h, c : c + w]).sum(1).masked_fill(~inside[r : r + h, c : c + w], -2)
            for r in range(2 * radius + 1)
            for c in range(2 * radius + 1)
        ]
        return _matched(torch.stack(cosines, 1), match)

    return (one_way(a, b) + one_way(b, a)) / 2


def matched_by_unfold(a: Tensor, b: Tensor, radius: int, match: str) -> Tensor:
    """Symmetric matching through torch's unfold: [N, C, K, H, W] in memory."""
    a, b = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
    n, channels, h, w = a.shape
    side = 2 * radius + 1
    outside = functional.unfold(torch.ones(1, 1, h, w, device=a.device), side, padding=radius).view(1, -1, h, w) == 0

    def one_way(x: Tensor, y: Tensor) -> Tensor:
        near = functional.unfold(y, side, padding=radius).view(n, channels, side * side, h, w)
        return _matched((x[:, :, None] * near).sum(1).masked_fill(outside, -2), match)

    return (one_way(a, b) + one_way(b, a)) / 2


def with_gradients(function, *tensors):  # type: ignore[no-untyped-def]
    """A call that runs forward and backward to every tensor that requires a gradient."""
    wanted = [t for t in tensors if t.requires_grad]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*tensors).sum(), wanted)

    return run
