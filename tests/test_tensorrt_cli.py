"""``xcos export tensorrt``, with fakes of TensorRT and of a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tensorrt_stubs.fakes import HostCuda, fake_tensorrt
from tensorrt_stubs.graphs import sum_graph

from xcos_ext.cli.app import xcos
from xcos_ext.deploy.tensorrt import gpu as gpus
from xcos_ext.deploy.tensorrt.plan import read_card


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = fake_tensorrt(11)
    monkeypatch.setattr(gpus, "CUDA", HostCuda())
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


@pytest.fixture
def graph(tmp_path: Path) -> str:
    return str(sum_graph(tmp_path / "sum.onnx"))


def export(*arguments: str) -> Result:
    return CliRunner().invoke(xcos, ["export", "tensorrt", *arguments])


def test_a_plan_is_built_and_described(trt: Any, graph: str, tmp_path: Path) -> None:
    out = str(tmp_path / "sum.plan")
    done = export(graph, "--out", out, "--batch", "1:4:16", "--batch", "32", "--workspace", "64", "--refit")
    assert done.exit_code == 0, done.output
    assert "batch     1 to 16 (chosen for 4), 32" in done.stdout and "options   refit" in done.stdout
    assert "input     a float32 [-1, 4]" in done.stdout and "TensorRT  11.4.0.106" in done.stdout
    assert read_card(out).workspace == 64 << 20


def test_json_is_the_sidecar_without_the_graphs_notes(trt: Any, graph: str, tmp_path: Path) -> None:
    out = tmp_path / "sum.engine"
    done = export(graph, "--out", str(out), "--version-compatible", "--tf32", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["profiles"] == [{"min": 1, "opt": 1, "max": 32}] and shown["version_compatible"] and shown["tf32"]
    assert shown["plan_sha256"] == read_card(out).plan_sha256 and "metadata" not in shown


def test_a_timing_cache_that_does_not_fit_is_a_note(trt: Any, graph: str, tmp_path: Path) -> None:
    cache = tmp_path / "times.cache"
    cache.write_bytes(b"old")
    trt.script.cache_fits = False
    done = export(graph, "--out", str(tmp_path / "sum.plan"), "--timing-cache", str(cache), "--quiet")
    assert done.exit_code == 0 and done.stdout == ""
    assert done.stderr.startswith("xcos: ") and "made by another TensorRT or GPU" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "4:2:8"], "xcos: --batch: expected batch sizes 1 <= min <= opt <= max, got (4, 2, 8)"),
        (["--batch", "1:2"], "xcos: --batch: expected MIN:OPT:MAX or one batch size, got '1:2'"),
        (["--batch", "-1"], "xcos: --batch: expected MIN:OPT:MAX or one batch size, got '-1'"),
        (["--batch", "9" * 5000], "xcos: --batch: expected MIN:OPT:MAX"),
        (["--timing-cache", "times.txt"], "xcos: times.txt: expected a file ending in .cache, got .txt"),
    ],
)
def test_bad_options_are_one_line(trt: Any, graph: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = export(graph, "--out", str(tmp_path / "sum.plan"), *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_a_failed_build_is_one_line(trt: Any, graph: str, tmp_path: Path) -> None:
    trt.script.messages = ["Could not find any implementation for node add"]
    done = export(graph, "--out", str(tmp_path / "sum.plan"))
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "could not build an engine: Could not find any implementation for node add" in done.stderr
    assert not (tmp_path / "sum.plan").exists()


def test_without_the_package_one_line_says_how_to_install_it(
    graph: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    done = export(graph, "--out", str(tmp_path / "sum.plan"))
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("xcos: a TensorRT engine needs tensorrt")
    assert "pip install 'xcos_ext[tensorrt]'" in done.stderr
