"""Running plans, on a stand-in for TensorRT whose engines compute on the CPU; and plans and sidecars as files."""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorrt_stubs.fakes import install, sum_graph
from torch import Tensor

from xcos_ext.deploy.cuda_graphs import MOST_GRAPHS
from xcos_ext.deploy.tensorrt import EngineError, TensorRTError, TrtRunner, build_engine, read_card
from xcos_ext.deploy.tensorrt.plan import Gpu, load_plan, sidecar


@pytest.fixture(params=[10, 11])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(monkeypatch, request.param)


@pytest.fixture
def plan(trt: Any, tmp_path: Path) -> Path:
    path = tmp_path / "sum.plan"
    build_engine(sum_graph(tmp_path / "sum.onnx"), path, profiles=[(1, 1, 4), (3, 8, 16)])
    trt.calls.clear()
    return path


def pair(batch: int) -> dict[str, Tensor]:
    return {"a": torch.rand(batch, 4), "b": torch.rand(batch, 4)}


def total(inputs: dict[str, Tensor]) -> Tensor:
    return sum(value.double().sum(1) for value in inputs.values()).float()  # type: ignore[union-attr]


def calls(trt: Any, name: str) -> list[tuple[Any, ...]]:
    return [call[1:] for call in trt.calls if call[0] == name]


# Results


@pytest.mark.parametrize("graph", [True, False])
def test_outputs_are_those_of_the_inputs_in_any_order_of_batches(trt: Any, plan: Path, graph: bool) -> None:
    runner = TrtRunner(plan, graph=graph)
    kept = []
    for batch in (4, 1, 1, 2, 16, 4, 4, 5, 1, 3):
        inputs = pair(batch)
        outputs = runner.run(inputs)
        assert list(outputs) == ["total"] and outputs["total"].dtype == torch.float32
        kept.append((outputs["total"], total(inputs)))
    for found, wanted in kept:  # no call overwrites what another gave
        torch.testing.assert_close(found, wanted)
    assert (len(trt.cuda.captures), trt.cuda.log.count("replay")) == ((6, 10) if graph else (0, 0))


def test_the_profile_whose_kernels_were_chosen_for_the_nearest_size_is_taken(trt: Any, plan: Path) -> None:
    runner = TrtRunner(plan, graph=False)
    for batch in (1, 4, 5):  # 4 lies in both, and nearer to 1 than to 8
        runner.run(pair(batch))
    assert calls(trt, "set_optimization_profile_async") == [(0,), (0,), (1,)]


@pytest.mark.parametrize("graph", [True, False])
def test_a_fixed_batch_has_no_shapes_to_set(trt: Any, tmp_path: Path, graph: bool) -> None:
    plan = tmp_path / "fixed.plan"
    build_engine(sum_graph(tmp_path / "fixed.onnx", batch=3), plan)
    runner, inputs = TrtRunner(plan, graph=graph), pair(3)
    torch.testing.assert_close(runner.run(inputs)["total"], total(inputs))
    with pytest.raises(ValueError, match=r"a: expected float32 \[3, 4\] on cpu, got float32 \[2, 4\] on cpu"):
        runner.run(pair(2))
    assert calls(trt, "set_input_shape") == [] and calls(trt, "set_optimization_profile_async") == []


# Memory


def test_without_graphs_inputs_are_read_in_place_and_outputs_are_new(plan: Path) -> None:
    runner = TrtRunner(plan, graph=False)
    inputs = pair(2)
    first = runner.run(inputs)["total"]
    inputs["a"] += 1
    torch.testing.assert_close(first + 4, runner.run(inputs)["total"])


@pytest.mark.parametrize("graph", [True, False])
def test_nothing_is_differentiable(plan: Path, graph: bool) -> None:
    inputs = {name: value.requires_grad_() for name, value in pair(2).items()}
    for _ in range(2):
        assert not TrtRunner(plan, graph=graph).run(inputs)["total"].requires_grad


def test_every_batch_size_has_a_context_of_its_own_and_all_share_one_scratch_memory(trt: Any, plan: Path) -> None:
    trt.script.contexts = 3
    runner = TrtRunner(plan)
    for batch in (1, 2, 5, 2):
        runner.run(pair(batch))
    assert trt.script.contexts == 0 and len(runner._contexts) == 3
    scratch = (runner._scratch.data_ptr(), 64)
    assert {memory for _, memory in calls(trt, "execute_async_v3")} == {scratch}


