"""Runs of ``xcos bench``: which cases, which runtimes, what is said of those that are missing, and the command line."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from commands import strict
from drawn import TwoFaces
from explained import toy

from xcos_ext.bench import RUNTIMES, STAGES, Key, Settings, Workload, default_picture, read_report, run
from xcos_ext.bench.cases import DEVICES, DTYPES, plan
from xcos_ext.bench.runtimes import Ready, Unavailable, make_ready
from xcos_ext.bench.workload import once
from xcos_ext.cli.app import xcos
from xcos_ext.cli.bench import run as command
from xcos_ext.ops import XCosScore

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"seconds": 0.02, "gallery": 50, "batches": (1, 2)}
TORCH = ("eager", "for_inference")


@pytest.fixture
def workload() -> Any:
    with Workload(toy("symmetric"), gallery=50) as made:
        yield made


def reasons(report: Any) -> dict[str, str]:
    return {skipped.key.runtime: skipped.reason for skipped in report.skipped}


# --- cases


def test_a_plan_measures_together_what_is_held_against_each_other():
    found = plan(Settings(batches=(4, 1, 4), runtimes=("eager", "onnxruntime"), dtypes=("fp32", "bf16")))
    assert list(found) == [
        ("pictures", "cpu", 1),
        ("model", "cpu", 1),
        ("model", "cpu", 4),
        ("search", "cpu", 1),
        ("search", "cpu", 4),
    ]
    model = found["model", "cpu", 4]
    assert len(model) == len(set(model)) == 2 * 2 * 3 + 2  # backbone, head, pair; the projection in eager only
    assert {key.dtype for key in found["pictures", "cpu", 1]} == {"uint8"}


def test_stages_of_pictures_stay_on_the_cpu():
    devices = {key.device for group in plan(Settings(devices=("cuda",))).values() for key in group}
    assert devices == {"cpu", "cuda"}
    assert {key.stage for key in plan(Settings(devices=("cuda",)))["pictures", "cpu", 1]} == {
        "decode",
        "detect",
        "align",
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stages": ("lunch",)}, "stages: expected some of decode"),
        ({"runtimes": ("native",)}, "runtimes: expected some of eager"),
        ({"devices": ()}, "devices: expected some of cpu, cuda, got none"),
        ({"dtypes": ("int8",)}, "dtypes: expected some of fp32, bf16, fp16, got 'int8'"),
        ({"batches": (0,)}, "batches: expected numbers from 1"),
        ({"batches": ()}, "batches: expected numbers from 1"),
        ({"seconds": float("nan")}, "seconds: expected 0.01 to 3600, got nan"),
        ({"gallery": 0}, "gallery: expected 1 to"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**wrong)


def test_the_command_line_knows_every_stage_runtime_device_and_dtype():
    choices = {p.name: p.type.choices for p in command.params if isinstance(p.type, click.Choice)}
    assert tuple(choices["stages"]) == tuple(STAGES)
    assert tuple(choices["runtimes"]) == RUNTIMES[1:]
    device = next(p for p in command.params if p.name == "devices")
    assert {device.type.convert(name, device, None) for name in DEVICES} == set(DEVICES)
    assert tuple(choices["dtypes"]) == DTYPES
    defaults = {p.name: p.default for p in command.params}
    assert (defaults["seconds"], defaults["gallery"]) == (Settings().seconds, Settings().gallery)


# --- running


@pytest.mark.thorough
def test_every_case_is_measured_or_listed_with_a_reason(workload):
    settings = Settings(**QUICK, runtimes=("eager", "for_inference", "graph", "tensorrt"))
    ticks: list[tuple[int, int]] = []
    report = run(workload, settings, progress=lambda done, total: ticks.append((done, total)))
    everything = {key for group in plan(settings).values() for key in group}
    measured, skipped = {r.key for r in report.results}, {s.key for s in report.skipped}
    assert measured | skipped == everything and not measured & skipped
    assert ticks == sorted(ticks) and ticks[-1] == (len(everything), len(everything))
    assert {s.key.stage for s in report.skipped if s.key.runtime == "native"} == {"decode", "detect", "align"}
    assert reasons(report)["native"].startswith("needs a photograph of a face")
    assert "need a GPU" in reasons(report)["graph"] and "needs a GPU" in reasons(report)["tensorrt"]
    for result in report.results:
        assert result.latency.p50 > 0 and result.throughput > 0 and len(result.rounds) >= 7
        assert result.error is None or result.error < 1e-5
        assert result.clock == "host"
    assert {r.key.stage for r in report.results if r.error is not None} == {"head", "pair"}
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.thorough
def test_pairs_and_heads_share_rounds_so_that_shares_can_be_taken(workload):
    report = run(workload, Settings(**QUICK, stages=("head", "pair", "projection"), runtimes=TORCH))
    assert len(report.shares()) == len(report.shares("projection")) == 4


@pytest.mark.thorough
def test_half_precision_bodies_keep_scores_close(workload):
    report = run(workload, Settings(**QUICK, stages=("pair",), runtimes=TORCH, dtypes=("fp32", "bf16")))
    errors = {(r.key.runtime, r.key.dtype): r.error for r in report.results}
    assert errors["eager", "fp32"] == 0
    assert 0 < errors["eager", "bf16"] < 0.1 and 0 < errors["for_inference", "bf16"] < 0.1
    assert not [warning for warning in report.warnings if "differs" in warning]


@pytest.mark.thorough
def test_cold_caches_are_recorded_and_measured(workload, monkeypatch):
    monkeypatch.setattr("xcos_ext.bench.environment._cache_bytes", lambda: 1 << 20)
    report = run(workload, Settings(**QUICK, stages=("head",), runtimes=("eager",), cold=True))
    assert report.settings["flush_bytes"] == {"cpu": 5 << 18}
    assert all(not result.bursts and result.throughput > 0 for result in report.results)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (lambda: np.array([np.nan]), "expected 1 finite numbers"),
        (lambda: np.zeros(3), "expected 1 finite numbers"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_runtime_with_unusable_scores_is_not_timed(scores, reason, workload, monkeypatch):
    ready = Ready(lambda: None, False, 1, scores=scores)
    monkeypatch.setattr("xcos_ext.bench.measuring.make_ready", lambda *a, **k: ready)
    report = run(workload, Settings(stages=("pair",), runtimes=("eager",), batches=(1,), seconds=0.02))
    assert not report.results and reason in reasons(report)["eager"]


def test_a_runtime_with_wrong_scores_is_warned_about(workload, monkeypatch):
    ready = Ready(lambda: None, False, 1, scores=lambda: torch.full((1,), 5.0))
    monkeypatch.setattr("xcos_ext.bench.measuring.make_ready", lambda *a, **k: ready)
    report = run(workload, Settings(stages=("pair",), runtimes=("eager",), batches=(1,), seconds=0.02))
    assert any("a score differs from the eager fp32 model's by" in warning for warning in report.warnings)


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match="expected evaluation mode"):
        Workload(toy().train())


def test_inputs_do_not_depend_on_the_order_they_are_asked_for():
    with Workload(toy(), seed=3) as first, Workload(toy(), seed=3) as second:
        a = first.images(2, "cpu"), first.images(2, "cpu", 1)
        b = second.images(2, "cpu", 1), second.images(2, "cpu")
        assert torch.equal(a[0], b[1]) and torch.equal(a[1], b[0])
        assert not torch.equal(a[0], a[1])
        assert a[0].min() >= -1 and a[0].max() <= 1


def test_what_cannot_be_made_is_tried_once():
    tries = []

    class Failing(Workload):
        @once
        def graph(self, name: str) -> None:
            tries.append(name)
            raise RuntimeError("no")

    failing = Failing(toy())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            failing.graph("x")
    assert len(tries) == 1


def test_made_files_go_at_the_end():
    with Workload(toy()) as made:
        folder = made.folder
        assert folder.is_dir()
    assert not folder.exists()


# --- runtimes


@pytest.mark.thorough
def test_onnxruntime_measures_backbone_head_and_pair(workload):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    report = run(workload, Settings(**QUICK, stages=("backbone", "head", "pair"), runtimes=("onnxruntime",)))
    assert not report.skipped, report.skipped
    assert {(r.key.stage, r.key.batch) for r in report.results} == {
        (stage, batch) for stage in ("backbone", "head", "pair") for batch in (1, 2)
    }
    assert all(r.error < 1e-4 for r in report.results if r.error is not None)


@pytest.mark.thorough
def test_onnxruntime_in_bfloat16_is_listed_with_its_reason(workload):
    report = run(workload, Settings(**QUICK, stages=("pair",), runtimes=("onnxruntime",), dtypes=("bf16",)))
    assert reasons(report) == {"onnxruntime": "graphs are written in fp32 and fp16"}


@pytest.mark.thorough
@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt", "compiled"])
def test_a_missing_module_is_listed_with_its_reason(runtime, workload, monkeypatch):
    for name in ("onnx", "onnxruntime", "xcos_ext.deploy.compiled"):
        monkeypatch.setitem(sys.modules, name, None)
    report = run(workload, Settings(**QUICK, stages=("pair",), runtimes=(runtime,)))
    assert not report.results
    expected = {"onnxruntime": "onnx", "tensorrt": "TensorRT needs a GPU", "compiled": "xcos_ext.deploy.compiled"}
    assert expected[runtime] in reasons(report)[runtime]


@pytest.mark.thorough
def test_compiled_models_are_made_for_the_cases_shape_and_dtype(workload, monkeypatch):
    made: list[tuple[Any, Any]] = []

    class Compiled:
        chosen = "folded, fp32"

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> XCosScore:
            return workload.model(a, b)

        features = staticmethod(workload.model.features)
        score = staticmethod(workload.model.score)

    def compile_for_inference(model: Any, example: Any, *, dtypes: Any, seconds: float) -> Compiled:
        made.append((tuple(example.shape) if isinstance(example, torch.Tensor) else len(example), dtypes))
        assert seconds > 0
        return Compiled()

    module = types.ModuleType("xcos_ext.deploy.compiled")
    module.compile_for_inference = compile_for_inference
    monkeypatch.setitem(sys.modules, "xcos_ext.deploy.compiled", module)
    settings = Settings(seconds=0.02, batches=(2,), stages=("backbone", "head", "pair"), runtimes=("compiled",))
    report = run(workload, settings)
    assert made == [((2, 3, 112, 112), (torch.float32,)), (2, (torch.float32,))]
    assert {r.key.stage for r in report.results} == {"backbone", "head", "pair"}
    # The head is the model's own, whatever was chosen for the rest.
    assert {r.key.stage: r.detail for r in report.results} == {
        "backbone": "folded, fp32",
        "head": "",
        "pair": "folded, fp32",
    }


def test_a_gpu_that_is_not_there_is_the_reason(workload, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="sees no GPU"):
        make_ready(Key("pair", "eager", "cuda", "fp32", 1), workload)


class Elsewhere:
    """A tensor that is asked to go to a GPU, and stays."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def to(self, device: str) -> torch.Tensor:
        assert device == "cuda"
        return self.value


