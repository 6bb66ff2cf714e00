"""The headline shapes of every operator, each beside the ceiling it is held against.

    python benchmarks/gpu/roofline.py [--device cuda|cpu] [--budget SECONDS] [--small]

One JSON line a case, in the form of benchmarks/run.py's rows. Memory-bound cases stand beside a copy of the same bytes,
arithmetic ones beside a product of large matrices, in the same rounds; torch.compile is left to run.py. Everything is
made on the device. ``--small`` is for trying the program itself where there is no GPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_xcos_head import head_and_attention
from bench_xcos_topk import COSINE, MULTIPLY_ADDS, K, generated_faces, trained_attention
from harness import Case, describe, machine, measure
from peers import eager, eager_matrix, with_gradients
from stages import emit, seconds_left
from torch import Tensor

import xcos_ext
import xcos_ext.ops

# Of a pair: two faces' embeddings, 32 -> 16 channels, and two convolutions behind, 32 -> 16 -> 1; 3x3 taps inside the
# border.
HEAD_MULTIPLY_ADDS = 19 * 19 * (2 * 32 * 16 + 32 * 16 + 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Making = tuple[str, Callable[[], Case]]


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


def _copy(size: int, device: str) -> Callable[[], Any]:
    """Copies so many bytes to so many others."""
    source, target = (torch.empty(size // 4, dtype=torch.int32, device=device) for _ in range(2))
    source.random_()
    return lambda: target.copy_(source)


def _scores(device: str, sizes: Sizes) -> Iterator[Making]:
    for name, dtype in DTYPES.items():

        def inputs(dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor, Tensor]:
            a, b = (torch.randn(sizes.pairs, 32, 7, 7, device=device, dtype=dtype) for _ in range(2))
            return a, b, torch.rand(sizes.pairs, 7, 7, device=device)

        def forward(name: str = name, inputs: Callable[[], tuple[Tensor, Tensor, Tensor]] = inputs) -> Case:
            a, b, w = inputs()
            moved = _bytes(a, b, w) + sizes.pairs * 4
            return Case(
                f"xcos_score/forward/{name}",
                {"xcos_ext": lambda: xcos_ext.xcos_score(a, b, w), "copy": _copy(_bytes(a), device)},
                {"xcos_ext": moved, "copy": 2 * _bytes(a)},
                [("bandwidth", 0.85, "forward: share of copy bandwidth >= 0.85")],
            )

        def backward(name: str = name, inputs: Callable[[], tuple[Tensor, Tensor, Tensor]] = inputs) -> Case:
            a, b, w = inputs()
            grad = torch.randn(sizes.pairs, device=device)
            operator = torch.ops.xcos_ext.xcos_score_backward

            def run() -> Any:
                with xcos_ext.ops._library.below_autograd():
                    return operator(grad, None, None, a, b, w, 2, 1.0, 1e-6, True, True, True)

            return Case(
                f"xcos_score/backward/{name}",
                {"xcos_ext": run, "copy": _copy(_bytes(a), device)},
                {"xcos_ext": 2 * _bytes(a, b, w) + sizes.pairs * 4, "copy": 2 * _bytes(a)},
                [("bandwidth", 0.8, "backward: share of copy bandwidth >= 0.8")],
            )

        yield f"xcos_score/forward/{name}", forward
        yield f"xcos_score/backward/{name}", backward


def _product(side: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """A product of two square matrices: what the arithmetic units can do."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b


