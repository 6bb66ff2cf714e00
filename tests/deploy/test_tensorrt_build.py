"""Building engines and keeping them, on stand-ins for TensorRT 10 and 11 and for a GPU; files are real."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from tensorrt_stubs.fakes import install, sum_graph

from xcos_ext.cli.app import xcos
from xcos_ext.deploy.tensorrt import BatchProfile, EngineError, TensorRTError, build_engine, cached_engine, read_card
from xcos_ext.deploy.tensorrt import build as builds
from xcos_ext.deploy.tensorrt.plan import find_gpu, load_plan, load_tensorrt, sidecar
from xcos_ext.io.atomic import OutputError
from xcos_ext.io.errors import ModelError
from xcos_ext.io.optional import MissingPackageError
from xcos_ext.onnx.files import onnx_hash


@pytest.fixture(params=[10, 11])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(monkeypatch, request.param)


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


def test_networks_are_strongly_typed_so_precision_is_the_graphs(trt: Any, graph: Path, plan: Path) -> None:
    assert not build_engine(graph, plan).tf32
    flags = ["EXPLICIT_BATCH", "STRONGLY_TYPED"] if trt.__version__.startswith("10") else ["STRONGLY_TYPED"]
    assert calls(trt, "create_network") == [(flags,)]
    assert calls(trt, "set_flag") == [] and calls(trt, "clear_flag") == [("TF32",)]
    assert build_engine(graph, plan, tf32=True).tf32
    assert calls(trt, "set_flag") == [("TF32",)]


def test_profiles_are_built_in_their_order_for_all_dynamic_inputs(trt: Any, graph: Path, plan: Path) -> None:
    card = build_engine(graph, plan, profiles=[BatchProfile(2, 4, 8), (2, 16, 64)])
    assert calls(trt, "set_shape") == [
        (name, (2, 4), (opt, 4), (most, 4)) for opt, most in ((4, 8), (16, 64)) for name in ("a", "b")
    ]
    assert card.profiles == (BatchProfile(2, 4, 8), BatchProfile(2, 16, 64))


def test_a_graph_of_a_fixed_batch_needs_no_profile(trt: Any, tmp_path: Path, plan: Path) -> None:
    fixed = sum_graph(tmp_path / "fixed.onnx", batch=3)
    card = build_engine(fixed, plan)
    assert card.profiles == () and calls(trt, "set_shape") == []
    assert [tensor.shape for tensor in card.inputs] == [(3, 4), (3, 4)]
    build_engine(fixed, plan, profiles=[(3, 3, 3)])
    with pytest.raises(ValueError, match=r"profiles: expected none, because .* batch is fixed \(3\); got 1 to 8"):
        build_engine(fixed, plan, profiles=[(1, 4, 8)])


def test_weights_that_are_listed_as_inputs_are_not_fed(trt: Any, tmp_path: Path, plan: Path) -> None:
    card = build_engine(sum_graph(tmp_path / "listed.onnx", listed=True), plan)
    assert [tensor.name for tensor in card.inputs] == ["a", "b"]


def test_only_the_batch_may_be_dynamic(trt: Any, tmp_path: Path, plan: Path) -> None:
    wide = sum_graph(tmp_path / "wide.onnx", width="width")
    with pytest.raises(ModelError, match=r"wide.onnx: input 'a': expected only the batch, .*\[-1, -1\]"):
        build_engine(wide, plan)


# What is written


def test_the_sidecar_says_what_the_plan_is(trt: Any, graph: Path, plan: Path) -> None:
    card = build_engine(graph, plan)
    assert leftovers(plan.parent) == ["sum.plan", "sum.plan.json"]
    assert load_plan(plan) == (card, plan.read_bytes()) and read_card(plan) == card
    assert card.onnx_sha256 == onnx_hash(graph) and card.plan_bytes == plan.stat().st_size
    assert (card.tensorrt, card.sm, card.gpu) == (trt.__version__, "9.0", "Stand-in")
    shown = ["a float32 [-1, 4]", "b float32 [-1, 4]", "total float32 [-1]"]
    assert [str(tensor) for tensor in (*card.inputs, *card.outputs)] == shown
    assert card.metadata == {"xcos": '{"fingerprint": "0123456789abcdef"}'}
    stored = json.loads(sidecar(plan).read_text())
    assert stored["profiles"] == [{"min": 1, "opt": 1, "max": 32}] and stored["format"] == 1


def test_a_process_killed_between_plan_and_sidecar_leaves_a_plan_that_is_refused(
    trt: Any, graph: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_engine(graph, plan)
    write = builds.write_atomically

    def killed(path: Any, data: Any) -> None:
        if str(path).endswith(".json"):
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(builds, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        build_engine(graph, plan, profiles=[(1, 1, 4)])
    with pytest.raises(EngineError, match=r"not the plan of its sidecar"):
        load_plan(plan)


@pytest.mark.parametrize("name", ["sum.onnx", "sum", "nowhere/sum.plan"])
def test_files_that_cannot_be_written_are_found_before_any_work(
    trt: Any, graph: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(OutputError):
        build_engine(graph, tmp_path / name)
    assert trt.calls == []


# Failures


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (
            [("reduce", "ReduceSum", "axes must be\nconstant"), ("", "", "no such thing")],
            "node 'reduce' (ReduceSum): axes must be constant; no such thing",
        ),
        ([("n", "Op", "bad")] * 9, "node 'n' (Op): bad; node 'n' (Op): bad; node 'n' (Op): bad; and 6 more"),
    ],
)
def test_parser_errors_name_the_node(trt: Any, graph: Path, plan: Path, errors: Any, message: str) -> None:
    trt.script.parser_errors = errors
    with pytest.raises(ModelError) as caught:
        build_engine(graph, plan)
    assert str(caught.value) == f"{graph}: TensorRT {trt.__version__} cannot take this graph: {message}"
    assert leftovers(plan.parent) == []


def test_a_build_that_gives_nothing_is_explained_by_the_last_errors(trt: Any, graph: Path, plan: Path) -> None:
    card = build_engine(graph, plan)
    trt.script.messages = ["first", "Could not find any implementation", "Could not find any implementation", "a", "b"]
    with pytest.raises(TensorRTError) as caught:
        build_engine(graph, plan, profiles=[(1, 2, 3)])
    assert str(caught.value) == (
        f"{graph}: TensorRT {trt.__version__} could not build an engine: Could not find any implementation; a; b"
    )
    trt.script.messages = []
    with pytest.raises(TensorRTError, match="TensorRT gave no reason"):  # errors of the build before are not this one's
        build_engine(graph, plan)
    assert load_plan(plan)[0] == card, "the older plan is left"


def test_a_builder_that_cannot_start_and_a_refused_profile_are_explained(trt: Any, graph: Path, plan: Path) -> None:
    trt.script.profile_index = -1
    with pytest.raises(TensorRTError, match=r"profiles: TensorRT refuses a batch of 1 to 32"):
        build_engine(graph, plan)
    trt.script.starts = False
    with pytest.raises(TensorRTError, match=r"cannot start: CUDA initialization failure with error: 35"):
        build_engine(graph, plan)


@pytest.mark.parametrize(
    ("profiles", "error", "message"),
    [
        ([(4, 2, 8)], ValueError, "profiles: expected batch sizes 1 <= min <= opt <= max, got (4, 2, 8)"),
        ([(0, 1, 8)], ValueError, "profiles: expected batch sizes 1 <= min <= opt <= max, got (0, 1, 8)"),
        ([(1, 1.5, 8)], ValueError, "profiles: expected batch sizes"),
        ([(1, 1, 2**31)], ValueError, "profiles: expected batch sizes"),
        ([], ValueError, "profiles: expected at least one, got none"),
        ([7], TypeError, "profiles: expected (min, opt, max) each, got [7]"),
    ],
)
def test_arguments_are_checked_before_anything_else(
    graph: Path, plan: Path, profiles: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        build_engine(graph, plan, profiles=profiles)
    assert str(caught.value).startswith(message)


def test_damaged_and_missing_graphs_are_refused(trt: Any, graph: Path, plan: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        build_engine(graph.with_name("none.onnx"), plan)
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"sum\.onnx"):
        build_engine(graph, plan)
    assert leftovers(plan.parent) == [] and calls(trt, "build") == []


def test_weights_beside_the_graph_come_along_and_from_nowhere_else(
    trt: Any, graph: Path, tmp_path: Path, plan: Path
) -> None:
    model = onnx.load(graph)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.float32), "scale"))
    options: dict[str, Any] = {"location": "weights.bin", "size_threshold": 0, "convert_attribute": False}
    onnx.save_model(model, str(graph), save_as_external_data=True, **options)
    build_engine(graph, plan)
    assert calls(trt, "parse")[0][0] < graph.stat().st_size + 100  # within the graph now, no longer by name
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert onnx_hash(graph) != read_card(plan).onnx_sha256, "the hash covers the weights"
    weights.unlink()
    with pytest.raises(ModelError, match="external data is missing"):
        build_engine(graph, plan)


# Package and GPU


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


def test_a_missing_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        TensorRTError, match=r"^device: a TensorRT engine needs an NVIDIA GPU, and torch \S+ sees none$"
    ):
        find_gpu("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(TensorRTError, match=r"device: expected one of 2 GPUs, got cuda:2"):
        find_gpu("cuda:2")
    for device in ("cpu", "gpu 1"):
        with pytest.raises(ValueError, match="device: expected cuda or cuda:N, got"):
            find_gpu(device)


# Progress and its end


def test_progress_is_told_and_ends_complete(trt: Any, graph: Path, plan: Path) -> None:
    told: list[tuple[int, int]] = []
    build_engine(graph, plan, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 100) for done in (0, 16, 33, 50, 66, 83, 100)]


def test_phases_within_phases_add_up_and_never_fall(trt: Any) -> None:
    seen: list[int] = []
    monitor = builds._Steps(lambda done, total: seen.append(done)).monitor(trt)
    for event, *arguments in (
        ("phase_start", "build", None, 4),
        ("step_complete", "build", 0),
        ("phase_start", "inner", "build", 2),
        ("step_complete", "inner", 0),
        ("phase_finish", "inner"),
        ("step_complete", "unknown", 3),
        ("phase_finish", "unknown"),
    ):
        getattr(monitor, event)(*arguments)
    assert seen == [0, 25, 37]


def test_a_failing_progress_callback_ends_the_build_and_leaves_nothing(trt: Any, graph: Path, plan: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise OSError("the terminal has gone")

    trt.script.until_cancelled = True
    with pytest.raises(OSError, match="the terminal has gone"):
        build_engine(graph, plan, progress=progress)
    assert calls(trt, "stopped") == [()]
    assert leftovers(plan.parent) == []


@pytest.mark.parametrize("told", [True, False])  # whether somebody is told of the progress
def test_ctrl_c_ends_the_build_and_leaves_nothing(trt: Any, graph: Path, plan: Path, told: bool) -> None:
    # A process that was started in the background may ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    trt.script.until_cancelled = True
    steps = itertools.count()
    trt.script.on_step = lambda: os.kill(os.getpid(), signal.SIGINT) if next(steps) == 1000 else None
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(graph, plan, progress=(lambda done, total: None) if told else None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls(trt, "stopped") == [()]
    assert leftovers(plan.parent) == []


def test_a_build_works_outside_the_main_thread(trt: Any, graph: Path, plan: Path) -> None:
    thread = threading.Thread(target=build_engine, args=(graph, plan))
    thread.start()
    thread.join(20)
    assert load_plan(plan)[0].tensorrt == trt.__version__


# The folder of plans


@pytest.mark.parametrize("change", ["nothing", "graph", "profiles", "tf32", "sm", "gpu", "tensorrt"])
def test_an_engine_is_built_once_and_a_change_of_anything_builds_another(
    trt: Any, graph: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plans" / "deep"
    monkeypatch.chdir(tmp_path)
    first = cached_engine(graph, "plans/deep")
    assert first.parent == folder  # also after os.chdir
    assert first.name.startswith("sum-") and load_plan(first)[0].onnx_sha256 == onnx_hash(graph)
    options: dict[str, Any] = {"profiles": {"profiles": [(1, 1, 2)]}, "tf32": {"tf32": True}}.get(change, {})
    if change == "graph":
        sum_graph(graph, width=5)
    elif change in ("sm", "gpu"):
        trt.gpu = trt.gpu._replace(**{"sm" if change == "sm" else "name": "8.0"})
    elif change == "tensorrt":
        trt.__version__ += "1"
    second = cached_engine(graph, folder, **options)
    assert (second == first) == (change == "nothing")
    assert len(calls(trt, "build")) == (1 if change == "nothing" else 2)
    assert load_plan(first) and load_plan(second)


@pytest.mark.parametrize("damage", ["plan", "cut", "sidecar", "no sidecar", "another's sidecar"])
def test_a_cached_engine_that_does_not_fit_is_built_again(trt: Any, graph: Path, tmp_path: Path, damage: str) -> None:
    plan = cached_engine(graph, tmp_path)
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
    assert cached_engine(graph, tmp_path) == plan
    assert len(calls(trt, "build")) == 2 and load_plan(plan)[1] == data


def test_threads_that_want_the_same_engine_build_it_once(trt: Any, graph: Path, tmp_path: Path) -> None:
    trt.script.on_step = lambda: time.sleep(0.02)
    threads = [threading.Thread(target=cached_engine, args=(graph, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(calls(trt, "build")) == 1


def test_a_folder_that_cannot_be_made_is_refused(trt: Any, graph: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/plans/sum-\w+.plan: cannot be written"):
        cached_engine(graph, tmp_path / "file" / "plans")


# The graphs that we export

#: What TensorRT's ONNX parser lists as supported for the types used (docs/operators.md of onnx-tensorrt, 10.x), of what
#: our exporter writes.
SUPPORTED = {
    *("Add", "Cast", "Clip", "Concat", "Conv", "Div", "Equal", "Gather", "IsInf", "Log"),
    *("MatMul", "Max", "Mul", "Neg", "PRelu", "ReduceSum", "Relu", "Reshape", "Slice"),
    *("Softmax", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
}


@pytest.mark.thorough
def test_the_shipped_models_graph_is_made_of_what_tensorrts_parser_takes(
    trt: Any, tmp_path_factory: pytest.TempPathFactory, plan: Path
) -> None:
    graph = tmp_path_factory.getbasetemp() / "shipped-pair.onnx"
    if not graph.exists():  # once for both versions
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


# The command


def export(graph: Path, plan: Path, *arguments: str) -> Result:
    return CliRunner().invoke(xcos, ["export", "tensorrt", str(graph), "--out", str(plan), *arguments])


def test_the_command_builds_a_plan_and_describes_it(trt: Any, graph: Path, plan: Path) -> None:
    done = export(graph, plan, "--batch", "1:4:16", "--batch", "32", "--tf32")
    assert done.exit_code == 0, done.output
    assert "batch     1 to 16 (chosen for 4), 32" in done.stdout and "options   tf32" in done.stdout
    assert "input     a float32 [-1, 4]" in done.stdout and f"TensorRT  {trt.__version__}" in done.stdout
    done = export(graph, plan, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["profiles"] == [{"min": 1, "opt": 1, "max": 32}] and not shown["tf32"]
    assert shown["sha256"] == read_card(plan).sha256 and "metadata" not in shown


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("4:2:8", "xcos: --batch: expected batch sizes 1 <= min <= opt <= max, got (4, 2, 8)"),
        ("1:2", "xcos: --batch: expected MIN:OPT:MAX or one batch size, got '1:2'"),
        ("-1", "xcos: --batch: expected MIN:OPT:MAX or one batch size, got '-1'"),
        ("9" * 5000, "xcos: --batch: expected MIN:OPT:MAX"),
    ],
)
def test_bad_options_are_one_line(trt: Any, graph: Path, plan: Path, batch: str, message: str) -> None:
    done = export(graph, plan, "--batch", batch)
    assert done.exit_code == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_a_failed_build_is_one_line(trt: Any, graph: Path, plan: Path) -> None:
    trt.script.messages = ["Could not find any implementation for node add"]
    done = export(graph, plan)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "could not build an engine: Could not find any implementation for node add" in done.stderr
    assert not plan.exists()


def test_without_the_package_one_line_says_how_to_install_it(
    graph: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    done = export(graph, plan)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("xcos: a TensorRT engine needs tensorrt")
    assert "pip install 'xcos_ext[tensorrt]'" in done.stderr
