"""Real engines on a real GPU, beside torch: run by benchmarks/gpu_kit.sh where TensorRT is installed.

Everything here is marked cuda and tensorrt. What can be known without either is in the other test_tensorrt_*.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorrt_stubs.fakes import sum_graph
from torch import Tensor

from xcos_ext.deploy.tensorrt import TrtRunner, build_engine, cached_engine
from xcos_ext.io.errors import XCosError

pytestmark = [pytest.mark.cuda, pytest.mark.tensorrt]

#: Largest difference of scores and maps from torch's in fp32, by the type of the backbone inside. An fp16 backbone has
#: 10 bits of mantissa a value; its cosines are of features summed over hundreds of such values.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16")]
BATCHES = (1, 2, 17)


@pytest.fixture(scope="module")
def tensorrt() -> Any:
    """The package, or a skip that says why not."""
    from xcos_ext.deploy.tensorrt.plan import load_tensorrt

    try:
        return load_tensorrt()
    except XCosError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def folder(tensorrt: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """The shipped model on the GPU; true fp32, so that it can be compared with."""
    from xcos_ext.model import load_model

    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield load_model().cuda().eval()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def exported(folder: Path, kind: str, dtype: torch.dtype) -> Path:
    """The shipped model's graph of a kind and type, written once."""
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript")
    from xcos_ext.deploy import export_onnx
    from xcos_ext.model import load_model

    path = folder / f"{kind}-{str(dtype).removeprefix('torch.')}.onnx"
    if not path.exists():
        export_onnx(load_model(), path, kind=kind, dtype=dtype)
    return path


def runner_of(graph: Path, folder: Path, **options: Any) -> TrtRunner:
    return TrtRunner(cached_engine(graph, folder / "plans"), **options)


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 112, 112, device="cuda") * 2 - 1


def pair_of(batch: int) -> dict[str, Tensor]:
    return {"images_a": pictures(batch), "images_b": pictures(batch)}


def compare(outputs: dict[str, Tensor], wanted: Any, tolerance: float) -> None:
    for name, theirs in zip(("score", "similarity", "attention"), wanted, strict=True):
        assert outputs[name].dtype == torch.float32
        torch.testing.assert_close(
            outputs[name], theirs.float(), atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "direct"])
def test_pairs_are_scored_as_torch_does(model: Any, folder: Path, dtype: torch.dtype, graph: bool) -> None:
    runner = runner_of(exported(folder, "pair", dtype), folder, graph=graph)
    for batch in BATCHES:
        inputs = pair_of(batch)
        with torch.no_grad():
            wanted = model(*inputs.values())
        for _ in range(2):  # the second time without setting up
            compare(runner.run(inputs), wanted, TOLERANCE[dtype])


def test_templates_score_as_pictures_do(model: Any, folder: Path) -> None:
    to_templates = runner_of(exported(folder, "template", torch.float32), folder)
    to_score = runner_of(exported(folder, "score", torch.float32), folder)
    inputs = pair_of(2)
    sides = [to_templates.run({"images": images})["templates"].clone() for images in inputs.values()]
    with torch.no_grad():
        wanted = model(*inputs.values())
    compare(to_score.run({"templates_a": sides[0], "templates_b": sides[1]}), wanted, TOLERANCE[torch.float32])


@pytest.fixture
def small(folder: Path) -> Path:
    path = folder / "sum.onnx"
    return path if path.exists() else sum_graph(path)


def sums(inputs: dict[str, Tensor]) -> Tensor:
    return sum(value.sum(1) for value in inputs.values())  # type: ignore[return-value]


def rows(batch: int) -> dict[str, Tensor]:
    return {"a": torch.rand(batch, 4, device="cuda"), "b": torch.rand(batch, 4, device="cuda")}


@pytest.mark.parametrize("tf32", [False, True])
def test_a_plan_of_two_profiles_is_built_loaded_and_right(folder: Path, small: Path, tf32: bool) -> None:
    told: list[int] = []
    plan = folder / "sum.plan"
    card = build_engine(
        small, plan, profiles=[(1, 1, 1), (2, 4, 8)], tf32=tf32, progress=lambda done, total: told.append(done)
    )
    assert told[-1] == 100 and told == sorted(told)
    runner = TrtRunner(plan)
    assert runner.card == card
    for batch in (1, 2, 8, 1, 4):
        inputs = rows(batch)
        torch.testing.assert_close(runner.run(inputs)["total"], sums(inputs))
    with pytest.raises(ValueError, match="a: expected a batch of 1 or 2 to 8"):
        runner.run(rows(9))


def test_calls_do_not_wait_for_the_gpu(folder: Path, small: Path) -> None:
    for graph in (True, False):
        runner = runner_of(small, folder, graph=graph)
        inputs = rows(4)
        runner.run(inputs)
        torch.cuda.synchronize()
        finished = torch.cuda.Event()
        torch.cuda._sleep(500_000_000)  # a quarter of a second of the GPU's time
        runner.run(inputs)
        finished.record()
        assert not finished.query(), "the call came back before the GPU was done"
        torch.cuda.synchronize()


def test_streams_are_torchs_and_in_order(folder: Path, small: Path) -> None:
    for graph in (True, False):
        runner = runner_of(small, folder, graph=graph)
        runner.run(rows(4))
        for _ in range(10):
            stream = torch.cuda.Stream()
            inputs = rows(4)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                doubled = {name: value * 2 for name, value in inputs.items()}
                got = runner.run(doubled)["total"] + 1
            torch.cuda.current_stream().wait_stream(stream)
            torch.testing.assert_close(got, sums(inputs) * 2 + 1)


def test_many_batch_sizes_in_turn_each_with_outputs_of_its_own(folder: Path, small: Path) -> None:
    runner = runner_of(small, folder)
    kept = []
    for batch in (*range(1, 11), 3, 32, 1, 10):
        inputs = rows(batch)
        kept.append((runner.run(inputs)["total"], sums(inputs)))
    for found, wanted in kept:
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "direct"])
def test_a_run_is_captured_into_a_larger_graph(folder: Path, small: Path, graph: bool) -> None:
    runner = runner_of(small, folder, graph=graph)
    inputs = rows(4)
    runner.run(inputs)
    torch.cuda.synchronize()
    larger = torch.cuda.CUDAGraph()
    with torch.cuda.graph(larger):
        got = runner.run(inputs)["total"] * 3
    for value in inputs.values():
        value.uniform_()
    larger.replay()
    torch.testing.assert_close(got, sums(inputs) * 3)
