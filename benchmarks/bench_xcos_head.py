"""Cases of xcos_head: from grid features to the score with learned attention, beside torch's modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from harness import Case
from peers import eager
from torch import Tensor, nn

import xcos_ext
from xcos_ext.model import XCosAttention, XCosHead

BATCH = 256


def head_and_attention(device: str, symmetric: bool) -> tuple[XCosHead, XCosAttention]:
    """The published attention with batch norms that have seen data."""
    attention = XCosAttention(32, symmetric=symmetric)
    for norm in attention.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None and norm.running_mean is not None:
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
    head = XCosHead(32, 32, attention=attention, projection="none").eval().requires_grad_(False).to(device)
    return head, attention


def _error(head: XCosHead, attention: XCosAttention, a: Tensor, b: Tensor) -> dict[str, float]:
    """Largest errors of score and W against float64, ours and those of torch's modules in float32."""
    exact_head = copy.deepcopy(head).double()
    with torch.enable_grad():  # the composition
        exact = exact_head.score(a.double(), b.double(), return_maps=True)
    ours, weights = head.score(a, b, return_maps=True), attention(a, b)
    return {
        "error of the score": float((ours.score - exact.score).abs().max()),
        "error of W": float((ours.attention - exact.attention).abs().max()),
        "error of W, torch": float((weights - exact.attention).abs().max()),
    }


@torch.no_grad()
def cases(device: str, pairs: int | None = None) -> Iterator[Case]:
    """One pair and 256, ordered and symmetric attention."""
    torch.manual_seed(0)
    for symmetric in (False, True):
        head, attention = head_and_attention(device, symmetric)
        form = "symmetric" if symmetric else "ordered"
        for count in (1, BATCH):
            a, b = (torch.randn(count, 32, 7, 7, device=device) for _ in range(2))

            def ours(head: XCosHead = head, a: Tensor = a, b: Tensor = b) -> Tensor:
                with torch.no_grad():
                    return head.score(a, b)

            def modules(attention: XCosAttention = attention, a: Tensor = a, b: Tensor = b) -> Tensor:
                with torch.no_grad():
                    return eager(a, b, attention(a, b))

            def operators(attention: XCosAttention = attention, a: Tensor = a, b: Tensor = b) -> Tensor:
                with torch.no_grad():
                    return xcos_ext.xcos_score(a, b, attention(a, b))

            bound = 5.0 if count == 1 else 20.0
            cpu_ordered = device == "cpu" and not symmetric
            yield Case(
                f"xcos_head/{form}/{count}",
                {
                    "xcos_ext": ours,
                    "eager": modules,
                    "xcos_score": operators,
                    "torch.compile": torch.compile(modules, dynamic=False),
                },
                device=device,
                note=f"{count} pair{'s' if count > 1 else ''} of 32x7x7, {form}, {torch.get_num_threads()} threads",
                pairs=count,
                targets=[("eager", bound, f"head: times eager >= {bound:.0f}")] if cpu_ordered else [],
                facts=_error(head, attention, a, b),
            )
