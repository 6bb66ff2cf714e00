"""Every operator in every type, against float64 on the same values, and in the ways that only a GPU has.

    python benchmarks/gpu/smoke.py [--device cuda|cpu]

One JSON line a case: (operator, type) against the reference, forward and backward; on a side stream while the default
one is held up; as the first launch of a fresh process inside a CUDA graph; with synchronisation forbidden; from two
threads that launch problems of different sizes at once. On a CPU only the first and the last have a meaning.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests" / "support"))

import torch
from closeness import BACKWARD_RTOL, FORWARD_ATOL
from samples import feature_maps
from stages import emit
from template_samples import PAIRS_ATOL, attention, leaves, sides
from torch import Tensor

import xcos_ext
from xcos_ext import reference

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
Results = list[Tensor]


@dataclass
class Problem:
    """A call of an operator with its inputs in place.

    Attributes:
        run: the call; tensors that hold everything it computed.
        exact: the same in float64 on the CPU.
        bound: largest error of the first result, absolute; of all, where ``rtol`` is None.
        rtol: largest error of the others, which are gradients, relative to the largest entry of each.
    """

    run: Callable[[], Results]
    exact: Callable[[], Results]
    bound: float
    rtol: float | None = None

    def allowed(self, index: int, expected: Tensor) -> float:
        """Of a result."""
        if self.rtol is None or index == 0:
            return self.bound
        return self.rtol * max(expected.abs().max().item(), 1e-3)


def _close(problem: Problem, results: Results) -> str | None:
    """What is wrong with results, if anything."""
    exact = problem.exact()
    if len(exact) != len(results):
        return f"{len(results)} results, expected {len(exact)}"
    for index, (got, expected) in enumerate(zip(results, exact, strict=True)):
        got = got.detach().double().cpu()
        if got.shape != expected.shape:
            return f"result {index}: shape {list(got.shape)}, expected {list(expected.shape)}"
        error = (got - expected).abs().max().item() if got.numel() else 0.0
        if not error <= (allowed := problem.allowed(index, expected)):
            return f"result {index}: largest error {error:.3g}, allowed {allowed:.3g}"
    return None


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().cpu() for t in tensors]


Operator = Callable[..., Tensor]  # of xcos_ext or its reference, and inputs


def _pairs(operator: Operator, inputs: list[Tensor], dtype: torch.dtype) -> Problem:
    """An operator on pairs: its result, and the gradients of a weighted sum of it."""
    weights = torch.linspace(-1, 1, 64, dtype=torch.float64).to(inputs[0].device)  # before anything is launched

    def with_gradients(module: Any, tensors: list[Tensor]) -> Results:
        own = [t.detach().requires_grad_() for t in tensors]
        result = operator(module, *own)
        w = weights.to(result.device, result.dtype)[: len(result)].view(-1, *(1,) * (result.dim() - 1))
        return [result.detach(), *torch.autograd.grad((result * w).sum(), own)]

    return Problem(
        lambda: with_gradients(xcos_ext, inputs), lambda: with_gradients(reference, _wide(*inputs)),
        FORWARD_ATOL[dtype], BACKWARD_RTOL[dtype],
    )  # fmt: skip


def problems(device: str, dtype: torch.dtype, size: int = 1) -> Iterator[tuple[str, Problem]]:
    """All operators on inputs of a type; size: how much larger than the smallest."""
    torch.manual_seed(3 + size)
    n, half = 5 * size, dtype in (torch.float16, torch.bfloat16)
    for layout in ("contiguous", "channels_last"):
        maps = list(feature_maps((n, 32, 7, 7), dtype, layout, device))
        logits = torch.randn(n, 7, 7, dtype=dtype).to(device)  # a capture that failed holds on to the GPU's generator
        name = "" if layout == "contiguous" else ", channels_last"
        yield f"grid_cosine{name}", _pairs(lambda m, x, y: m.grid_cosine(x, y), maps, dtype)
        yield f"xcos_score norm{name}", _pairs(lambda m, x, y: m.xcos_score(x, y, "norm"), maps, dtype)
        with_logits = [*maps, logits]
        yield (
            f"xcos_score logits{name}",
            _pairs(lambda m, x, y, z: m.xcos_score(x, y, z, logits=True), with_logits, dtype),
        )
    maps = list(feature_maps((n, 32, 7, 7), dtype, "contiguous", device))
    for match in ("best", "soft"):
        yield f"grid_match {match}", _pairs(lambda m, x, y, k=match: m.grid_match(x, y, radius=1, match=k), maps, dtype)
    for kind in ("softmax", "symmetric") if dtype != torch.float64 else ():
        own = attention(kind).float().to(device)
        exact_net = attention(kind)
        exact_net.load_state_dict({k: v.double().cpu() for k, v in own.state_dict().items()})
        parameters = own.head_parameters()
        wide = exact_net.eval().requires_grad_(False).head_parameters()
        options = {"temperature": own.temperature, "symmetric": kind == "symmetric"}

        def head(parameters: Any = parameters, maps: Any = maps, options: Any = options) -> Results:
            with torch.no_grad():
                return [xcos_ext.xcos_head(*maps, parameters, **options)]

        def exact_head(parameters: Any = wide, maps: Any = maps, options: Any = options) -> Results:
            return [reference.xcos_head(*_wide(*maps), parameters, **options)]

        # Logits in fp32, as tests/ops/test_xcos_head.py allows.
        yield f"xcos_head {'symmetric' if kind == 'symmetric' else 'ordered'}", Problem(head, exact_head, 1e-5)

    # 32 x 7 x 7 is the tuned shape, the other one is not.
    for kind, shape in (("softmax", {}), ("symmetric", {}), ("min-shift", {"channels": 16, "grid": (5, 6)})):
        p, g = sides(6 * size, 37 * size, kind, dtype=dtype, device=device, **shape)

        both = tuple(t.to(torch.float64).to("cpu") for t in (p, g))

        def exact(both: Any = both) -> Tensor:
            return reference.xcos_matrix(*both)

        def matrix(p: xcos_ext.Templates = p, g: xcos_ext.Templates = g) -> Results:
            with torch.no_grad():
                return [xcos_ext.xcos_matrix(p, g)]

        def topk(p: xcos_ext.Templates = p, g: xcos_ext.Templates = g) -> Results:
            with torch.no_grad():
                best = xcos_ext.xcos_topk(p, g, 5)
                return [best.values, xcos_ext.xcos_matrix(p, g).gather(1, best.indices)]

        yield f"xcos_matrix {kind}", Problem(matrix, lambda e=exact: [e()], PAIRS_ATOL[dtype])
        yield f"xcos_topk {kind}", Problem(topk, lambda e=exact: [e().topk(5).values] * 2, PAIRS_ATOL[dtype])
    p, g = sides(6 * size, 37 * size, dtype=dtype, device=device)
    wide_p, wide_g = (t.to(torch.float64).to("cpu") for t in (p, g))
    for fixed in ("uniform", "norm"):
        # Rows are products of matrices in the templates' type on a GPU: half an ulp of every product's factors.
        bound = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, PAIRS_ATOL[dtype])
        ours, theirs = (
            lambda m=m, sides=sides, f=fixed: [m.xcos_matrix(*sides, f)]
            for m, sides in ((xcos_ext, (p, g)), (reference, (wide_p, wide_g)))
        )
        yield f"xcos_matrix {fixed}", Problem(ours, theirs, bound)
    index_pairs = torch.tensor([[0, 3], [5, 36], [2, 2]], device=device)
    yield (
        "xcos_maps",
        Problem(
            lambda: list(xcos_ext.xcos_maps(p, g, index_pairs, threshold=0.3)),
            lambda: list(reference.xcos_maps(wide_p, wide_g, index_pairs.cpu(), threshold=0.3)),
            PAIRS_ATOL[dtype],
        ),
    )
    if half:
        return  # the backward pass of halves rounds what it recomputes: tests/ops/test_xcos_matrix.py has its bounds

    def gradients(module: Any, *sides: xcos_ext.Templates) -> Results:
        first, second, tensors = leaves(*sides)
        scores = module.xcos_matrix(first, second)
        return [scores.detach(), *torch.autograd.grad(scores.square().sum(), tensors)]

    rtol = 10 * BACKWARD_RTOL[dtype]  # sums over all pairs
    made = (lambda: gradients(xcos_ext, p, g)), (lambda: gradients(reference, wide_p, wide_g))
    yield "xcos_matrix backward", Problem(*made, PAIRS_ATOL[dtype], rtol)


def _poisoned(device: str) -> bool:
    """Whether the device refuses everything from now on in this process, as after an illegal access."""
    try:
        if device == "cuda":
            torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that failed leaves its own
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _each(mode: str, device: str, name: str, check: Callable[[Problem], str | None], without: str = "-") -> int:
    """Check all problems of a type but those that ``without`` names; how many fail."""
    bad, found = 0, problems(device, DTYPES[name])
    operator = "its problems"
    while True:
        begin = time.perf_counter()
        try:
            operator, problem = next(found)
            if operator.startswith(without):
                continue
            message = check(problem)
        except StopIteration:
            return bad
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        bad += message is not None
        emit(
            case=f"{mode}: {operator} {name}", status="failed" if message else "ok", message=message,
            seconds=round(time.perf_counter() - begin, 4),
        )  # fmt: skip
        if message is not None and _poisoned(device):
            emit(case=f"{mode}: the others {name}", status="not run", message=f"the GPU failed in {operator}")
            return bad


def against_the_reference(device: str, name: str) -> int:
    """Values and gradients."""
    return _each("reference", device, name, lambda problem: _close(problem, problem.run()))


def _same(results: Results, expected: Results) -> str | None:
    for index, (one, other) in enumerate(zip(results, expected, strict=True)):
        if not torch.equal(one, other):
            return f"result {index} differs from that of the default stream"
    return None


def on_a_side_stream(device: str, name: str) -> int:
    """With the default stream held up for long, what is launched on a side stream is done before it."""

    def check(problem: Problem, cycles: int = 80_000_000) -> str | None:
        side = torch.cuda.Stream()
        expected = problem.run()
        with torch.cuda.stream(side):
            # What loads kernels or allocates for the first time may wait for the device: not while it is held up.
            _same(problem.run(), expected)
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)  # some 45 ms; memory of the side stream's own is not what `expected` lies in
        with torch.cuda.stream(side):
            message = _same(problem.run(), expected)
        over = torch.cuda.default_stream().query()
        torch.cuda.synchronize()
        if over and message is None:
            if cycles > 80_000_000:
                return "the default stream was not held up for long enough to tell, twice"
            return check(problem, 5 * cycles)
        return message

    return _each("side stream", device, name, check, WAITING)


def without_synchronisation(device: str, name: str) -> int:
    """Nothing waits for the device behind the caller's back."""

    def check(problem: Problem) -> str | None:
        problem.run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            problem.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return None

    return _each("no sync", device, name, check, WAITING)


