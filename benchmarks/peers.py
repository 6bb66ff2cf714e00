"""What users run today: the compositions that xcos_ext is measured against."""

from __future__ import annotations

import torch
from torch import Tensor
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


def eager_grid(a: Tensor, b: Tensor) -> Tensor:
    a, b = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
    return functional.cosine_similarity(a, b, dim=1, eps=1e-6)


def with_gradients(function, *tensors):  # type: ignore[no-untyped-def]
    """A call that runs forward and backward to every tensor that requires a gradient."""
    wanted = [t for t in tensors if t.requires_grad]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*tensors).sum(), wanted)

    return run