class Searches:
    """Probes against a gallery; templates of one type at a time are kept."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self._kept: tuple[Any, tuple[xcos_ext.Templates, xcos_ext.Templates]] | None = None

    def templates(self, dtype: str, gallery: int) -> tuple[xcos_ext.Templates, xcos_ext.Templates]:
        """Made on the device, a hundred thousand faces at a time, so that they and their features fit."""
        if self._kept is None or self._kept[0] != (dtype, gallery):
            self._kept = None
            net = trained_attention(self.device)
            a, b = generated_faces(self.sizes.probes, gallery, self.device)
            made = net.templates(a, "probe", DTYPES[dtype]), net.templates(b, "gallery", DTYPES[dtype])
            self._kept = (dtype, gallery), made
        return self._kept[1]

    def forget(self) -> None:
        """Make room."""
        self._kept = None

    def learned(self, dtype: str, probes: int, gallery: int) -> Case:
        """The kernel that the package is for; with one probe the gallery's bytes are the bound."""
        p, g = self.templates(dtype, gallery)
        p = p[:probes]
        pairs = probes * gallery
        rows, columns = p.features.flatten(1), g.features.flatten(1)
        contenders: dict[str, Callable[[], Any]] = {
            "xcos_ext": lambda: xcos_ext.xcos_topk(p, g, K),
            "cosine": lambda: (rows @ columns.T).topk(K),
        }
        if probes > 1:
            side = self.sizes.matrix
            contenders["gemm"] = _product(side, DTYPES[dtype], self.device)
            units = {"xcos_ext": pairs * MULTIPLY_ADDS, "gemm": side**3, "cosine": pairs * COSINE}
            moved = {}
        else:
            size = _bytes(g.features, g.projection, g.bias)
            contenders["copy"] = _copy(size, self.device)
            moved, units = {"xcos_ext": size, "copy": 2 * size}, {}
        targets = [("cosine", 0.5, "learned: speed of torch's cosine top-k in the same type >= 0.5")]
        if dtype == "fp16" and probes > 1:
            targets += [("pairs", 1.5e9, "learned: pairs/s >= 1.5e9"), ("pairs", 5e9, "learned: pairs/s >= 5e9")]
        if probes == 1:
            targets = [("bandwidth", 0.8, "learned, 1 probe: share of bandwidth >= 0.8")]
        return Case(
            f"xcos_topk/learned/{dtype}: {probes} x {gallery}",
            contenders,
            moved,
            targets,
            pairs=pairs,
            multiply_adds=units,
        )

    def fixed(self, dtype: str, probes: int, gallery: int, attention: str) -> Case:
        """One map for all pairs, or norms: products of matrices."""
        p, g = self.templates(dtype, gallery)
        p = p[:probes]
        rows, columns = p.features.flatten(1), g.features.flatten(1)
        size = _bytes(g.features, g.norms if attention == "norm" else None)
        contenders: dict[str, Callable[[], Any]] = {
            "xcos_ext": lambda: xcos_ext.xcos_topk(p, g, K, attention),
            "matmul": lambda: (rows @ columns.T).topk(K),
            "copy": _copy(size, self.device),
        }
        moved = {"xcos_ext": size, "copy": 2 * size}
        targets = [("matmul", 0.8, f"{attention}: speed of matmul + top-k >= 0.8")]
        if probes <= 4:
            targets = [("bandwidth", 0.8, f"{attention}, {probes} probes: share of bandwidth >= 0.8")]
        name = "fixed" if attention == "uniform" else attention
        return Case(
            f"xcos_topk/{name}/{dtype}: {probes} x {gallery}", contenders, moved, targets, pairs=probes * gallery
        )

    def cases(self) -> Iterator[Making]:
        """All of them, those of the same templates together."""
        s = self.sizes
        for dtype in ("fp16", "bf16"):
            for probes in (s.probes, 1):
                yield (
                    f"xcos_topk/learned/{dtype}: {probes} x {s.gallery}",
                    lambda d=dtype, p=probes: self.learned(d, p, s.gallery),
                )
            if dtype == "fp16":
                for probes, attention in ((4, "uniform"), (s.probes, "uniform"), (s.probes, "norm")):
                    name = "fixed" if attention == "uniform" else attention
                    yield (
                        f"xcos_topk/{name}/{dtype}: {probes} x {s.gallery}",
                        lambda d=dtype, p=probes, a=attention: self.fixed(d, p, s.gallery, a),
                    )
        yield (
            f"xcos_topk/learned/fp32: {s.probes} x {s.gallery_fp32}",
            lambda: self.learned("fp32", s.probes, s.gallery_fp32),
        )
        self.forget()


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

        def case(count: int = count) -> Case:
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
            return Case(f"xcos_head/{count}", contenders, {}, targets, pairs=count, multiply_adds=units)

        yield f"xcos_head/{count}", case


def _matches(device: str, sizes: Sizes) -> Iterator[Making]:
    for name in ("fp32", "fp16"):

        def case(name: str = name) -> Case:
            a, b = (torch.randn(sizes.match, 32, 7, 7, device=device, dtype=DTYPES[name]) for _ in range(2))
            return Case(
                f"grid_match/best-1/{name}",
                {"xcos_ext": lambda: xcos_ext.grid_match(a, b, radius=1), "copy": _copy(_bytes(a), device)},
                {"xcos_ext": _bytes(a, b) + sizes.match * 49 * 4, "copy": 2 * _bytes(a)},
            )

        yield f"grid_match/best-1/{name}", case


def _training(device: str, sizes: Sizes) -> Iterator[Making]:
    for batch in sizes.batches:

        def case(batch: int = batch) -> Case:
            attention = trained_attention(device).requires_grad_(True)
            features = torch.randn(batch, 32, 7, 7, device=device, requires_grad=True)

            def ours(f: Tensor) -> Tensor:
                templates = attention.templates(f, "both")
                return xcos_ext.xcos_matrix(templates, templates)

            contenders = {
                "xcos_ext": with_gradients(ours, features),
                "gemm": _product(sizes.matrix, torch.float32, device),
            }
            if batch <= 64:  # its pairs take 543 MB at 64 faces, 64 times that at 512
                contenders["eager"] = with_gradients(lambda f: eager_matrix(attention, f, f), features)
            name, pairs = f"xcos_matrix/forward+backward/fp32: {batch} x {batch}", batch * batch
            # Forward, the same again in the backward pass, and a gradient to both factors of every product.
            units = {"xcos_ext": 4 * pairs * MULTIPLY_ADDS, "gemm": sizes.matrix**3}
            return Case(name, contenders, pairs=pairs, multiply_adds=units)

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
    searches = Searches(device, sizes)
    # The ones that decide most come first.
    groups = (
        searches.cases(),
        _scores(device, sizes),
        _heads(device, sizes),
        _training(device, sizes),
        _matches(device, sizes),
    )
    for group in groups:
        for name, make in group:
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
                    case = make()
                case.device, case.budget = device, options.budget
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
        searches.forget()
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
