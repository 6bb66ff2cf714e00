"""Cases of xcos_topk and xcos_matrix: a search in a large gallery, and all pairs of a training batch.

64 probes against 100,000 gallery faces (on a GPU 256 against 1,000,000), 32x7x7, hidden 16, the ten best. Faces are
random, with people among them: a tenth of the gallery looks like some probe.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Case
from peers import eager_matrix, with_gradients
from torch import Tensor

import xcos_ext
from xcos_ext.model import XCosAttention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPE = (32, 7, 7)
K = 10

# Of a pair, all terms inside the border: the second convolution and the cosines.
MULTIPLY_ADDS = 16 * 19 * 19 + 32 * 49
COSINE = 32 * 49


def trained_attention(device: str, **options: Any) -> XCosAttention:
    """Seeded weights; batch norms as after training, so that attention differs from cell to cell and pair to pair."""
    torch.manual_seed(11)
    attention = XCosAttention(SHAPE[0], 16, **({"symmetric": False} | options)).eval()
    with torch.no_grad():
        a, b = (torch.randn(256, *SHAPE) for _ in range(2))
        attention.train()
        for _ in range(20):
            attention(a, b)  # running statistics of this kind of input
        attention.eval()
    return attention.to(device)


def generated_faces(probes: int, gallery: int, device: str) -> tuple[Tensor, Tensor]:
    """Made where they are wanted: a million faces made by a CPU leave a GPU idle for half a minute."""
    generator = torch.Generator(device).manual_seed(7)
    a = torch.randn(probes, *SHAPE, device=device, generator=generator)
    b = torch.randn(gallery, *SHAPE, device=device, generator=generator)
    alike = torch.arange(0, gallery, 10, device=device)
    likeness = torch.rand(len(alike), 1, 1, 1, device=device, generator=generator) * 1.5
    b[alike] += likeness * a[torch.arange(len(alike), device=device) % probes]
    return a, b


def _accuracy(attention: XCosAttention, a: Tensor, b: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Scores of stored templates against the network itself in fp64, on a part of the pairs."""
    p, g = 32, 1000
    a, b = a[:p], b[:g]
    exact = XCosAttention(**attention.config()).to(a.device).double().eval()  # type: ignore[arg-type]
    exact.load_state_dict({name: t.double() for name, t in attention.state_dict().items()})
    rows = [eager_matrix(exact, a[i : i + 1].double(), b.double()) for i in range(p)]
    truth = torch.cat(rows)
    probes, gallery = attention.templates(a, "probe", dtype), attention.templates(b, "gallery", dtype)
    error = (xcos_ext.xcos_matrix(probes, gallery).double() - truth).abs()
    mine = xcos_ext.xcos_topk(probes, gallery, K).indices
    best = truth.topk(K).indices
    agreement = (mine.unsqueeze(2) == best.unsqueeze(1)).any(2).double().mean()
    return {
        "largest error": error.max().item(),
        "mean error": error.mean().item(),
        f"top-{K} agreement": agreement.item(),
    }


def _memory(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Megabytes that calls need at their peak beyond what was there before, by name; nothing where nobody says."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    found = {}
    with contextlib.suppress(OSError, StopIteration, AttributeError):
        for name, function in calls.items() if device == "cpu" else ():
            function()  # what the first call alone needs is not the call's
            ctypes.CDLL(None).malloc_trim(0)  # or memory kept from the first call would serve the second
            Path("/proc/self/clear_refs").write_text("5")  # peak := now
            before = status("VmRSS")
            function()
            found[name] = (status("VmHWM") - before) / 1e6
    return found


def _one_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return run


def _faiss(gallery: Tensor, probes: Tensor) -> dict[str, Callable[[], Any]]:
    """IndexFlatIP, where faiss is installed."""
    try:
        import faiss
    except ImportError:
        return {}
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery.numpy())
    queries = probes.numpy()

    def run() -> Any:
        faiss.omp_set_num_threads(torch.get_num_threads())
        return index.search(queries, K)

    return {"faiss": run}


