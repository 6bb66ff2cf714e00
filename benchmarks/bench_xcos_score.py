"""Cases of xcos_score: forward, forward and backward, one pair."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case
from peers import eager, lean, with_gradients

import xcos_ext
import xcos_ext.ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _inputs(pairs: int, dtype: torch.dtype, device: str, layout: str = "contiguous") -> tuple[torch.Tensor, ...]:
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    a, b = (torch.randn(pairs, 32, 7, 7, device=device, dtype=dtype).contiguous(memory_format=memory) for _ in range(2))
    attention = torch.randn(pairs, 49, device=device).softmax(1).view(pairs, 7, 7)
    return a, b, attention


def cases(device: str, pairs: int | None = None) -> Iterator[Case]:
    """Every case for a device; 4,096 pairs on a CPU and 262,144 on a GPU unless told otherwise."""
    gpu = device == "cuda"
    pairs = pairs or (262_144 if gpu else 4_096)
    for name, dtype in DTYPES.items():
        a, b, attention = _inputs(pairs, dtype, device)
        size = a.numel() * a.element_size()
        read = 2 * size + attention.numel() * 4 + pairs * 4
        compiled = torch.compile(lean, dynamic=False)
        contenders = {
            "xcos_ext": lambda a=a, b=b, w=attention: xcos_ext.xcos_score(a, b, w),
            "eager": lambda a=a, b=b, w=attention: eager(a, b, w),
            "torch.compile": lambda a=a, b=b, w=attention, f=compiled: f(a, b, w),
        }
        peer, targets = (
            ("copy", [("bandwidth", 0.85, "forward: share of copy bandwidth >= 0.85")]) if gpu else ("torch.sum", [])
        )
        if gpu:
            target = torch.empty_like(a)
            contenders[peer] = lambda a=a, t=target: t.copy_(a)
        else:
            contenders[peer] = lambda a=a, b=b: (a.sum(), b.sum())
            if name == "fp32":
                targets = [
                    ("eager", 20.0, "forward: times eager >= 20"),
                    ("bandwidth", 0.7, "forward: share of torch.sum's read bandwidth >= 0.7"),
                ]
        yield Case(
            f"xcos_score/forward/{name}",
            contenders,
            {"xcos_ext": read, peer: 2 * size},
            targets,
            device,
            note=f"{pairs} pairs of 32x7x7",
        )
        del contenders

        leaf_a, leaf_b, leaf_w = (t.detach().requires_grad_() for t in (a, b, attention))
        both = {
            "xcos_ext": with_gradients(xcos_ext.xcos_score, leaf_a, leaf_b, leaf_w),
            "eager": with_gradients(eager, leaf_a, leaf_b, leaf_w),
            "torch.compile": with_gradients(torch.compile(lean, dynamic=False), leaf_a, leaf_b, leaf_w),
        }
        targets = []
        if name == "fp32" and not gpu:
            targets = [
                ("eager", 8.0, "forward + backward: times eager >= 8"),
                ("torch.compile", 2.0, "forward + backward: times torch.compile of the lean form >= 2"),
            ]
        yield Case(f"xcos_score/forward+backward/{name}", both, {}, targets, device, note=f"{pairs} pairs of 32x7x7")
        del both, leaf_a, leaf_b, leaf_w

        grad = torch.randn(pairs, device=device)
        out = torch.empty_like(a) if gpu else None
        backward = torch.ops.xcos_ext.xcos_score_backward
        arguments = (grad, None, None, a, b, attention, 2, 1.0, 1e-6, True, True, True)
        moved = 4 * size + 2 * attention.numel() * 4 + pairs * 4

        def run(arguments=arguments, backward=backward):  # type: ignore[no-untyped-def]
            with torch.no_grad(), xcos_ext.ops._library.below_autograd():
                return backward(*arguments)

        copies = {"copy": (lambda a=a, t=out: t.copy_(a))} if gpu else {"copy": lambda a=a, b=b: (a.clone(), b.clone())}
        copied = 2 * size if gpu else 4 * size
        targets = [("bandwidth", 0.8, "backward: share of copy bandwidth >= 0.8")] if gpu else []
        yield Case(
            f"xcos_score/backward/{name}",
            {"xcos_ext": run, **copies},
            {"xcos_ext": moved, "copy": copied},
            targets,
            device,
            note=f"{pairs} pairs of 32x7x7",
        )
        del copies, out, run, a, b, attention

    for layout in ("channels_last",):
        a, b, attention = _inputs(pairs, torch.float32, device, layout)
        fused = torch.compile(lean, dynamic=False)
        contenders = {
            "xcos_ext": lambda a=a, b=b, w=attention: xcos_ext.xcos_score(a, b, w),
            "eager": lambda a=a, b=b, w=attention: eager(a, b, w),
            "torch.compile": lambda a=a, b=b, w=attention, f=fused: f(a, b, w),
        }
        yield Case(f"xcos_score/forward/fp32/{layout}", contenders, {}, [], device, note=f"{pairs} pairs of 32x7x7")

    a, b, attention = _inputs(pairs, torch.float32, device)
    logits = attention.log()
    yield Case(
        "xcos_score/forward/fp32/logits",
        {
            "xcos_ext": lambda: xcos_ext.xcos_score(a, b, logits, logits=True),
            "eager": lambda: eager(a, b, logits.flatten(1).softmax(1).view_as(logits)),
        },
        {}, [], device, note=f"{pairs} pairs of 32x7x7, softmax fused in",
    )  # fmt: skip
    yield Case(
        "xcos_score/forward/fp32/norm",
        {
            "xcos_ext": lambda: xcos_ext.xcos_score(a, b, "norm"),
            "eager": lambda: xcos_ext.reference.xcos_score(a, b, "norm"),
        },
        {}, [], device, note=f"{pairs} pairs of 32x7x7, norm attention; the peer is the reference",
    )  # fmt: skip

    one_a, one_b, one_w = _inputs(1, torch.float32, device)

    def without_gradient(function):  # type: ignore[no-untyped-def]
        def run():  # type: ignore[no-untyped-def]
            with torch.no_grad():
                for _ in range(100):
                    function(one_a, one_b, one_w)

        return run

    yield Case(
        "xcos_score/100 calls of one pair/fp32",
        {
            "xcos_ext": without_gradient(xcos_ext.xcos_score),
            "eager": without_gradient(eager),
            "torch.compile": without_gradient(torch.compile(lean, dynamic=False)),
        },
        {}, [] if gpu else [("seconds", 1e-3, "one pair, no gradient: under 10 us a call (100 calls under 1 ms)")],
        device, note="1 pair of 32x7x7",
    )  # fmt: skip