def test_ever_new_batch_sizes_need_no_more_contexts(trt: Any, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xcos_ext.deploy.tensorrt.runner._MOST_CONTEXTS", 2)
    trt.script.contexts = 4  # two of their own, one of each profile
    runner = TrtRunner(plan, graph=False)
    for batch in (1, 2, 3, 4, 5, 16, 4, 1, 12, 3):
        inputs = pair(batch)
        torch.testing.assert_close(runner.run(inputs)["total"], total(inputs))
    assert trt.script.contexts == 0


def test_batch_sizes_beyond_the_most_graphs_run_without_one(trt: Any, plan: Path) -> None:
    runner = TrtRunner(plan)
    for batch in (*range(1, MOST_GRAPHS + 3), 1, MOST_GRAPHS + 2):
        inputs = pair(batch)
        torch.testing.assert_close(runner.run(inputs)["total"], total(inputs))
    assert len(trt.cuda.captures) == MOST_GRAPHS


def test_memory_that_starts_at_an_odd_place_is_refused_where_it_is_read_in_place(plan: Path) -> None:
    inputs = {name: torch.rand(9)[1:].view(2, 4) for name in "ab"}
    message = r"^a: expected memory that starts at a multiple of 16 bytes, .* 4 bytes behind"
    with pytest.raises(ValueError, match=message):
        TrtRunner(plan, graph=False).run(inputs)
    torch.testing.assert_close(TrtRunner(plan).run(inputs)["total"], total(inputs))  # copied anyway


# Streams


def test_launches_leave_the_default_stream_and_are_ordered_around_it(trt: Any, plan: Path) -> None:
    runner = TrtRunner(plan, graph=False)
    runner.run(pair(1))
    own = runner._own_stream.cuda_stream
    assert own != 0 and [handle for handle, _ in calls(trt, "execute_async_v3")] == [own]
    order = ["current waits for done", "side waits for current", "current waits for side", "record done"]
    assert trt.cuda.log == order


@pytest.mark.parametrize("graph", [True, False])
def test_any_other_stream_is_used_itself_after_the_work_before(trt: Any, plan: Path, graph: bool) -> None:
    runner = TrtRunner(plan, graph=graph)
    runner.run(pair(1))
    trt.cuda.log.clear()
    trt.calls.clear()
    trt.cuda.now = stream = trt.cuda.Stream("mine")
    runner.run(pair(1))
    assert trt.cuda.log[0] == "mine waits for done" and trt.cuda.log[-1] == "record done"
    assert calls(trt, "execute_async_v3")[:1] == (
        [] if graph else [(stream.cuda_stream, (runner._scratch.data_ptr(), 64))]
    )
    assert trt.cuda.kept[-1] is stream, "scratch memory stays for this stream too"


def test_threads_follow_one_another(plan: Path) -> None:
    runner = TrtRunner(plan, graph=False)
    wrong = []

    def work() -> None:
        for _ in range(20):
            inputs = pair(2)
            if not torch.equal(runner.run(inputs)["total"], total(inputs)):
                wrong.append(inputs)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


@pytest.mark.parametrize("graph", [True, False])
def test_a_run_can_be_captured_after_one_of_its_size(trt: Any, plan: Path, graph: bool) -> None:
    runner = TrtRunner(plan, graph=graph)
    trt.cuda.now, trt.cuda.capturing = trt.cuda.Stream("mine"), True
    with pytest.raises(TensorRTError, match="run a batch of 2 once before capturing it"):
        runner.run(pair(2))
    trt.cuda.capturing = False
    runner.run(pair(2))
    trt.cuda.log.clear()
    trt.cuda.capturing = True
    inputs = pair(2)
    torch.testing.assert_close(runner.run(inputs)["total"], total(inputs))
    assert calls(trt, "execute_async_v3")[-1][0] == trt.cuda.now.cuda_stream
    assert trt.cuda.log == [], "a wait for work outside would spoil the capture, and no graph is launched"


# Bad inputs


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x.pop("b"), ValueError, r"inputs: expected a, b, got a"),
        (lambda x: x.update(c=x["a"]), ValueError, r"inputs: expected a, b, got a, b, c"),
        (lambda x: x.clear(), ValueError, r"inputs: expected a, b, got none"),
        (lambda x: x.update(b=x["b"].numpy()), TypeError, r"b: expected a torch tensor, got ndarray"),
        (lambda x: x.update(b=x["b"].half()), ValueError, r"b: expected float32 .*, got float16 \[2, 4\] on cpu"),
        (lambda x: x.update(b=x["b"].to("meta")), ValueError, r"b: expected float32 \[2, 4\] on cpu, .* on meta"),
        (
            lambda x: x.update(b=torch.rand(2, 5)),
            ValueError,
            r"b: expected float32 \[2, 4\] .*, got float32 \[2, 5\] .*",
        ),
        (lambda x: x.update(b=torch.rand(2)), ValueError, r"b: expected float32 \[2, 4\] .*, got float32 \[2\] .*"),
        (lambda x: x.update(b=torch.tensor(1.0)), ValueError, r"b: expected float32 \[2, 4\] .*, got float32 \[\] .*"),
        (lambda x: x.update(a=torch.tensor(1.0)), ValueError, r"a: expected a batch of 1 to 4 or .*, got none"),
        (lambda x: x.update(b=torch.rand(4, 2).T), ValueError, r"b: expected a contiguous .*, got strides \[1, 2\]"),
        (
            lambda x: x.update(b=torch.rand(3, 4)),
            ValueError,
            r"b: expected float32 \[2, 4\] .*, got float32 \[3, 4\] .*",
        ),
        (lambda x: x.update(pair(17)), ValueError, r"a: expected a batch of 1 to 4 or 3 to 16 \(.* profile\), got 17"),
        (lambda x: x.update(pair(0)), ValueError, r"a: expected a batch of 1 to 4 or 3 to 16 \(.* profile\), got 0"),
    ],
)
@pytest.mark.parametrize("graph", [True, False])
def test_inputs_that_do_not_fit_are_named(
    trt: Any, plan: Path, graph: bool, change: Any, error: type[Exception], message: str
) -> None:
    inputs: dict[str, Any] = pair(2)
    change(inputs)
    with pytest.raises(error, match=f"^{message}$"):
        TrtRunner(plan, graph=graph).run(inputs)
    assert calls(trt, "execute_async_v3") == []