@torch.no_grad()
def _search(device: str, probes: int, gallery: int) -> Iterator[Case]:
    pairs, on_cpu = probes * gallery, device == "cpu"
    note = f"{probes} probes x {gallery} faces, top {K}"
    a, b = generated_faces(probes, gallery, device)
    attention = trained_attention(device)
    p, g = attention.templates(a, "probe"), attention.templates(b, "gallery")
    a1, b1 = p.features.flatten(1), g.features.flatten(1)
    part = min(128, gallery)
    square = torch.randn(2048, COSINE, device=device), torch.randn(COSINE, 4096, device=device)

    def case(name: str, contenders: dict[str, Callable[[], Any]], **options: Any) -> Case:
        return Case(f"xcos_topk/{name}", contenders, device=device, **{"note": note, "pairs": pairs, **options})

    for name, dtype in DTYPES.items():
        stored = p.to(dtype), g.to(dtype)
        # torch multiplies halves on a CPU that lacks them slower than it multiplies floats: no measure of the machine.
        matrices = tuple(t.to(torch.float32 if dtype == torch.float16 and on_cpu else dtype) for t in square)
        learned = {
            "xcos_ext": lambda s=stored: xcos_ext.xcos_topk(*s, K),
            "eager": lambda: eager_matrix(attention, a[:16], b[:part]),
            "cosine fp32": lambda: (a1 @ b1.T).topk(K),
            "gemm": lambda m=matrices: m[0] @ m[1],
        }
        if on_cpu and name == "fp32":
            learned["one thread"] = _one_thread(learned["xcos_ext"])
        facts = _accuracy(attention, a, b, dtype) | _memory({"extra MB": learned["xcos_ext"]}, device)
        factor = {"fp32": 200.0, "bf16": 350.0, "fp16": 350.0}[name]
        targets = [("extra MB", 64.0, "learned: extra memory under 64 MB")] if "extra MB" in facts else []
        targets += [
            ("eager", factor, f"learned: times eager >= {factor:.0f}"),
            ("cosine fp32", 0.5, "learned: speed of torch's fp32 cosine top-k >= 0.5"),
        ]
        yield case(
            f"learned/{name}",
            learned,
            targets=targets if on_cpu else [],
            scale={"eager": pairs / (16 * part)},
            multiply_adds={
                "xcos_ext": pairs * MULTIPLY_ADDS,
                "gemm": square[0].numel() * square[1].shape[1],
                "cosine fp32": pairs * COSINE,
            },
            facts=facts,
        )
        del learned

        plain = a1.to(dtype), b1.to(dtype)
        fixed = {
            "xcos_ext": lambda s=stored: xcos_ext.xcos_topk(*s, K, "uniform"),
            "matmul": lambda m=plain: (m[0] @ m[1].T).topk(K),
        }
        targets = [("matmul", 1 / 1.15, "fixed map: speed of matmul + top-k >= 0.87")] if on_cpu else []
        faiss = _faiss(b1, a1) if on_cpu and name == "fp32" else {}
        targets += [("faiss", 1.0, "fixed map: faster than faiss")] if faiss else []
        yield case(f"fixed/{name}", fixed | faiss, targets=targets)
        del fixed, plain, faiss

        single = {
            "xcos_ext": lambda o=stored[0][:1], s=stored[1]: xcos_ext.xcos_topk(o, s, K),
            "cosine fp32": lambda: (a1[:1] @ b1.T).topk(K),
        }
        one = f"1 probe x {gallery} faces, top {K}"
        yield case(f"learned, 1 probe/{name}", single, note=one, pairs=gallery)
        del single, stored

    norm = {"xcos_ext": lambda: xcos_ext.xcos_topk(p, g, K, "norm"), "matmul": lambda: (a1 @ b1.T).topk(K)}
    yield case("norm/fp32", norm)
    both = trained_attention(device, symmetric=True)
    ps, gs = both.templates(a, "probe"), both.templates(b, "gallery")
    symmetric = {"xcos_ext": lambda: xcos_ext.xcos_topk(ps, gs, K), "one order": lambda: xcos_ext.xcos_topk(p, g, K)}
    bound = ("one order", 0.5, "symmetric: under twice the cost of one order (speed > 0.5)")
    yield case("symmetric/fp32", symmetric, targets=[bound])


def training_batch(device: str, batch: int) -> dict[str, Callable[[], Any]]:
    """All pairs of a batch, forward and backward to the features: ours and the published composition."""
    attention = trained_attention(device).requires_grad_(True)
    features = torch.randn(batch, *SHAPE, device=device, requires_grad=True)

    def ours(f: Tensor) -> Tensor:
        templates = attention.templates(f, "both")
        return xcos_ext.xcos_matrix(templates, templates)

    return {
        "xcos_ext": with_gradients(ours, features),
        "eager": with_gradients(lambda f: eager_matrix(attention, f, f), features),
    }


def _training(device: str, batch: int) -> Case:
    made = training_batch(device, batch)
    facts = _memory({"extra MB": made["xcos_ext"], "extra MB of eager": made["eager"]}, device)
    return Case(
        "xcos_matrix/forward+backward/fp32", made, device=device, note=f"all pairs of {batch} faces, to the features",
        pairs=batch * batch, facts=facts,
    )  # fmt: skip


def cases(device: str, pairs: int | None = None) -> Iterator[Case]:
    """Every case for a device; ``pairs`` bounds the search's size."""
    gpu = device == "cuda"
    probes, gallery = (256, 1_000_000) if gpu else (64, 100_000)
    if pairs is not None:
        probes, gallery = min(probes, 16), max(16, pairs // 16)
    yield from _search(device, probes, gallery)
    yield _training(device, 64 if pairs is None else 8)
