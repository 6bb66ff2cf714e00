"""The headline shapes of every operator, each beside the ceiling it is held against.

    python benchmarks/gpu/roofline.py [--device cuda|cpu] [--budget SECONDS] [--small]

One JSON line a case, in the form of benchmarks/run.py's rows. Memory-bound cases stand beside a copy of the same bytes,
arithmetic ones beside a product of large matrices, in the same rounds; torch.compile is left to run.py. Everything is
made on the device. ``--small`` is for trying the program itself where there is no GPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_xcos_head import head_and_attention
from bench_xcos_score import DTYPES, backward
from bench_xcos_topk import COSINE, MULTIPLY_ADDS, K, generated_faces, trained_attention, training_batch
from harness import Case, describe, machine, measure
from peers import eager
from stages import emit, seconds_left
from torch import Tensor

import xcos_ext

# Of a pair: two faces' embeddings, 32 -> 16 channels, and two convolutions behind, 32 -> 16 -> 1; 3x3 taps inside the
# border.
HEAD_MULTIPLY_ADDS = 19 * 19 * (2 * 32 * 16 + 32 * 16 + 16)
# A case's name, and what makes the rest of it.
Making = tuple[str, Callable[[], dict[str, Any]]]


class Sizes:
    """Problem sizes: the headline ones, or tiny ones to try the program."""

    def __init__(self, small: bool) -> None:
        self.pairs = 512 if small else 262_144
        self.match = 256 if small else 65_536
        self.gallery = 2_000 if small else 1_000_000
        self.gallery_fp32 = 500 if small else 100_000
        self.probes = 8 if small else 256
        self.matrix = 256 if small else 8192
        self.heads = (1, 16) if small else (1, 256, 4096)
        self.batches = (8, 16) if small else (64, 512)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _beside_a_copy(ours: Callable[[], Any], moved: int, size: int, device: str, bound: float, what: str = "") -> Any:
    """A case whose bound is memory: so many bytes moved, beside a copy of ``size`` bytes to as many others."""
    source, target = (torch.empty(size // 4, dtype=torch.int32, device=device) for _ in range(2))
    source.random_()
    return {
        "contenders": {"xcos_ext": ours, "copy": lambda: target.copy_(source)},
        "bytes_moved": {"xcos_ext": moved, "copy": 2 * size},
        "targets": [("bandwidth", bound, f"{what} >= {bound:g}")] if what else [],
    }


def _product(side: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """A product of two square matrices: what the arithmetic units can do."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b


def _scores(device: str, sizes: Sizes) -> Iterator[Making]:
    n = sizes.pairs
    for name, dtype in DTYPES.items():

        def case(forward: bool, dtype: torch.dtype = dtype) -> dict[str, Any]:
            a, b = (torch.randn(n, 32, 7, 7, device=device, dtype=dtype) for _ in range(2))
            w = torch.rand(n, 7, 7, device=device)
            if forward:
                what, moved, bound = "forward: share of copy bandwidth", _bytes(a, b, w) + n * 4, 0.85
                return _beside_a_copy(lambda: xcos_ext.xcos_score(a, b, w), moved, _bytes(a), device, bound, what)
            run, moved = backward(a, b, w, torch.randn(n, device=device)), 2 * _bytes(a, b, w) + n * 4
            return _beside_a_copy(run, moved, _bytes(a), device, 0.8, "backward: share of copy bandwidth")

        yield f"xcos_score/forward/{name}", lambda case=case: case(True)
        yield f"xcos_score/backward/{name}", lambda case=case: case(False)


@functools.lru_cache(maxsize=1)
def _templates(device: str, dtype: str, probes: int, gallery: int) -> tuple[xcos_ext.Templates, xcos_ext.Templates]:
    """Of probes and a gallery, made on the device; those of one type at a time are kept, so that they fit."""
    net = trained_attention(device)
    a, b = generated_faces(probes, gallery, device)
    return net.templates(a, "probe", DTYPES[dtype]), net.templates(b, "gallery", DTYPES[dtype])


def _searches(device: str, sizes: Sizes) -> Iterator[Making]:
    """Those of the same templates together."""
    most, gallery = sizes.probes, sizes.gallery

    def case(dtype: str, probes: int, gallery: int, attention: str | None = None) -> Making:
        def made() -> dict[str, Any]:
            p, g = _templates(device, dtype, most, gallery)
            p, pairs = p[:probes], probes * gallery
            rows, columns = p.features.flatten(1), g.features.flatten(1)
            peer = "matmul" if attention else "cosine"
            contenders = {
                "xcos_ext": lambda: xcos_ext.xcos_topk(p, g, K, attention or "own"),
                peer: lambda: (rows @ columns.T).topk(K),
            }
            if attention is None and probes > 1:  # the kernel that the package is for
                contenders["gemm"] = _product(sizes.matrix, DTYPES[dtype], device)
                units = {"xcos_ext": pairs * MULTIPLY_ADDS, "gemm": sizes.matrix**3, "cosine": pairs * COSINE}
                targets = [("cosine", 0.5, "learned: speed of torch's cosine top-k in the same type >= 0.5")]
                if dtype == "fp16":
                    targets += [("pairs", 1.5e9, "learned: pairs/s >= 1.5e9")]
                    targets += [("pairs", 5e9, "learned: pairs/s >= 5e9")]
                return {"contenders": contenders, "targets": targets, "pairs": pairs, "multiply_adds": units}
            parts = {None: (g.projection, g.bias), "norm": (g.norms,), "uniform": ()}[attention]
            size = _bytes(g.features, *parts)
            what = f"{attention}, {probes} probes" if attention else "learned, 1 probe"
            made = _beside_a_copy(contenders["xcos_ext"], size, size, device, 0.8, f"{what}: share of bandwidth")
            if probes > 4:
                made["targets"] = [("matmul", 0.8, f"{attention}: speed of matmul + top-k >= 0.8")]
            return {**made, "contenders": contenders | made["contenders"], "pairs": pairs}

        name = {None: "learned", "uniform": "fixed"}.get(attention, attention)
        return f"xcos_topk/{name}/{dtype}: {probes} x {gallery}", made

    for dtype in ("fp16", "bf16"):
        _templates.cache_clear()  # before the next ones are made, so that they fit
        yield case(dtype, most, gallery)
        yield case(dtype, 1, gallery)
        if dtype == "fp16":
            for probes, attention in ((4, "uniform"), (most, "uniform"), (most, "norm")):
                yield case(dtype, probes, gallery, attention)
    _templates.cache_clear()
    yield case("fp32", most, sizes.gallery_fp32)


