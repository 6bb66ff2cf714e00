"""The fastest way to run a model, found by trying."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor, nn

from xcos_ext import backbones
from xcos_ext.card.calibration import Calibration
from xcos_ext.deploy import CompiledModel, Trial, compile_for_inference
from xcos_ext.deploy import compiled as module
from xcos_ext.deploy.candidates import CANDIDATES, Candidate, _Graphed, build_candidate, names
from xcos_ext.deploy.compiled import choose
from xcos_ext.deploy.cuda_graphs import MOST_GRAPHS, CudaGraphs
from xcos_ext.deploy.timing import Spread
from xcos_ext.model import XCosHead, XCosModel, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
QUICK = ("folded", "packed")


class Tiny(backbones.Recogniser):
    """One convolution with batch norm and one without."""

    grid_shape = (8, 7, 7)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 8, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 2, 2)
        )  # fmt: skip
        self.body[1].running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]

    def grid(self, images: Tensor) -> Tensor:
        return self.body(images)


@pytest.fixture
def model() -> XCosModel:
    made = XCosModel(Tiny(), XCosHead(8, 4), name="tiny").eval()
    made.set_calibration(Calibration(0.3, "a test", {1e-2: 0.25, 1e-3: 0.35}))
    return made


def images(n: int, *, size: int = 112) -> Tensor:
    return torch.randn(n, 3, size, size)


def found(model: XCosModel, n: int = 2, **options: object) -> CompiledModel:
    options = {"candidates": QUICK, "seconds": 0.0, **options}
    return compile_for_inference(model, (images(n), images(n)), **options)  # type: ignore[arg-type]


# --- the result


@pytest.mark.parametrize("batch", [2, 1, 5])
def test_scores_features_and_maps_are_the_models_at_every_batch_size(model: XCosModel, batch: int) -> None:
    fast = found(model)
    a, b = images(batch), images(batch)
    with torch.no_grad():
        torch.testing.assert_close(fast(a, b), model(a, b), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast.features(a), model.features(a), rtol=1e-4, atol=1e-5)
    score = fast.score(fast.features(a), fast.features(b))
    torch.testing.assert_close(score, fast(a, b).score, rtol=1e-4, atol=1e-5)
    assert not score.requires_grad


def test_what_belongs_to_the_model_stays(model: XCosModel) -> None:
    fast = found(model)
    assert (fast.threshold, fast.fmr_thresholds, fast.fmr_curve) == (0.3, model.fmr_thresholds, model.fmr_curve)
    assert (fast.name, fast.architecture, fast.preprocessing) == ("tiny", "custom", model.preprocessing)
    assert fast.fingerprint() == model.fingerprint() and "tiny" in repr(fast)
    features = torch.randn(2, 4, 7, 7)
    with torch.no_grad():  # with gradients the head computes the same in other operators
        assert torch.equal(fast.score(*features.split(1)), model.score(*features.split(1)))
    templates, wanted = fast.templates(features, "gallery"), model.templates(features, "gallery")
    assert torch.equal(templates.features, wanted.features) and not templates.features.requires_grad
    pictures = [np.full((112, 112, 3), value, np.uint8) for value in (10, 90, 200)]
    with torch.no_grad():
        torch.testing.assert_close(
            fast.features_of(pictures, batch_size=2), model.features_of(pictures), rtol=1e-4, atol=1e-5
        )
    assert model.backbone.body[1].training is False and any(p.requires_grad for p in model.parameters())


def test_one_batch_as_example_is_for_features(model: XCosModel) -> None:
    fast = compile_for_inference(model, images(1), candidates=QUICK, seconds=0)
    assert [trial.name for trial in fast.trials] == ["eager", "folded fp32", "packed fp32"]
    assert all(trial.error is not None and trial.error < 1e-5 for trial in fast.trials)
    a, b = images(3), images(3)
    with torch.no_grad():
        torch.testing.assert_close(fast(a, b), model(a, b), rtol=1e-4, atol=1e-5)


def test_results_are_ordinary_tensors_whatever_mode_the_caller_is_in(model: XCosModel) -> None:
    fast = found(model)
    with torch.inference_mode():
        inside = fast(images(2), images(2)).score
    with torch.autocast("cpu", torch.bfloat16):
        cast = fast(images(2), images(2)).score
    assert not inside.is_inference() and cast.dtype == torch.float32
    mixed = fast(images(2).bfloat16(), images(2).double())
    assert mixed.score.shape == (2,) and fast.features(images(0)).shape == (0, 4, 7, 7)
    assert fast(images(0), images(0)).score.shape == (0,)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["folded", "packed", "eager"])
def test_threads_may_share_one(model: XCosModel, name: str) -> None:
    fast = found(model, candidates=[name], margin=0.0)
    batches = [(images(2), images(2)) for _ in range(8)]
    wanted = [fast(*pair).score for pair in batches]
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        got[i] = fast(*batches[i]).score

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(got[i], wanted[i]) for i in range(8))


# --- the choice


def test_trials_tell_time_error_and_the_choice(model: XCosModel) -> None:
    said: list[str] = []
    fast = found(model, progress=said.append)
    by_name = {trial.name: trial for trial in fast.trials}
    assert list(by_name) == ["eager", "folded fp32", "packed fp32"]
    for trial in fast.trials:
        assert trial.problem is None and trial.error is not None and trial.error < 1e-5
        assert trial.seconds is not None and trial.seconds.low <= trial.seconds.median <= trial.seconds.high
        assert trial.seconds.samples >= 5 and trial.speedup is not None
    assert by_name["eager"].speedup == Spread(1.0, 1.0, 1.0, by_name["eager"].seconds.samples)  # type: ignore[union-attr]
    assert fast.chosen in by_name and said[0] == "preparing folded fp32" and said[-1] == "timing 3 candidates"
    report = fast.report()
    assert all(name in report for name in by_name)
    assert next(line for line in report.splitlines() if line.startswith("*")).split()[1] == fast.chosen.split()[0]


@pytest.mark.thorough
def test_half_precision_is_only_for_those_who_ask_for_it(model: XCosModel) -> None:
    assert {trial.name for trial in found(model, dtypes=None).trials} == {"eager", "folded fp32", "packed fp32"}
    asked = found(model, dtypes=(torch.bfloat16, torch.float32), candidates=["folded"])
    assert [trial.name for trial in asked.trials] == ["eager", "folded fp32", "folded bf16"]
    assert asked.trials[2].problem is None
    strict = found(model, dtypes=(torch.bfloat16,), candidates=["folded"], tolerance=1e-7)
    assert strict.chosen == "eager" and "scores differ by up to" in str(strict.trials[1].problem)
    assert strict.trials[1].seconds is not None  # what the tolerance costs is in the report
    assert "scores differ" in strict.report()


class Broken(Candidate):
    def features(self, images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory left\nand a long trace")


class Wrong(Candidate):
    def features(self, images: Tensor) -> Tensor:
        return super().features(images) * float("nan")


class FailsLater(Candidate):
    calls = 0

    def features(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("lost")
        return super().features(images)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (Broken, "OutOfMemoryError: no memory left"),
        (Wrong, "scores differ by up to inf, more than 1.0e-04"),
        (FailsLater, "RuntimeError: lost"),
    ],
)
def test_a_candidate_that_fails_is_noted_and_never_chosen(
    model: XCosModel, monkeypatch: pytest.MonkeyPatch, kind: type[Candidate], problem: str
) -> None:
    real = build_candidate

    def fake(name: str, model: XCosModel, *rest: object) -> Candidate:
        return kind(model) if name == "folded" else real(name, model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("xcos_ext.deploy.compiled.build_candidate", fake)
    fast = found(model)
    assert fast.trials[1].name == "folded fp32" and fast.trials[1].problem == problem
    assert fast.chosen != "folded fp32" and problem in fast.report()


def test_without_a_compiler_the_reason_is_said(model: XCosModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Callable[..., Tensor]:
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(module.torch, "compile", refuse)
    fast = found(model, candidates=["inductor"])
    assert fast.chosen == "eager" and fast.trials[1].problem == "RuntimeError: no working C++ compiler found"
    assert fast.trials[1].seconds is None


def test_a_body_that_cannot_be_traced_stays_eager() -> None:
    class Branching(Tiny):
        def grid(self, images: Tensor) -> Tensor:
            return self.body(images) if images.sum() > 0 else self.body(-images)

    fast = found(XCosModel(Branching(), XCosHead(8, 4)).eval())
    assert fast.chosen == "eager" and all("TraceError" in str(trial.problem) for trial in fast.trials[1:])


def test_a_simpler_candidate_wins_unless_it_is_beaten_by_the_margin() -> None:
    def chosen(margin: float, **seconds: list[float]) -> str:
        return choose({name: Spread.of_ratios(seconds["eager"], taken) for name, taken in seconds.items()}, margin)

    eager, folded, packed = [1.0, 2.0, 1.0], [0.98, 1.96, 0.98], [0.9, 1.8, 0.9]
    assert chosen(0.03, eager=eager, folded=folded, packed=packed) == "packed"
    assert chosen(0.03, eager=eager, folded=folded) == "eager" and chosen(0.01, eager=eager, folded=folded) == "folded"
    assert chosen(0.0, eager=eager, folded=eager) == "eager"  # a tie
    # Nothing wins by small steps: who is chosen is within the margin of the fastest.
    assert chosen(0.03, eager=[1.0], folded=[0.975], packed=[0.95]) == "folded"
    drifting = [1.0, 10.0, 1.0, 10.0]  # compared within a round
    assert chosen(0.1, eager=drifting, folded=[x * y for x, y in zip(drifting, [0.9, 0.9, 0.8, 0.9], strict=True)]) == (
        "folded"
    )


def test_the_table_has_a_line_for_each_trial() -> None:
    spread = Spread.of([3e-3, 1e-3, 2e-3])
    assert (spread.median, spread.low, spread.high, spread.samples) == (2e-3, 1e-3, 3e-3, 3)
    text = module._table(
        [Trial("eager", spread, Spread(1, 1, 1, 3), 0.0), Trial("inductor fp32", problem="no")], "eager"
    )
    head, first, second = text.splitlines()
    assert first.split()[:3] == ["*", "eager", "2.00"] and second.split()[0] == "inductor" and second.endswith("no")
    assert "score error" in head


def test_tolerances_follow_the_dtype_and_the_gpus_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert (
        module._default_tolerance(torch.float32, CPU) == 1e-4 and module._default_tolerance(torch.float32, gpu) == 5e-3
    )
    assert module._default_tolerance(torch.float16, gpu) < module._default_tolerance(torch.bfloat16, gpu) == 0.05
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert module._default_tolerance(torch.float32, gpu) == 1e-4


# --- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtypes": ()}, ValueError, "dtypes: expected some of float32"),
        ({"dtypes": (torch.int8,)}, ValueError, "dtypes: expected some of float32"),
        ({"dtypes": (torch.float32, torch.float32)}, ValueError, "each once"),
        ({"candidates": ["graph"]}, ValueError, r"candidates: expected a list of 'eager'.*\(cpu\), got \['graph'\]"),
        ({"candidates": "folded"}, TypeError, "candidates: expected a sequence of texts, got one text, 'folded'"),
        ({"seconds": -1}, ValueError, "seconds: expected a number of at least 0, got -1"),
        ({"seconds": float("nan")}, ValueError, "seconds: expected"),
        ({"margin": -0.1}, ValueError, "margin: expected a share of at least 0"),
        ({"tolerance": float("inf")}, ValueError, "tolerance: expected"),
        ({"tolerance": "small"}, ValueError, "tolerance: expected"),
    ],
)
def test_options_out_of_range_are_refused(
    model: XCosModel, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        found(model, **options)


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (images(1, size=96), ValueError, r"example: expected \[N, 3, 112, 112\], got \[1, 3, 96, 96\]"),
        ((images(1), images(2)), ValueError, r"example: expected batches of one size, at least 1, got \[1, 2\]"),
        ((images(0), images(0)), ValueError, "at least 1"),
        ((images(1),) * 3, ValueError, "example: expected a batch of images, or a pair of batches, got 3"),
        (images(1).long(), TypeError, "example: expected normalised floating-point images, got torch.int64"),
        ((images(1), None), TypeError, "example: expected a tensor, got NoneType"),
        (images(1) * float("nan"), ValueError, "example: expected images whose scores are finite"),
        (images(1).to("meta"), ValueError, "example: expected images on cpu, where the model is, got meta"),
    ],
)
def test_other_examples_are_refused(model: XCosModel, example: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compile_for_inference(model, example, candidates=QUICK, seconds=0)  # type: ignore[arg-type]


def test_training_mode_anywhere_is_refused(model: XCosModel) -> None:
    model.backbone.body[1].train()
    with pytest.raises(ValueError, match="model: expected evaluation mode, got training mode"):
        found(model)
    with pytest.raises(TypeError, match="model: expected an XCosModel, got Linear"):
        found(nn.Linear(1, 1).eval())  # type: ignore[arg-type]


def test_calls_are_checked(model: XCosModel) -> None:
    fast = found(model)
    with pytest.raises(ValueError, match=r"images_b: expected as many faces as images_a, 2, got 3"):
        fast(images(2), images(3))
    with pytest.raises(ValueError, match=r"images_a: expected \[N, 3, 112, 112\], got \[2, 3, 10, 10\]"):
        fast(images(2, size=10), images(2))
    with pytest.raises(ValueError, match=r"images: expected images on cpu, where the model is, got meta"):
        fast.features(images(1).to("meta"))
    with pytest.raises(TypeError, match="images: expected a tensor, got ndarray"):
        fast.features(np.zeros((1, 3, 112, 112)))  # type: ignore[arg-type]


def test_images_that_ask_for_gradients_are_refused(model: XCosModel) -> None:
    fast = found(model)
    asking = images(2).requires_grad_()
    with pytest.raises(RuntimeError, match="images_a: expected images without gradients, got requires_grad=True"):
        fast(asking, images(2))
    with torch.no_grad():
        assert fast(asking, images(2)).score.shape == (2,)


# --- torch.compile


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["inductor", "ahead of time"])
def test_compiled_code_serves_its_size_and_the_folded_model_the_others(model: XCosModel, name: str) -> None:
    with torch.no_grad():
        candidate = build_candidate(name, model, torch.float32, (2, 3, 112, 112), CPU)
        candidate.features(images(2))  # compiles
    run, seen = candidate._run, []  # type: ignore[attr-defined]

    def counted(x: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return run(x)

    candidate._run = counted  # type: ignore[attr-defined]
    fast = CompiledModel(model, candidate, [], name, CPU)

    def check(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(fast(a, b).score, wanted(a, b), rtol=1e-4, atol=1e-5)

    def wanted(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return model(a.clone().float(), b.clone().float()).score

    with torch._dynamo.config.patch(error_on_recompile=True):  # whatever the caller does
        check(images(1), images(1))
        check(images(1).to(memory_format=torch.channels_last), images(1).double())
        with torch.autocast("cpu", torch.bfloat16):
            check(images(1), images(1))
        with torch.inference_mode():
            check(images(1), images(1))
            fast.features(images(2))
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: check(images(1), images(1)), range(6)))
        assert seen == [2] * 11
        check(images(2), images(2))
        fast.features(images(1))
    assert seen == [2] * 11


# --- CUDA graphs, on a stand-in


def test_a_graph_is_captured_once_and_replayed_with_new_inputs() -> None:
    cuda, calls = FakeCuda(), []

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        total = a + b
        return total, total.relu().sum(1)

    graphs = CudaGraphs(function, cuda=cuda)
    first = graphs(torch.ones(2, 3), torch.ones(2, 3))
    kept = [tensor.clone() for tensor in first]
    for _ in range(3):
        a, b = torch.randn(2, 3), torch.randn(2, 3)
        total, sums = graphs(a, b)
        assert torch.equal(total, a + b) and torch.equal(sums, (a + b).relu().sum(1))
    assert len(calls) == 4 and len(cuda.captures) == 1  # three to warm up, one captured
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True))  # results are the caller's own
    assert cuda.log[:6] == [
        "side waits for current", "on side", "current waits for side", "capture on side, thread_local", "record done",
        "current waits for done",
    ]  # fmt: skip
    assert cuda.log[6:8] == ["replay", "record done"]


def test_each_shape_has_a_graph_up_to_a_number() -> None:
    cuda = FakeCuda()
    graphs = CudaGraphs(lambda x: (x * 2,), cuda=cuda)
    for n in (1, 2, 1, *range(3, MOST_GRAPHS + 4), 2):
        x = torch.randn(n)
        assert torch.equal(graphs(x)[0], x * 2)
    assert len(cuda.captures) == len(graphs.shapes) == MOST_GRAPHS
    assert graphs(torch.randn(0))[0].shape == (0,) and len(graphs.shapes) == MOST_GRAPHS
    one = CudaGraphs(lambda x: (x * 2,), cuda=FakeCuda())
    one(torch.randn(0))
    assert one.shapes == ()


def test_a_failed_capture_leaves_nothing_behind() -> None:
    cuda = FakeCuda()
    cuda.fail = RuntimeError("operation not permitted when stream is capturing")
    graphs = CudaGraphs(lambda x: (x * 2,), cuda=cuda)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs(torch.ones(1))
    assert graphs.shapes == () and torch.equal(graphs(torch.ones(1))[0], torch.full((1,), 2.0))


def test_threads_take_turns_at_a_graph() -> None:
    graphs = CudaGraphs(lambda x: (x.cumsum(0),), cuda=FakeCuda())
    wrong: list[int] = []

    def work(i: int) -> None:
        x = torch.full((50,), float(i))
        wrong.extend(i for _ in range(30) if not torch.equal(graphs(x)[0], x.cumsum(0)))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == [] and len(graphs.shapes) == 1


def test_a_whole_model_in_a_graph_gives_its_scores(model: XCosModel) -> None:
    cuda = FakeCuda()
    candidate = _Graphed(build_candidate("folded", model, torch.float32, (4, 3, 112, 112), CPU), cuda)
    with torch.no_grad():
        for n in (2, 2, 1):
            a, b = images(n), images(n)
            torch.testing.assert_close(candidate.pair(a, b), model(a, b), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(candidate.features(a), model.features(a), rtol=1e-4, atol=1e-5)
    assert len(cuda.captures) == 4  # pairs and pictures, two sizes each


def test_a_gpu_tries_graphs_and_says_what_it_has() -> None:
    cuda = torch.device("cuda", 0)
    assert names(cuda, None) == CANDIDATES["cuda"] and names(CPU, None) == CANDIDATES["cpu"][:-1]
    assert names(cuda, ["graph"]) == ("eager", "graph")
    assert names(torch.device("mps"), None) == ("eager", "folded")
    with pytest.raises(ValueError, match=r"'inductor graph', 'autotuned graph' \(cuda\), got \['packed'\]"):
        names(cuda, ["packed"])


# --- the real things


@pytest.mark.process
def test_nothing_is_compiled_or_imported_before_it_is_asked_for() -> None:
    code = "import sys, xcos_ext.model; print('torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_model_keeps_its_scores_as_every_candidate(dtype: torch.dtype) -> None:
    model = load_model().eval()
    fast = compile_for_inference(
        model, (images(2), images(2)), dtypes=(dtype,), candidates=CANDIDATES["cpu"], seconds=0
    )
    assert all(trial.problem is None for trial in fast.trials), fast.report()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["folded", "graph", "inductor", "inductor graph"])
def test_candidates_on_a_gpu_keep_the_scores(model: XCosModel, name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).cuda()
    example = images(2).cuda(), images(2).cuda()
    fast = compile_for_inference(model, example, candidates=[name], dtypes=(dtype,), seconds=0.1)
    assert all(trial.problem is None for trial in fast.trials), fast.report()
    with torch.no_grad():
        for n in (2, 3, 2):
            a, b = images(n).cuda(), images(n).cuda()
            torch.testing.assert_close(fast(a, b).score, model(a, b).score, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match=r"images_a: expected images on cuda:0, where the model is, got cpu"):
        fast(images(2), images(2))


@pytest.mark.cuda
def test_graph_calls_on_two_streams_do_not_mix(model: XCosModel) -> None:
    model = copy.deepcopy(model).cuda()
    candidate = build_candidate("graph", model, torch.float32, (4, 3, 112, 112), torch.device("cuda", 0))
    batches = [(images(2).cuda(), images(2).cuda()) for _ in range(20)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.no_grad():
        wanted = [candidate.pair(*pair).score for pair in batches]
        got = []
        for i, pair in enumerate(batches):
            streams[i % 2].wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(streams[i % 2]):
                got.append(candidate.pair(*pair).score)
        torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