@pytest.mark.parametrize("tf32", [False, True])
def test_engines_are_built_for_the_very_batch_and_once(tf32, workload, monkeypatch):
    calls: list[tuple[Any, ...]] = []

    class Runner:
        def __init__(self, plan: str, *, device: str) -> None:
            calls.append(("load", Path(plan).name, device))

        def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"score": inputs["images_a"].mean((1, 2, 3))}

    def build_engine(onnx: str, plan: str, **options: Any) -> None:
        calls.append((Path(onnx).name, Path(plan).name, options))

    inputs = {name: Elsewhere(torch.ones(4, 3, 2, 2)) for name in ("images_a", "images_b")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    monkeypatch.setattr("xcos_ext.deploy.build_engine", build_engine, raising=False)
    monkeypatch.setattr("xcos_ext.deploy.TrtRunner", Runner, raising=False)
    monkeypatch.setattr(workload, "graph_file", lambda kind, dtype: f"somewhere/{kind}-{dtype}.onnx")
    monkeypatch.setattr("xcos_ext.bench.runtimes._graph_inputs", lambda key, workload: inputs)
    for _ in range(2):
        ready = make_ready(Key("pair", "tensorrt", "cuda", "fp16", 4), workload)
    options = {"profiles": [(4, 4, 4)], "tf32": tf32, "device": "cuda"}
    assert calls == [("pair-fp16.onnx", "pair-fp16-4.plan", options), ("load", "pair-fp16-4.plan", "cuda")]
    assert ready.on_device and ready.items == 4
    assert ready.scores().tolist() == [1.0] * 4 == ready.call()["score"].tolist()


def test_a_cuda_graph_is_warmed_up_on_a_side_stream_captured_once_and_replayed(workload, monkeypatch):
    log: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            log.append("order")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    def inside(name: str) -> Any:
        @contextlib.contextmanager
        def manager(of: Any) -> Any:
            log.append(name)
            yield
            log.append(f"end of {name}")

        return manager

    output = XCosScore(torch.zeros(2), torch.zeros(2, 7, 7), torch.zeros(2, 7, 7))

    def step() -> XCosScore:
        log.append("step")
        return output

    cuda = {
        "is_available": lambda: True,
        "Stream": Stream,
        "current_stream": Stream,
        "CUDAGraph": Graph,
        "stream": inside("side"),
        "graph": inside("capture"),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Workload, "folded", lambda *a: None)
    monkeypatch.setattr("xcos_ext.bench.runtimes._torch_step", lambda *a: step)
    ready = make_ready(Key("pair", "graph", "cuda", "fp32", 2), workload)
    assert ready.call() is output and ready.scores() is output.score
    assert log == [
        *["order", "side", "step", "step", "step", "end of side", "order"],
        *["capture", "step", "end of capture"],
        *["replay", "replay"],
    ]


@pytest.mark.slow
def test_every_runtime_of_a_cpu_runs_on_the_model_that_is_shipped():
    from xcos_ext.model import load_model

    settings = Settings(seconds=0.1, batches=(1, 2), stages=("backbone", "head", "pair"), dtypes=("fp32", "bf16"))
    with Workload(load_model()) as made:
        report = run(made, settings)
    measured = {(result.key.runtime, result.key.dtype) for result in report.results}
    both = {(name, dtype) for name in ("eager", "for_inference", "compiled") for dtype in ("fp32", "bf16")}
    assert measured == both | {("onnxruntime", "fp32")}
    assert not [warning for warning in report.warnings if "differs" in warning]


@pytest.mark.cuda
def test_every_runtime_runs_on_a_gpu_or_says_why_not():
    settings = Settings(seconds=0.1, batches=(1, 8), devices=("cuda",), dtypes=("fp32", "fp16"), gallery=100)
    with Workload(toy("symmetric"), gallery=100) as made:
        report = run(made, settings)
    measured = {result.key.runtime for result in report.results}
    assert {"eager", "for_inference", "graph", "native"} <= measured
    assert all(result.clock == "cuda events" for result in report.results if result.key.runtime == "graph")
    assert all(result.error < 0.05 for result in report.results if result.error is not None)
    assert report.machine["gpu"]["name"]


@pytest.mark.thorough
def test_a_photograph_is_decoded_searched_and_aligned():
    picture = default_picture()
    if picture is None:
        pytest.skip("no photograph: not run from a checkout")
    with Workload(toy(), picture=picture) as made:
        report = run(made, Settings(stages=("decode", "detect", "align"), seconds=0.05))
    assert {result.key.stage for result in report.results} == {"decode", "detect", "align"}, report.skipped


def test_a_photograph_of_several_faces_is_said(tmp_path, monkeypatch):
    (tmp_path / "two.ppm").write_bytes(b"P6 112 112 255 " + bytes(112 * 112 * 3))
    monkeypatch.setattr("xcos_ext.faces.create_detector", lambda spec: TwoFaces())
    with Workload(toy(), picture=tmp_path / "two.ppm") as made:
        report = run(made, Settings(stages=("align",), runtimes=("eager",), batches=(1,), seconds=0.02))
    assert f"{tmp_path}/two.ppm: 2 faces found, took the most prominent, to align it" in report.warnings


# --- the command line


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network in place of the shipped one."""
    monkeypatch.setattr("xcos_ext.cli.bench.load", lambda path: toy("symmetric", name="small"))


def invoke(*arguments: str | Path) -> Result:
    runner = CliRunner(env={"XCOS_MODEL": None, "XCOS_DEBUG": None})
    return runner.invoke(xcos, ["bench", *map(str, arguments)])


FAST = ("--seconds", "0.02", "--batch", "1", "--runtime", "eager", "--runtime", "for_inference", "--gallery", "50")
MODEL = ("--stage", "backbone", "--stage", "head", "--stage", "pair")


@pytest.mark.usefixtures("network")
def test_bench_prints_tables_and_writes_file_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "run.json", tmp_path / "run.png"
    found = invoke(*FAST, *MODEL, "--runtime", "graph", "--json", file, "--plot", picture)
    assert found.exit_code == 0, found.output
    titles = ("Latency", "p50 of a call (95 %)", "for_inference", "Share of a pair's time", "not measured:")
    for text in (*titles, "CUDA graphs need a GPU", "small ("):
        assert text in found.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = read_report(file)
    assert report.as_dict() == strict(file.read_text())
    assert report.settings["batches"] == [1] and report.machine["threads"] == 1
    assert "\x1b" not in found.output  # plain where it is piped


@pytest.mark.thorough
@pytest.mark.usefixtures("network")
def test_bench_prints_json_and_nothing_else():
    found = invoke(*FAST, "--stage", "head", "--json", "-")
    assert found.exit_code == 0
    data = strict(found.stdout)
    assert data["format"] == "xcos_ext.bench" and [case["stage"] for case in data["cases"]] == ["head", "head"]


@pytest.mark.thorough
@pytest.mark.usefixtures("network")
def test_bench_takes_threads_and_gives_them_back():
    found = invoke(*FAST, "--stage", "head", "--threads", "2", "--json", "-")
    assert strict(found.stdout)["machine"]["threads"] == 2
    assert torch.get_num_threads() == 1


@pytest.mark.thorough
@pytest.mark.usefixtures("network")
def test_bench_compares_a_run_with_an_old_one_and_two_old_ones(tmp_path):
    old = tmp_path / "old.json"
    assert invoke(*FAST, "--stage", "pair", "--json", old).exit_code == 0
    found = invoke(*FAST, "--stage", "pair", "--compare", old)
    assert found.exit_code == 0 and "new / old (99 %)" in found.stdout and "do not count" in found.stdout
    found = invoke(*FAST, "--stage", "pair", "--compare", old, "--json", "-")
    assert strict(found.stdout)["comparison"]["minimum_effect"] == 0.05
    (tmp_path / "both.json").write_text(found.stdout)
    assert len(read_report(tmp_path / "both.json").results) == 2

    data = json.loads(old.read_text())
    for case in data["cases"]:
        case["rounds"] = [[3 * value for value in values] for values in case["rounds"]]
    data["machine"]["processor"] = "\x1b[31mAnother"
    new = tmp_path / "new.json"
    new.write_text(json.dumps(data))
    found = invoke("--compare", old, new, "--minimum", "0.1", "--json", tmp_path / "change.json")
    assert found.exit_code == 0
    assert "the runs are not of the same thing" in found.stderr and found.stderr.count("\n") == 1
    assert "\x1b" not in found.output
    changes = strict((tmp_path / "change.json").read_text())["changes"]
    assert all(change["ratio"]["median"] == pytest.approx(3) for change in changes)


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--stage", "pair", "--runtime", "graph"), "CUDA graphs need a GPU"),
        (
            ("--stage", "decode"),
            "needs a photograph of a face, which the package brings none of: give one by --picture",
        ),
    ],
)
def test_bench_where_nothing_can_be_measured_is_trouble(arguments, why, monkeypatch):
    monkeypatch.setattr("xcos_ext.bench.default_picture", lambda: None)
    found = invoke(*arguments, "--batch", "1", "--seconds", "0.02")
    assert found.exit_code == 2
    assert f"xcos: nothing could be measured: {why}" in found.stderr
    assert not found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stage", "lunch"), "Invalid value for '--stage'"),
        (("--batch", "0"), "Invalid value for '--batch'"),
        (("--seconds", "nan"), "expected a finite number, got nan"),
        (("--minimum", "0.1"), "--minimum: expected --compare with it"),
        (("new.json",), "named by --compare OLD.json, which is missing"),
        (("--compare", "none.json"), "none.json: no such file"),
        (("--json", "run.txt"), "run.txt: expected a file ending in .json"),
        (("--plot", "run.gif"), "run.gif"),
        (("--plot", "/no/such/folder/run.png"), "there is no folder"),
        (("--model", "none.safetensors"), "none.safetensors: no such file"),
        (("--picture", "none.jpg"), "none.jpg: no such file"),
        (("--stage", "head", "--plot", "run.png"), "--plot: expected --stage pair or backbone"),
        (("--detector", "eyes"), "eyes: no such file, and no such name"),
        (("--detector", "none.onnx"), "none.onnx"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = invoke(*arguments)
    assert found.exit_code == 2
    assert message in found.stderr and found.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_graph_is_no_model_to_start_from(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"0")
    found = invoke("--model", tmp_path / "x.onnx")
    assert found.exit_code == 2 and "expected a model in torch" in found.stderr


@pytest.mark.process
def test_help_does_not_import_torch():
    import subprocess

    code = (
        "import sys; from xcos_ext.cli.app import xcos; xcos(['bench', '--help'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
