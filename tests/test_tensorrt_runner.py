"""Running plans: logic against a fake TensorRT whose engines compute on the CPU; and plans and sidecars as files."""

from __future__ import annotations

import gc
import json
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorrt_stubs.fakes import VERSIONS, FakeStream, HostCuda, fake_tensorrt
from tensorrt_stubs.graphs import sum_graph
from torch import Tensor

from xcos_ext.deploy import TrtRunner, build_engine
from xcos_ext.deploy.tensorrt import gpu as gpus
from xcos_ext.deploy.tensorrt.package import EngineError, TensorRTError
from xcos_ext.deploy.tensorrt.plan import PlanCard, load_plan, read_card, sidecar
from xcos_ext.deploy.tensorrt.profiles import BatchProfile
from xcos_ext.io.optional import MissingPackageError


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    host = HostCuda()
    monkeypatch.setattr(gpus, "CUDA", host)
    return host


@pytest.fixture(params=[10, 11])
def trt(request: pytest.FixtureRequest, cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = fake_tensorrt(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


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
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 16])
def test_outputs_are_those_of_the_inputs(plan: Path, graph: bool, batch: int) -> None:
    runner = TrtRunner(plan, graph=graph)
    for _ in range(3):
        inputs = pair(batch)
        outputs = runner.run(inputs)
        assert list(outputs) == ["total"] and outputs["total"].dtype == torch.float32
        torch.testing.assert_close(outputs["total"], total(inputs))


def test_batches_may_come_in_any_order(plan: Path) -> None:
    runner = TrtRunner(plan)
    for batch in (4, 1, 16, 4, 1, 3, 16):
        inputs = pair(batch)
        torch.testing.assert_close(runner.run(inputs)["total"], total(inputs))


def test_the_profile_whose_kernels_were_chosen_for_the_nearest_size_is_taken(trt: Any, plan: Path) -> None:
    runner = TrtRunner(plan, graph=False)
    taken = {}
    for batch in (1, 4, 5):  # 4 lies in both, and nearer to 1 than to 8
        trt.calls.clear()
        runner = TrtRunner(plan, graph=False)
        runner.run(pair(batch))
        ((taken[batch], _),) = calls(trt, "set_optimization_profile_async")
    assert taken == {1: 0, 4: 0, 5: 1}


def test_a_fixed_batch_has_no_shapes_to_set(trt: Any, tmp_path: Path) -> None:
    plan = tmp_path / "fixed.plan"
    build_engine(sum_graph(tmp_path / "fixed.onnx", batch=3), plan)
    for graph in (True, False):
        runner = TrtRunner(plan, graph=graph)
        inputs = pair(3)
        torch.testing.assert_close(runner.run(inputs)["total"], total(inputs))
        with pytest.raises(ValueError, match=r"a: expected the shape \[3, 4\], got \[2, 4\]"):
            runner.run(pair(2))
    assert calls(trt, "set_input_shape") == [] and calls(trt, "set_optimization_profile_async") == []
    with pytest.raises(ValueError, match=r"batch: expected a batch of 3 \(the plan's profile\), got 2"):
        TrtRunner(plan).static_inputs(2)


def test_the_runner_says_what_it_is(plan: Path) -> None:
    runner = TrtRunner(plan)
    assert (
        repr(runner) == f"TrtRunner(a, b -> total, batch 1 to 4 or 3 to 16, TensorRT {runner.card.tensorrt}, Stand-in)"
    )


# Memory: what is copied, what is kept


def test_without_graphs_inputs_are_read_in_place_and_outputs_are_new(plan: Path) -> None:
    runner = TrtRunner(plan, graph=False)
    inputs = pair(2)
    first = runner.run(inputs)["total"]
    second = runner.run(inputs)["total"]
    assert first.data_ptr() != second.data_ptr()
    inputs["a"] += 1
    torch.testing.assert_close(first + 4, runner.run(inputs)["total"])


def test_a_graphs_outputs_are_overwritten_by_the_next_call_of_the_batch_size(cuda: HostCuda, plan: Path) -> None:
    runner = TrtRunner(plan)
    inputs = pair(2)
    first = runner.run(inputs)["total"]
    other = runner.run(pair(3))["total"]
    again = runner.run({name: value + 1 for name, value in inputs.items()})["total"]
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    torch.testing.assert_close(first, total(inputs) + 8)
    assert cuda.replays == 3