def _graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same on CUDA graphs: what is left is the device's own time."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _heads(device: str, sizes: Sizes) -> Iterator[Making]:
    for count in sizes.heads:

        def case(count: int = count) -> dict[str, Any]:
            head, attention = head_and_attention(device, False)
            a, b = (torch.randn(count, 32, 7, 7, device=device) for _ in range(2))
            contenders = {
                "xcos_ext": lambda: head.score(a, b),
                "eager": lambda: eager(a, b, attention(a, b)),
                "gemm": _product(sizes.matrix, torch.float32, device),
            }
            targets = []
            if device == "cuda":
                ours = contenders["xcos_ext"]
                contenders |= {"xcos_ext": _graphed(ours), "not in a graph": ours}
                targets = [("seconds", 1e-5, "head of one pair in a CUDA graph: at most 10 us")] if count == 1 else []
            units = {"xcos_ext": count * HEAD_MULTIPLY_ADDS, "gemm": sizes.matrix**3}
            return {"contenders": contenders, "targets": targets, "pairs": count, "multiply_adds": units}

        yield f"xcos_head/{count}", case


def _matches(device: str, sizes: Sizes) -> Iterator[Making]:
    for name in ("fp32", "fp16"):

        def case(name: str = name) -> dict[str, Any]:
            a, b = (torch.randn(sizes.match, 32, 7, 7, device=device, dtype=DTYPES[name]) for _ in range(2))
            moved = _bytes(a, b) + sizes.match * 49 * 4
            return _beside_a_copy(lambda: xcos_ext.grid_match(a, b, radius=1), moved, _bytes(a), device, 0)

        yield f"grid_match/best-1/{name}", case


def _training(device: str, sizes: Sizes) -> Iterator[Making]:
    for batch in sizes.batches:

        def case(batch: int = batch) -> dict[str, Any]:
            contenders, pairs = training_batch(device, batch), batch * batch
            if batch > 64:  # its pairs take 543 MB at 64 faces, 64 times that at 512
                del contenders["eager"]
            contenders["gemm"] = _product(sizes.matrix, torch.float32, device)
            # Forward, the same again in the backward pass, and a gradient to both factors of every product.
            units = {"xcos_ext": 4 * pairs * MULTIPLY_ADDS, "gemm": sizes.matrix**3}
            return {"contenders": contenders, "pairs": pairs, "multiply_adds": units}

        yield f"xcos_matrix/forward+backward/fp32: {batch} x {batch}", case


def _go_on_if_the_device_can(device: str, name: str, seconds: float) -> None:
    """After an illegal access every call of this process fails: the cases behind this one get a new one."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception:
        os.environ["XCOS_STAGE_SECONDS"] = f"{seconds:.1f}"
        os.execv(sys.executable, [sys.executable, *sys.argv, "--after", name])


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--after", default="", help="go on after this case")
    options = parser.parse_args()
    begin, bad = time.monotonic(), 0
    torch.manual_seed(0)
    sizes, device = Sizes(options.small), options.device
    if not options.after:
        emit(machine=machine(), small=options.small, status="ok", case="machine")
    waiting = options.after
    for group in (_searches, _scores, _heads, _training, _matches):  # the ones that decide most come first
        for name, make in group(device, sizes):
            if waiting:
                waiting = "" if name == waiting else waiting
                continue
            if options.only not in name:
                continue
            if seconds_left(begin, 600) < 2 * options.budget:
                emit(case=name, status="not run", message="no time was left")
                continue
            try:
                with torch.no_grad():
                    case = Case(name, **make(), device=device, budget=options.budget)
                with torch.set_grad_enabled("backward" in name and "matrix" in name):
                    row = measure(case)
                emit(case=name, status="ok", **row)
                print(describe(row), flush=True)
            except Exception as error:
                bad += 1
                emit(case=name, status="failed", message=f"{type(error).__name__}: {error}")
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                _go_on_if_the_device_can(device, name, seconds_left(begin, 600))
            case = None  # type: ignore[assignment]
            if device == "cuda":
                torch.cuda.empty_cache()
        _templates.cache_clear()  # make room
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