# TensorRT's failures


def test_a_launch_that_fails_is_an_error(trt: Any, plan: Path) -> None:
    runner = TrtRunner(plan, graph=False)
    trt.script.runs = False
    with pytest.raises(TensorRTError, match="TensorRT could not run the engine"):
        runner.run(pair(1))
    trt.script.runs = True
    inputs = pair(1)
    torch.testing.assert_close(runner.run(inputs)["total"], total(inputs))


@pytest.mark.parametrize(
    ("flaw", "error", "message"),
    [
        ("loads", EngineError, r"sum.plan: TensorRT \S+ cannot load it: Serialization assertion failed"),
        ("starts", TensorRTError, r"TensorRT \S+ cannot start: CUDA initialization failure"),
    ],
)
def test_a_plan_that_tensorrt_does_not_load_is_explained(
    trt: Any, plan: Path, flaw: str, error: type[Exception], message: str
) -> None:
    setattr(trt.script, flaw, False)
    with pytest.raises(error, match=message):
        TrtRunner(plan)


def test_no_room_for_a_context_and_outputs_of_unknown_shape_are_errors(trt: Any, plan: Path) -> None:
    runner = TrtRunner(plan)
    trt.script.dynamic_output = True
    with pytest.raises(TensorRTError, match="total: expected a shape that follows from the inputs'"):
        runner.run(pair(1))
    trt.script.contexts = 0
    with pytest.raises(TensorRTError, match="TensorRT makes no execution context"):
        runner.run(pair(2))


# Plans and sidecars


def test_a_plan_that_is_cut_off_or_changed_is_refused_before_it_is_loaded(trt: Any, plan: Path) -> None:
    data = plan.read_bytes()
    for changed in (b"", data[:10], data[:-1], data[:-1] + b"?"):
        plan.write_bytes(changed)
        message = rf"sum.plan: cut off, changed, .* \({len(changed)} bytes, the sidecar is of {len(data)}\)"
        with pytest.raises(EngineError, match=message):
            TrtRunner(plan)
    assert calls(trt, "deserialize") == []