def first_in_a_graph(device: str, name: str) -> int:
    """Each operator's first launch of this process is inside a capture; replayed, it gives what it gives outside."""
    # cuBLAS itself cannot start within a capture.
    torch.mm(*(torch.ones(16, 16, device=device, dtype=DTYPES[name]) for _ in range(2)))

    def check(problem: Problem) -> str | None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = problem.run()
        graph.replay()
        torch.cuda.synchronize()
        return _close(problem, results) or _same(results, problem.run())

    return _each("graph", device, name, check, WAITING)


def two_threads(device: str, name: str) -> int:
    """Threads that launch problems of different sizes at once get what each gets alone."""
    jobs = [list(problems(device, DTYPES[name], size)) for size in (1, 4)]
    alone = [[problem.run() for _, problem in job] for job in jobs]
    messages: list[str] = []
    if device == "cuda":
        torch.cuda.synchronize()  # inputs are there, whatever stream reads them

    def work(which: int) -> None:
        try:
            stream = torch.cuda.Stream() if device == "cuda" else None
            with torch.cuda.stream(stream):
                for _ in range(20 if device == "cuda" else 2):
                    for (operator, problem), expected in zip(jobs[which], alone[which], strict=True):
                        message = _same(problem.run(), expected)
                        if message:
                            messages.append(f"{operator}: {message}")
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")

    begin = time.perf_counter()
    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    emit(
        case=f"two threads: {name}", status="failed" if messages else "ok", message="; ".join(messages[:5]) or None,
        seconds=round(time.perf_counter() - begin, 3),
    )  # fmt: skip
    return int(bool(messages))