def test_static_inputs_are_not_copied(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TrtRunner(plan)
    mine = runner.static_inputs(2)
    for value in mine.values():
        value.uniform_()
    monkeypatch.setattr(Tensor, "copy_", lambda *_: pytest.fail("copied"))
    torch.testing.assert_close(runner.run(mine)["total"], total(mine))


def test_inputs_that_need_gradients_leave_the_graphs_tensors_alone(plan: Path) -> None:
    runner = TrtRunner(plan)
    inputs = {name: value.requires_grad_() for name, value in pair(2).items()}
    assert not runner.run(inputs)["total"].requires_grad
    assert not any(value.requires_grad for value in runner.static_inputs(2).values())


def test_every_graph_has_a_context_of_its_own_and_all_share_one_scratch_memory(trt: Any, plan: Path) -> None:
    trt.script.contexts = 3
    runner = TrtRunner(plan)
    for batch in (1, 2, 5):
        runner.run(pair(batch))
    assert trt.script.contexts == 0
    contexts = [graph.context._context for graph in runner._graphs.values()]
    assert len(set(map(id, contexts))) == 3
    assert {context._memory for context in contexts} == {(runner._engine.scratch.data_ptr(), 64)}


def test_the_graph_unused_for_longest_is_given_up(cuda: HostCuda, plan: Path) -> None:
    runner = TrtRunner(plan, max_graphs=2)
    for batch in (1, 2, 1, 3):
        runner.run(pair(batch))
    assert list(runner._graphs) == [1, 3]
    assert cuda.stream.synchronised == 1, "its memory is free only when nothing reads it"
    inputs = pair(2)
    torch.testing.assert_close(runner.run(inputs)["total"], total(inputs))


# Streams


def test_launches_leave_the_default_stream_and_are_ordered_around_it(trt: Any, cuda: HostCuda, plan: Path) -> None:
    runner = TrtRunner(plan, graph=False)
    runner.run(pair(1))
    own = runner._own_stream
    assert calls(trt, "execute_async_v3") == [(own.cuda_stream,)] and own.cuda_stream != 0
    assert own.waited[-1:] == [0] and cuda.stream.waited[-1:] == [own.cuda_stream]


def test_any_other_stream_is_used_itself(trt: Any, cuda: HostCuda, plan: Path) -> None:
    cuda.stream = FakeStream(7)
    TrtRunner(plan, graph=False).run(pair(1))
    assert calls(trt, "execute_async_v3") == [(7,)]


@pytest.mark.parametrize("graph", [True, False])
def test_a_stream_waits_for_the_runners_work_on_the_one_before(cuda: HostCuda, plan: Path, graph: bool) -> None:
    runner = TrtRunner(plan, graph=graph)
    cuda.stream = first = FakeStream(7)
    runner.run(pair(1))
    runner.run(pair(1))
    assert 7 not in first.waited and cuda.kept == []
    cuda.stream = second = FakeStream(8)
    runner.run(pair(1))
    assert second.waited[0] == 7
    assert cuda.kept == [8] * (4 if graph else 1), "scratch memory and the graph's tensors stay for this stream too"


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
def test_a_run_can_be_captured_after_one_of_its_size(trt: Any, cuda: HostCuda, plan: Path, graph: bool) -> None:
    runner = TrtRunner(plan, graph=graph)
    cuda.stream, cuda.in_capture = FakeStream(7), True
    with pytest.raises(TensorRTError, match="run a batch of 2 once before capturing it"):
        runner.run(pair(2))
    with pytest.raises(TensorRTError, match="static_inputs: expected a stream that is not being captured"):
        TrtRunner(plan).static_inputs(2)
    cuda.in_capture = False
    runner.run(pair(2))
    replays = cuda.replays
    cuda.stream, cuda.in_capture = FakeStream(9), True
    inputs = pair(2)
    outputs = runner.run(inputs)["total"]
    torch.testing.assert_close(outputs, total(inputs))
    assert cuda.replays == replays and calls(trt, "execute_async_v3")[-1] == (9,)
    assert cuda.stream.waited == [], "a wait for work outside would spoil the capture"


def test_a_context_that_was_captured_is_kept_when_its_own_graph_is_given_up(cuda: HostCuda, plan: Path) -> None:
    runner = TrtRunner(plan, max_graphs=1)
    runner.run(pair(2))
    context = weakref.ref(runner._graphs[2].context)
    cuda.in_capture = True
    runner.run(pair(2))
    cuda.in_capture = False
    runner.run(pair(3))
    gc.collect()
    assert list(runner._graphs) == [3] and context() is not None


# Bad inputs


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x.pop("b"), ValueError, r"inputs: expected a, b, got a"),
        (lambda x: x.update(c=x["a"]), ValueError, r"inputs: expected a, b, got a, b, c"),
        (lambda x: x.clear(), ValueError, r"inputs: expected a, b, got none"),
        (lambda x: x.update(b=x["b"].numpy()), TypeError, r"b: expected a torch tensor, got ndarray"),
        (lambda x: x.update(b=x["b"].half()), ValueError, r"b: expected float32, got float16"),
        (lambda x: x.update(b=x["b"].to("meta")), ValueError, r"b: expected a tensor on cpu, got one on meta"),
        (lambda x: x.update(b=torch.rand(2, 5)), ValueError, r"b: expected the shape \[batch, 4\], got \[2, 5\]"),
        (lambda x: x.update(b=torch.rand(2)), ValueError, r"b: expected the shape \[batch, 4\], got \[2\]"),
        (lambda x: x.update(b=torch.tensor(1.0)), ValueError, r"b: expected the shape \[batch, 4\], got \[\]"),
        (
            lambda x: x.update(b=torch.rand(4, 2).T),
            ValueError,
            r"b: expected a contiguous tensor, got strides \[1, 2\]",
        ),
        (lambda x: x.update(b=torch.rand(3, 4)), ValueError, r"b: expected a batch of 2, as a has, got 3"),
        (
            lambda x: x.update(pair(17)),
            ValueError,
            r"a: expected a batch of 1 to 4 or 3 to 16 \(the plan's profile\), got 17",
        ),
        (lambda x: x.update(pair(0)), ValueError, r"a: expected a batch of 1 to 4 or 3 to 16 \(.*\), got 0"),
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