def test_a_missing_plan_or_sidecar_is_refused(plan: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none.plan", tmp_path, "bad\0name"):
        with pytest.raises(EngineError, match="cannot be read: "):
            TrtRunner(path)
    sidecar(plan).unlink()
    with pytest.raises(EngineError, match=r"sum.plan: no sidecar sum.plan.json \(No such file"):
        TrtRunner(plan)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("format", 2),
        ("tensorrt", 11),
        ("sm", None),
        ("sha256", ["x"]),
        ("plan_bytes", True),
        ("plan_bytes", "10"),
        ("inputs", [{"name": "a", "shape": ["4"], "dtype": "float32"}]),
        ("inputs", [{"name": "a", "shape": [True], "dtype": "float32"}]),
        ("outputs", [7]),
        ("profiles", [{"min": 4, "opt": 2, "max": 8}]),
        ("profiles", [{"min": 1}]),
        ("profiles", {}),
        ("tf32", 1),
        ("metadata", {"a": 1}),
        ("metadata", None),
    ],
)
def test_a_sidecar_with_a_damaged_entry_is_refused(plan: Path, entry: str, value: Any) -> None:
    data = json.loads(sidecar(plan).read_text())
    sidecar(plan).write_text(json.dumps({**data, entry: value}))
    with pytest.raises(EngineError, match=rf"sum.plan.json: damaged, or not the sidecar of a plan \({entry}: "):
        TrtRunner(plan)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("inputs", []),
        ("inputs", [{"name": "a", "shape": [-1, 5], "dtype": "float32"}]),
        ("inputs", [{"name": "a", "shape": [-1, 4], "dtype": "__import__"}]),
        ("profiles", [{"min": 1, "opt": 1, "max": 5}]),
        ("gpu", "Another"),
        ("metadata", {}),
    ],
)
def test_a_sidecar_that_says_something_else_is_refused(trt: Any, plan: Path, entry: str, value: Any) -> None:
    data = json.loads(sidecar(plan).read_text())
    sidecar(plan).write_text(json.dumps({**data, entry: value}))
    with pytest.raises(EngineError, match=r"sum.plan: .*not the plan of its sidecar"):
        TrtRunner(plan)
    assert calls(trt, "deserialize") == []


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_sidecar_that_is_something_else_is_refused(plan: Path, text: bytes) -> None:
    sidecar(plan).write_bytes(text)
    with pytest.raises(EngineError, match=r"sum.plan.json: damaged"):
        TrtRunner(plan)


def test_files_that_have_no_end_are_not_read(plan: Path, tmp_path: Path) -> None:
    sidecar(plan).write_bytes(b"1" * (1 << 24) + b"1")
    with pytest.raises(EngineError, match=r"no sidecar sum.plan.json \(more than 16777216 bytes\)"):
        TrtRunner(plan)
    sidecar(plan).unlink()
    os.mkfifo(sidecar(plan))
    with pytest.raises(EngineError, match=r"no sidecar sum.plan.json \(not a file\)"):
        TrtRunner(plan)
    os.mkfifo(tmp_path / "pipe.plan")
    for endless in (tmp_path / "pipe.plan", "/dev/zero"):
        with pytest.raises(EngineError, match="cannot be read: not a file"):
            TrtRunner(endless)


# Where a plan fits


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("11.4.0.106", "11.4.0.106", True),
        ("10.14.1.48.post1", "10.14.1.48", True),
        ("11.4.0.106", "11.4.1.2", False),
        ("10.16.1.11", "11.4.0.106", False),
        ("11.4.0.106", "10.16.1.11", False),
    ],
)
def test_a_plan_fits_its_own_version(plan: Path, built: str, here: str, fits: bool) -> None:
    card, gpu = replace(read_card(plan), tensorrt=built), Gpu(torch.device("cpu"), "Stand-in", "9.0")
    if fits:
        card.check_fits(here, gpu, plan)
        return
    with pytest.raises(EngineError, match=rf"sum.plan: built for TensorRT {built}, this is {here}; build it again"):
        card.check_fits(here, gpu, plan)


def test_a_plan_of_another_version_is_not_loaded(trt: Any, plan: Path) -> None:
    trt.__version__ = "11.9.9"
    with pytest.raises(EngineError, match=r"this is 11\.9\.9; build it again"):
        TrtRunner(plan)
    assert calls(trt, "deserialize") == []


def test_a_plan_of_another_kind_of_gpu_is_refused_and_of_a_similar_one_is_noted(trt: Any, plan: Path) -> None:
    trt.gpu = trt.gpu._replace(name="Cousin")
    with pytest.warns(UserWarning, match="its kernels were chosen on Stand-in, this is Cousin"):
        TrtRunner(plan)
    trt.gpu = trt.gpu._replace(sm="8.6")
    with pytest.raises(EngineError) as caught:
        TrtRunner(plan)
    assert str(caught.value) == (
        f"{plan}: built for compute capability 9.0 (Stand-in), this GPU has 8.6 (Cousin); build it again"
    )


def test_a_plan_can_be_looked_at_without_tensorrt(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert load_plan(plan)[0] == read_card(plan)