# What waits for the device by its nature: xcos_maps looks at its indices.
WAITING = "xcos_maps"
# A part and a type is a process of its own on a GPU: what fails there for good, fails alone. Captures need one that has
# launched nothing; side streams come last, when nothing else holds the device.
PARTS: dict[str, tuple[Callable[[str, str], int], tuple[str, ...], bool]] = {
    "graph": (first_in_a_graph, ("fp16", "fp32"), True),
    "reference": (against_the_reference, tuple(DTYPES), False),
    "no-sync": (without_synchronisation, ("fp16", "fp32"), True),
    "threads": (two_threads, ("fp16", "fp32"), False),
    "side-stream": (on_a_side_stream, ("fp16", "fp32"), True),
}


def _side_by_side(parts: list[tuple[str, str]]) -> int:
    """Processes of some parts and types; how many fail."""
    running = {
        (part, name): subprocess.Popen([sys.executable, __file__, "--device", "cuda", "--part", part, "--type", name])
        for part, name in parts
    }
    bad = 0
    for (part, name), process in running.items():
        code = process.wait()
        bad += code != 0
        if code not in (0, 1):
            emit(case=f"{part}: {name}", status="failed", message=f"the process ended with status {code}")
    return bad


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", choices=tuple(PARTS), help="this one only, in this process")
    parser.add_argument("--type", choices=tuple(DTYPES), default="fp32", help="of --part")
    options = parser.parse_args()
    if options.part is not None:
        return 1 if PARTS[options.part][0](options.device, options.type) else 0
    everything = [(part, name) for part, (_, names, _) in PARTS.items() for name in names]
    if options.device == "cuda":
        alone = [(part, name) for part, name in everything if part == "side-stream"]
        bad = _side_by_side([one for one in everything if one not in alone])
        bad += _side_by_side(alone)
    else:
        bad = sum(PARTS[part][0]("cpu", name) for part, name in everything if not PARTS[part][2])
    print(f"smoke on {options.device}: {bad} failures")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