def test_memory_that_starts_at_an_odd_place_is_refused_where_it_is_read_in_place(plan: Path) -> None:
    def shifted(n: int) -> Tensor:
        return torch.rand(4 * n + 1)[1:].view(n, 4)

    inputs = {"a": shifted(2), "b": shifted(2)}
    with pytest.raises(
        ValueError, match=r"^a: expected memory that starts at a multiple of 16 bytes, .* 4 bytes behind"
    ):
        TrtRunner(plan, graph=False).run(inputs)
    torch.testing.assert_close(TrtRunner(plan).run(inputs)["total"], total(inputs))  # copied anyway


def test_arguments_of_the_runner_are_checked(plan: Path) -> None:
    with pytest.raises(ValueError, match="max_graphs: expected at least 1, got 0"):
        TrtRunner(plan, max_graphs=0)
    with pytest.raises(ValueError, match=r"static_inputs: expected a runner with graph=True"):
        TrtRunner(plan, graph=False).static_inputs(1)
    with pytest.raises(ValueError, match=r"batch: expected a batch of 1 to 4 or 3 to 16 \(.*\), got 99"):
        TrtRunner(plan).static_inputs(99)


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
        ("runtime_starts", TensorRTError, r"TensorRT \S+ cannot start: TensorRT gave no reason"),
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
    with pytest.raises(TensorRTError, match="total: expected an output whose shape follows from the inputs'"):
        runner.run(pair(1))
    trt.script.contexts = 0
    with pytest.raises(TensorRTError, match="TensorRT makes no execution context"):
        runner.run(pair(1))


# Plans and sidecars


def test_nothing_is_loaded_before_the_hash_has_matched(trt: Any, plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.raises(EngineError, match=r"sum.plan: not the plan of its sidecar: changed after it was written"):
        TrtRunner(plan)
    assert calls(trt, "deserialize") == []


def test_a_plan_that_is_cut_off_is_refused(plan: Path) -> None:
    data = plan.read_bytes()
    for cut in (b"", data[:10], data[:-1]):
        plan.write_bytes(cut)
        with pytest.raises(EngineError, match=rf"cut off, .*: expected {len(data)} bytes, got {len(cut)}"):
            TrtRunner(plan)


def test_a_plan_without_its_sidecar_is_refused(plan: Path) -> None:
    sidecar(plan).unlink()
    with pytest.raises(EngineError, match=r"sum.plan: its sidecar sum.plan.json is missing"):
        TrtRunner(plan)


def test_a_missing_plan_is_refused(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        TrtRunner(tmp_path / "none.plan")
    with pytest.raises(EngineError, match="not a regular file"):
        TrtRunner(tmp_path)
    with pytest.raises(EngineError):
        TrtRunner("bad\0name")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("format", 2),
        ("tensorrt", 11),
        ("sm", None),
        ("plan_sha256", ["x"]),
        ("plan_bytes", True),
        ("plan_bytes", "10"),
        ("inputs", []),
        ("inputs", [{"name": "a", "shape": [-2, 4], "dtype": "float32"}]),
        ("inputs", [{"name": "a", "shape": [1, 4], "dtype": "__import__"}]),
        ("inputs", [{"name": "a", "shape": [True], "dtype": "float32"}]),
        ("outputs", [7]),
        ("profiles", [{"min": 4, "opt": 2, "max": 8}]),
        ("profiles", [{"min": 1}]),
        ("profiles", {}),
        ("workspace", "all"),
        ("refit", 1),
        ("metadata", {"a": 1}),
        ("metadata", None),
    ],
)
def test_a_sidecar_that_was_tampered_with_is_refused(plan: Path, entry: str, value: Any) -> None:
    data = json.loads(sidecar(plan).read_text())
    sidecar(plan).write_text(json.dumps({**data, entry: value}))
    with pytest.raises(EngineError, match=rf"sum.plan.json: damaged, or not the sidecar of a plan \({entry}: "):
        TrtRunner(plan)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * (1 << 24) + b"1"])
