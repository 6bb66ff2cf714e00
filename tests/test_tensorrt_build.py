"""Building engines: logic against recording fakes of TensorRT 10 and 11, files for real."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tensorrt_stubs.fakes import HostCuda, fake_tensorrt
from tensorrt_stubs.graphs import sum_graph

from xcos_ext.deploy import build_engine
from xcos_ext.deploy import tensorrt as engines
from xcos_ext.deploy.tensorrt import gpu as gpus
from xcos_ext.deploy.tensorrt.cache import cached_engine
from xcos_ext.deploy.tensorrt.package import TensorRTError, load_tensorrt, version_of
from xcos_ext.deploy.tensorrt.plan import load_plan, read_card, sidecar
from xcos_ext.deploy.tensorrt.profiles import BatchProfile
from xcos_ext.deploy.tensorrt.supervise import Steps
from xcos_ext.io.atomic import OutputError
from xcos_ext.io.errors import ModelError
from xcos_ext.io.optional import MissingPackageError
from xcos_ext.onnx.files import onnx_hash


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
def graph(tmp_path: Path) -> Path:
    return sum_graph(tmp_path / "sum.onnx")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "sum.plan"


def calls(trt: Any, name: str) -> list[tuple[Any, ...]]:
    return [call[1:] for call in trt.calls if call[0] == name]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".onnx")


# What is built


def test_networks_are_strongly_typed_in_both_versions(trt: Any, graph: Path, plan: Path) -> None:
    build_engine(graph, plan)
    flags = ["EXPLICIT_BATCH", "STRONGLY_TYPED"] if trt.__version__.startswith("10") else ["STRONGLY_TYPED"]
    assert calls(trt, "create_network") == [(flags,)]


def test_precision_is_the_graphs_and_never_a_flag(trt: Any, graph: Path, plan: Path) -> None:
    build_engine(graph, plan)
    assert calls(trt, "set_flag") == []
    assert calls(trt, "clear_flag") == [("TF32",)]


def test_options_become_flags_and_limits(trt: Any, graph: Path, plan: Path) -> None:
    card = build_engine(graph, plan, version_compatible=True, refit=True, tf32=True, workspace=1 << 20)
    assert set(calls(trt, "set_flag")) == {("VERSION_COMPATIBLE",), ("REFIT",), ("TF32",)}
    assert calls(trt, "set_memory_pool_limit") == [("WORKSPACE", 1 << 20)]
    assert (card.version_compatible, card.refit, card.tf32, card.workspace) == (True, True, True, 1 << 20)


def test_workspace_may_be_left_to_tensorrt(trt: Any, graph: Path, plan: Path) -> None:
    assert build_engine(graph, plan, workspace=None).workspace is None
    assert calls(trt, "set_memory_pool_limit") == []


def test_one_profile_covers_all_dynamic_inputs(trt: Any, graph: Path, plan: Path) -> None:
    card = build_engine(graph, plan, profiles=[(2, 4, 8)])
    assert calls(trt, "set_shape") == [("a", (2, 4), (4, 4), (8, 4)), ("b", (2, 4), (4, 4), (8, 4))]
    assert card.profiles == (BatchProfile(2, 4, 8),)


def test_several_profiles_are_built_in_their_order(trt: Any, graph: Path, plan: Path) -> None:
    card = build_engine(graph, plan, profiles=[BatchProfile(1, 1, 1), (2, 16, 64)])
    assert [shapes[1:] for shapes in calls(trt, "set_shape") if shapes[0] == "a"] == [
        ((1, 4), (1, 4), (1, 4)),
        ((2, 4), (16, 4), (64, 4)),
    ]
    assert card.profiles == (BatchProfile(1, 1, 1), BatchProfile(2, 16, 64))


def test_a_graph_of_a_fixed_batch_needs_no_profile(trt: Any, tmp_path: Path, plan: Path) -> None:
    fixed = sum_graph(tmp_path / "fixed.onnx", batch=3)
    card = build_engine(fixed, plan)
    assert card.profiles == () and calls(trt, "set_shape") == []
    assert [tensor.shape for tensor in card.inputs] == [(3, 4), (3, 4)]
    build_engine(fixed, plan, profiles=[(3, 3, 3)])
    with pytest.raises(
        ValueError, match=r"profiles: expected none, because the graph's batch is fixed \(3\); got 1 to 8"
    ):
        build_engine(fixed, plan, profiles=[(1, 4, 8)])


def test_weights_that_are_listed_as_inputs_are_not_fed(trt: Any, tmp_path: Path, plan: Path) -> None:
    card = build_engine(sum_graph(tmp_path / "listed.onnx", listed=True), plan)
    assert [tensor.name for tensor in card.inputs] == ["a", "b"]


def test_only_the_batch_may_be_dynamic(trt: Any, tmp_path: Path, plan: Path) -> None:
    wide = sum_graph(tmp_path / "wide.onnx", width="width")
    with pytest.raises(
        ModelError, match=r"wide.onnx: input 'a': expected only its first axis, the batch, .*\[-1, -1\]"
    ):
        build_engine(wide, plan)


def test_the_builder_works_in_a_thread_so_that_this_one_can_react(trt: Any, graph: Path, plan: Path) -> None:
    build_engine(graph, plan)
    assert calls(trt, "build") == [(False,)]


# What is written


def test_the_sidecar_says_what_the_plan_is(trt: Any, graph: Path, plan: Path) -> None:
    card = build_engine(graph, plan)
    data = plan.read_bytes()
    assert read_card(plan) == card
    assert card.plan_sha256 == hashlib.sha256(data).hexdigest() and card.plan_bytes == len(data)
    assert card.onnx_sha256 == onnx_hash(graph)
    assert (card.tensorrt, card.sm, card.gpu) == (trt.__version__, "9.0", "Stand-in")
    assert [str(t) for t in (*card.inputs, *card.outputs)] == [
        "a float32 [-1, 4]",
        "b float32 [-1, 4]",
        "total float32 [-1]",
    ]
    assert card.metadata == {"xcos": '{"fingerprint": "0123456789abcdef"}'}
    stored = json.loads(sidecar(plan).read_text())
    assert stored["profiles"] == [{"min": 1, "opt": 1, "max": 32}] and stored["format"] == 1


def test_nothing_else_is_left_in_the_folder(trt: Any, graph: Path, plan: Path) -> None:
    build_engine(graph, plan)
    assert leftovers(plan.parent) == ["sum.plan", "sum.plan.json"]


def test_a_process_killed_between_plan_and_sidecar_leaves_a_plan_that_is_refused(
    trt: Any, graph: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_engine(graph, plan)
    from xcos_ext.deploy.tensorrt import plan as plans

    write = plans.write_bytes

    def killed(path: Any, data: Any) -> None:
        if str(path).endswith(".json"):
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(plans, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        build_engine(graph, plan, profiles=[(1, 1, 4)])
    with pytest.raises(engines.EngineError, match="not the plan of its sidecar"):
        load_plan(plan)


@pytest.mark.parametrize("name", ["sum.onnx", "sum", "nowhere/sum.plan"])
def test_files_that_cannot_be_written_are_found_before_any_work(
    trt: Any, graph: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(OutputError):
        build_engine(graph, tmp_path / name)
    with pytest.raises(OutputError):
        build_engine(graph, tmp_path / "sum.plan", timing_cache=tmp_path / name)
    assert trt.calls == []


# Failures


def test_parser_errors_name_the_node(trt: Any, graph: Path, plan: Path) -> None:
    trt.script.parser_errors = [("reduce", "ReduceSum", "axes must be\nconstant"), ("", "", "no such thing")]
    with pytest.raises(ModelError) as caught:
        build_engine(graph, plan)
    assert str(caught.value) == (
        f"{graph}: TensorRT {trt.__version__} cannot take this graph: node 'reduce' (ReduceSum): axes must be "
        "constant; no such thing"
    )
    assert leftovers(plan.parent) == []


def test_many_parser_errors_are_counted(trt: Any, graph: Path, plan: Path) -> None:
    trt.script.parser_errors = [(f"n{i}", "Op", "bad") for i in range(9)]
    with pytest.raises(ModelError, match=r"n2.*and 6 more$"):
        build_engine(graph, plan)


def test_a_build_that_gives_nothing_is_explained_by_the_last_errors(trt: Any, graph: Path, plan: Path) -> None:
    trt.script.messages = ["first", "Could not find any implementation", "Could not find any implementation", "a", "b"]
    with pytest.raises(TensorRTError) as caught:
        build_engine(graph, plan)
    assert str(caught.value) == (
        f"{graph}: TensorRT {trt.__version__} could not build an engine: Could not find any implementation; a; b"
    )
    assert leftovers(plan.parent) == []
    trt.script.messages = []
    with pytest.raises(TensorRTError, match="TensorRT gave no reason"):  # errors of the build before are not this one's
        build_engine(graph, plan)


def test_a_failed_build_leaves_the_older_plan(trt: Any, graph: Path, plan: Path) -> None:
    card = build_engine(graph, plan)
    trt.script.messages = ["no"]
    with pytest.raises(TensorRTError):
        build_engine(graph, plan, profiles=[(1, 2, 3)])
    assert load_plan(plan)[0] == card


def test_a_builder_that_cannot_start_is_explained(trt: Any, graph: Path, plan: Path) -> None:
    trt.script.builder_starts = False
    with pytest.raises(TensorRTError, match=r"cannot start: CUDA initialization failure with error: 35"):
        build_engine(graph, plan)


@pytest.mark.parametrize(("index", "error"), [(-1, None), (0, "inconsistent dimensions")])
def test_a_refused_profile_is_named(trt: Any, graph: Path, plan: Path, index: int, error: str | None) -> None:
    trt.script.profile_index, trt.script.profile_error = index, error
    with pytest.raises(TensorRTError, match=r"profiles: TensorRT refuses a batch of 1 to 32"):
        build_engine(graph, plan)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"profiles": [(4, 2, 8)]}, ValueError, "profiles: expected batch sizes 1 <= min <= opt <= max, got (4, 2, 8)"),
        ({"profiles": [(0, 1, 8)]}, ValueError, "profiles: expected batch sizes 1 <= min <= opt <= max, got (0, 1, 8)"),
        ({"profiles": [(1, 1.5, 8)]}, ValueError, "profiles: expected batch sizes"),
        ({"profiles": [(1, 1, 2**31)]}, ValueError, "profiles: expected batch sizes"),
        ({"profiles": []}, ValueError, "profiles: expected at least one, got none"),
        ({"profiles": [7]}, TypeError, "profiles: expected (min, opt, max) each, got 7"),
        ({"workspace": 0}, ValueError, "workspace: expected at least 1 byte, got 0"),
        ({"workspace": 1.5}, TypeError, "workspace: expected bytes as int, or None, got float"),
    ],
)
def test_arguments_are_checked_before_anything_else(
    graph: Path, plan: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        build_engine(graph, plan, **options)
    assert str(caught.value).startswith(message)


def test_damaged_and_missing_graphs_are_refused(trt: Any, graph: Path, plan: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        build_engine(graph.with_name("none.onnx"), plan)
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"sum\.onnx"):
        build_engine(graph, plan)
    assert leftovers(plan.parent) == [] and calls(trt, "build") == []


def test_weights_beside_the_graph_come_along_and_from_nowhere_else(trt: Any, tmp_path: Path, plan: Path) -> None:
    graph = sum_graph(tmp_path / "sum.onnx")
    model = onnx.load(graph)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((2000,), np.float32)[:1], "scale"))
    onnx.save_model(
        model, str(graph), save_as_external_data=True, location="weights.bin", size_threshold=0, convert_attribute=False
    )
    alone = len(graph.read_bytes())
    build_engine(graph, plan)
    assert calls(trt, "parse")[0][0] < alone + 100  # within the graph now, no longer by name
    first = read_card(plan).onnx_sha256
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert onnx_hash(graph) != first, "the hash covers the weights"
    weights.unlink()
    with pytest.raises(ModelError, match="external data is missing"):
        build_engine(graph, plan)


# Package and GPU


def test_a_missing_package_is_one_sentence(
    cuda: HostCuda, graph: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError) as caught:
        build_engine(graph, plan)
    assert str(caught.value).startswith("a TensorRT engine needs tensorrt, which ")
    assert str(caught.value).endswith("pip install 'xcos_ext[tensorrt]'")


def test_a_package_whose_start_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise RuntimeError('no driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingPackageError, match=r"which cannot be loaded \(no driver\)"):
        load_tensorrt()


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0.post1", "", "dev"])
def test_an_old_tensorrt_is_refused(trt: Any, graph: Path, plan: Path, version: str) -> None:
    trt.__version__ = version
    with pytest.raises(TensorRTError, match=r"tensorrt: expected version 10.3 or later, got"):
        build_engine(graph, plan)


def test_a_missing_gpu_is_one_sentence(trt: Any, graph: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(gpus, "CUDA", gpus.Cuda())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        TensorRTError, match=r"^device: a TensorRT engine needs an NVIDIA GPU, and torch \S+ sees none$"
    ):
        build_engine(graph, plan)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(TensorRTError, match=r"device: expected one of 2 GPUs, got cuda:2"):
        build_engine(graph, plan, device="cuda:2")
    for device in ("cpu", "gpu 1"):
        with pytest.raises(ValueError, match="device: expected cuda or cuda:N, got"):
            build_engine(graph, plan, device=device)
    assert leftovers(plan.parent) == []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("11.4.0.106", (11, 4, 0, 106)), ("10.14.1.48.post1", (10, 14, 1, 48)), ("10.3.0", (10, 3, 0)), ("x", ())],
)
def test_versions_are_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert version_of(text) == numbers


# Timing cache


def test_the_timing_cache_is_used_and_brought_up_to_date(trt: Any, graph: Path, plan: Path, tmp_path: Path) -> None:
    cache = tmp_path / "times.cache"
    build_engine(graph, plan, timing_cache=cache)
    assert cache.read_bytes() == b"times"
    build_engine(graph, plan, timing_cache=cache)
    assert calls(trt, "set_timing_cache") == [(b"",), (b"times",)]
    assert cache.read_bytes() == b"timestimes"


@pytest.mark.parametrize("flaw", ["cache_fits", "cache_damaged"])
def test_a_timing_cache_that_does_not_fit_is_replaced_with_a_warning(
    trt: Any, graph: Path, plan: Path, tmp_path: Path, flaw: str
) -> None:
    cache = tmp_path / "times.cache"
    cache.write_bytes(b"of another GPU")
    setattr(trt.script, flaw, flaw == "cache_damaged")
    with pytest.warns(UserWarning, match=r"times.cache: made by another TensorRT or GPU, or damaged"):
        build_engine(graph, plan, timing_cache=cache)
    assert cache.read_bytes() == b"times"


def test_without_a_timing_cache_none_is_written(trt: Any, graph: Path, plan: Path) -> None:
    build_engine(graph, plan)
    assert leftovers(plan.parent) == ["sum.plan", "sum.plan.json"]


# Progress and its end


def test_progress_is_told_in_the_callers_thread_and_ends_complete(trt: Any, graph: Path, plan: Path) -> None:
    told: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        threads.add(threading.current_thread())

    trt.script.on_step = lambda: time.sleep(0.12)
    build_engine(graph, plan, progress=progress)
    assert threads == {threading.main_thread()}
    assert told[-1] == (100, 100) and told == sorted(told) and len(told) > 2


def test_phases_within_phases_add_up_and_never_fall() -> None:
    steps = Steps()
    steps.started("build", None, 4)
    seen = [steps.done]
    steps.completed("build", 0)
    steps.started("inner", "build", 2)
    seen.append(steps.done)
    steps.completed("inner", 0)
    seen.append(steps.done)
    steps.finished("inner")
    seen.append(steps.done)
    steps.started("other", None, 0)
    steps.completed("unknown", 3)
    steps.finished("unknown")
    seen.append(steps.done)
    assert seen == [0, 25, 37, 37, 37]


def test_an_exception_of_the_progress_callback_ends_the_build(trt: Any, graph: Path, plan: Path) -> None:
    trt.script.until_cancelled = True
    trt.script.on_step = lambda: time.sleep(0.01)

    def progress(done: int, total: int) -> None:
        raise OSError("the terminal has gone")

    with pytest.raises(OSError, match="the terminal has gone"):
        build_engine(graph, plan, progress=progress)
    assert calls(trt, "stopped") == [()]
    assert leftovers(plan.parent) == []


def test_ctrl_c_ends_the_build_and_leaves_nothing(trt: Any, graph: Path, plan: Path) -> None:
    sent = threading.Event()

    def interrupt() -> None:
        time.sleep(0.01)
        if not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGINT)

    trt.script.until_cancelled = True
    trt.script.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        build_engine(graph, plan)
    assert calls(trt, "stopped") == [()]
    assert leftovers(plan.parent) == []


def test_a_build_works_outside_the_main_thread(trt: Any, graph: Path, plan: Path) -> None:
    thread = threading.Thread(target=build_engine, args=(graph, plan))
    thread.start()
    thread.join(20)
    assert load_plan(plan)[0].tensorrt == trt.__version__


# The cache of plans


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "plans" / "deep"


def test_a_cached_engine_is_built_once(trt: Any, graph: Path, folder: Path) -> None:
    first = cached_engine(graph, folder)
    assert cached_engine(graph, folder) == first
    assert len(calls(trt, "build")) == 1
    assert first.name.startswith("sum-") and load_plan(first)[0].onnx_sha256 == onnx_hash(graph)


@pytest.mark.parametrize("change", ["graph", "profiles", "workspace", "flag", "sm", "gpu", "tensorrt"])
def test_a_change_of_anything_builds_another(trt: Any, cuda: HostCuda, graph: Path, folder: Path, change: str) -> None:
    first = cached_engine(graph, folder)
    options: dict[str, Any] = {}
    if change == "graph":
        sum_graph(graph, width=5)
    elif change == "sm":
        cuda.sm = "8.0"
    elif change == "gpu":
        cuda.name = "Another"
    elif change == "tensorrt":
        trt.__version__ += "1"
    else:
        options = {"profiles": {"profiles": [(1, 1, 2)]}, "workspace": {"workspace": 9}, "flag": {"refit": True}}[
            change
        ]
    second = cached_engine(graph, folder, **options)
    assert second != first and len(calls(trt, "build")) == 2
    assert load_plan(first) and load_plan(second)


@pytest.mark.parametrize("damage", ["plan", "cut", "sidecar", "no sidecar", "another's sidecar"])
def test_a_cached_engine_that_does_not_fit_is_built_again(trt: Any, graph: Path, folder: Path, damage: str) -> None:
    plan = cached_engine(graph, folder)
    data = plan.read_bytes()
    if damage == "plan":
        plan.write_bytes(data[:-1] + b"?")
    elif damage == "cut":
        plan.write_bytes(data[:-1])
    elif damage == "sidecar":
        sidecar(plan).write_text("{}")
    elif damage == "no sidecar":
        sidecar(plan).unlink()
    else:
        card = json.loads(sidecar(plan).read_text())
        sidecar(plan).write_text(json.dumps({**card, "sm": "7.5"}))
    assert cached_engine(graph, folder) == plan
    assert len(calls(trt, "build")) == 2 and load_plan(plan)[1] == data


def test_threads_that_want_the_same_engine_build_it_once(trt: Any, graph: Path, folder: Path) -> None:
    trt.script.on_step = lambda: time.sleep(0.02)
    threads = [threading.Thread(target=cached_engine, args=(graph, folder)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(calls(trt, "build")) == 1


def test_a_folder_that_cannot_be_made_is_refused(trt: Any, graph: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made a folder"):
        cached_engine(graph, tmp_path / "file" / "plans")


# The graphs that we export

#: What TensorRT's ONNX parser lists as supported for the types used (docs/operators.md of onnx-tensorrt, 10.x), of what
#: our exporter writes.
SUPPORTED = {
    *("Add", "Cast", "Clip", "Concat", "Conv", "Div", "Equal", "Gather", "IsInf", "Log"),
    *("MatMul", "Max", "Mul", "Neg", "PRelu", "ReduceSum", "Relu", "Reshape", "Slice"),
    *("Softmax", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
}


def test_the_shipped_models_graph_is_made_of_what_tensorrts_parser_takes(
    trt: Any, tmp_path_factory: pytest.TempPathFactory, plan: Path
) -> None:
    graph = tmp_path_factory.getbasetemp() / "shipped-pair.onnx"
    if not graph.exists():  # once for both versions
        import torch

        from xcos_ext.deploy import export_onnx
        from xcos_ext.model import load_model

        export_onnx(load_model(), graph, kind="pair", dtype=torch.float16)
    assert {node.op_type for node in onnx.load(graph).graph.node} <= SUPPORTED
    card = build_engine(graph, plan, profiles=[(1, 2, 64)])
    assert [str(t) for t in (*card.inputs, *card.outputs)] == [
        "images_a float32 [-1, 3, 112, 112]",
        "images_b float32 [-1, 3, 112, 112]",
        "score float32 [-1]",
        "similarity float32 [-1, 7, 7]",
        "attention float32 [-1, 7, 7]",
    ]
    assert card.metadata["xcos.kind"] == "pair" and card.metadata["xcos.dtype"] == "float16"
