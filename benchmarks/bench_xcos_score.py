"""Cases of xcos_score: forward, forward and backward, one pair. The ceilings of a GPU are in gpu/roofline.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case
from peers import eager, lean, with_gradients
from torch import Tensor

import xcos_ext
import xcos_ext.ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _inputs(pairs: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (torch.randn(pairs, 32, 7, 7, device=device, dtype=dtype) for _ in range(2))
    return a, b, torch.randn(pairs, 49, device=device).softmax(1).view(pairs, 7, 7)


def _three(*inputs: Tensor, wrap: Callable[..., Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Ours, the published composition, and torch.compile of the leanest form."""
    functions = {"xcos_ext": xcos_ext.xcos_score, "eager": eager, "torch.compile": torch.compile(lean, dynamic=False)}
    return {name: wrap(function, *inputs) for name, function in functions.items()}


def _call(function: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
    return lambda: function(*inputs)


def backward(a: Tensor, b: Tensor, attention: Tensor, grad: Tensor) -> Callable[[], Any]:
    """The backward kernel alone, all gradients."""

    def run() -> Any:
        with torch.no_grad(), xcos_ext.ops._library.below_autograd():
            operator = torch.ops.xcos_ext.xcos_score_backward
            return operator(grad, None, None, a, b, attention, 2, 1.0, 1e-6, True, True, True)

    return run


def cases(device: str, pairs: int | None = None) -> Iterator[Case]:
    """Every case for a device; 4,096 pairs on a CPU and 262,144 on a GPU unless told otherwise."""
    pairs = pairs or (262_144 if device == "cuda" else 4_096)
    note = f"{pairs} pairs of 32x7x7"
    for name, dtype in DTYPES.items():
        a, b, w = _inputs(pairs, dtype, device)
        aims = device == "cpu" and name == "fp32"
        size = 2 * a.numel() * a.element_size()
        yield Case(
            f"xcos_score/forward/{name}",
            _three(a, b, w, wrap=_call) | {"torch.sum": lambda a=a, b=b: (a.sum(), b.sum())},
            {"xcos_ext": size + w.numel() * 4 + pairs * 4, "torch.sum": size},
            [
                ("eager", 20.0, "forward: times eager >= 20"),
                ("bandwidth", 0.7, "forward: share of torch.sum's read bandwidth >= 0.7"),
            ][: 2 * aims],
            device,
            note=note,
        )
        yield Case(
            f"xcos_score/forward+backward/{name}",
            _three(*(t.detach().requires_grad_() for t in (a, b, w)), wrap=with_gradients),
            targets=[
                ("eager", 8.0, "forward + backward: times eager >= 8"),
                ("torch.compile", 2.0, "forward + backward: times torch.compile of the lean form >= 2"),
            ][: 2 * aims],
            device=device,
            note=note,
        )
        ours = backward(a, b, w, torch.randn(pairs, device=device))
        yield Case(
            f"xcos_score/backward/{name}",
            {"xcos_ext": ours, "copy": lambda a=a, b=b: (a.clone(), b.clone())},
            {"xcos_ext": 2 * size + 2 * w.numel() * 4 + pairs * 4, "copy": 2 * size},
            device=device,
            note=note,
        )
        del a, b, w, ours

    a, b, w = _inputs(pairs, torch.float32, device)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (a, b)]
    yield Case("xcos_score/forward/fp32/channels_last", _three(*last, w, wrap=_call), device=device, note=note)
    logits = w.log()
    yield Case(
        "xcos_score/forward/fp32/logits",
        {
            "xcos_ext": lambda: xcos_ext.xcos_score(a, b, logits, logits=True),
            "eager": lambda: eager(a, b, logits.flatten(1).softmax(1).view_as(logits)),
        },
        device=device,
        note=f"{note}, softmax fused in",
    )
    yield Case(
        "xcos_score/forward/fp32/norm",
        {
            "xcos_ext": lambda: xcos_ext.xcos_score(a, b, "norm"),
            "eager": lambda: xcos_ext.reference.xcos_score(a, b, "norm"),
        },
        device=device,
        note=f"{note}, norm attention; the peer is the reference",
    )

    def hundred(function: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                for _ in range(100):
                    function(*inputs)

        return run

    aim = ("seconds", 1e-3, "one pair, no gradient: under 10 us a call (100 calls under 1 ms)")
    yield Case(
        "xcos_score/100 calls of one pair/fp32",
        _three(*_inputs(1, torch.float32, device), wrap=hundred),
        targets=[aim] if device == "cpu" else [],
        device=device,
        note="1 pair of 32x7x7",
    )