def test_a_sidecar_that_is_something_else_is_refused(plan: Path, text: bytes) -> None:
    sidecar(plan).write_bytes(text)
    with pytest.raises(EngineError, match=r"sum.plan.json: "):
        TrtRunner(plan)


@pytest.mark.parametrize("change", ["shape", "dtype", "name", "profile"])
def test_an_engine_that_is_not_what_the_sidecar_says_is_refused(plan: Path, change: str) -> None:
    data = json.loads(sidecar(plan).read_text())
    if change == "profile":
        data["profiles"][0]["max"] = 5
    else:
        data["inputs"][0][change] = {"shape": [-1, 5], "dtype": "float16", "name": "c"}[change]
    sidecar(plan).write_text(json.dumps(data))
    with pytest.raises(EngineError, match=r"not what its sidecar says: the engine has a float32 \[-1, 4\], b "):
        TrtRunner(plan)


def test_cards_survive_json(plan: Path) -> None:
    card = read_card(plan)
    assert PlanCard.from_dict(json.loads(json.dumps(card.as_dict()))) == card
    assert card.profiles == (BatchProfile(1, 1, 4), BatchProfile(3, 8, 16))


# Where a plan fits


@pytest.mark.parametrize(
    ("built", "here", "compatible", "fits"),
    [
        ("11.4.0.106", "11.4.0.106", False, True),
        ("10.14.1.48.post1", "10.14.1.48", False, True),
        ("11.4.0.106", "11.4.1.2", False, False),
        ("11.4.0.106", "11.4.1.2", True, True),
        ("11.4.0.106", "11.3.0.99", True, False),
        ("10.3.0", "10.16.1.11", True, True),
        ("10.16.1.11", "11.4.0.106", True, True),
        ("10.16.1.11", "11.4.0.106", False, False),
        ("11.4.0.106", "10.16.1.11", True, False),
        ("10.16.1.11", "12.0.0", True, False),
        ("11.0.0", "12.0.0", True, False),
    ],
)
def test_versions_that_a_plan_fits(plan: Path, built: str, here: str, compatible: bool, fits: bool) -> None:
    from dataclasses import replace

    card = replace(read_card(plan), tensorrt=built, version_compatible=compatible)
    if fits:
        card.check_version(here, plan)
        return
    with pytest.raises(EngineError, match=rf"sum.plan: built for TensorRT {built}.*, this is {here}; build it again"):
        card.check_version(here, plan)


def test_a_plan_of_another_version_is_not_loaded(trt: Any, plan: Path) -> None:
    trt.__version__ = "11.9.9"
    with pytest.raises(EngineError, match=r"this is 11\.9\.9; build it again"):
        TrtRunner(plan)
    assert calls(trt, "deserialize") == []


def test_only_a_version_compatible_plan_may_bring_code_for_the_host(trt: Any, tmp_path: Path, plan: Path) -> None:
    TrtRunner(plan)
    build_engine(tmp_path / "sum.onnx", plan, version_compatible=True)
    TrtRunner(plan)
    assert calls(trt, "deserialize") == [(False,), (True,)]


def test_a_plan_of_another_kind_of_gpu_is_refused_and_of_a_similar_one_is_noted(cuda: HostCuda, plan: Path) -> None:
    cuda.name = "Cousin"
    with pytest.warns(UserWarning, match="its kernels were chosen on Stand-in, this is Cousin"):
        TrtRunner(plan)
    cuda.sm = "8.6"
    with pytest.raises(EngineError) as caught:
        TrtRunner(plan)
    assert str(caught.value) == (
        f"{plan}: built for compute capability 9.0 (Stand-in), this GPU has 8.6 (Cousin); build it again"
    )


def test_a_missing_package_and_a_missing_gpu_are_one_sentence_each(
    trt: Any, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "CUDA", gpus.Cuda())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TensorRTError, match="a TensorRT engine needs an NVIDIA GPU"):
        TrtRunner(plan)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match="a TensorRT engine needs tensorrt"):
        TrtRunner(plan)


def test_a_plan_can_be_looked_at_without_tensorrt(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert read_card(plan).tensorrt in VERSIONS.values() and load_plan(plan)[0] == read_card(plan)
