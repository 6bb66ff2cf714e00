"""The emulator's cases as a program for a GPU: it builds, lists what it should, and is run as its wrapper promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cached_build import Unavailable
from cuda_native import run as wrapper
from cuda_native.build import build_native
from test_cuda_emulator import GROUPS

pytestmark = pytest.mark.process

NATIVE_ONLY = ["capture", "matrix_many", "threads", "very_many"]


@pytest.fixture(scope="module")
def program() -> Path:
    start = time.monotonic()
    try:
        built = build_native()
    except Unavailable as reason:
        pytest.skip(str(reason))
    print(f"\n{built}: {built.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s")
    return built


def test_every_group_is_there_and_faults_for_every_tool(program: Path) -> None:
    names = subprocess.run([str(program), "list"], capture_output=True, text=True, check=True).stdout.split("\n")
    assert [name for name in names if name and not name.startswith("planted ")] == sorted(GROUPS + NATIVE_ONLY)
    assert set(wrapper.PLANTED) == {"plain", "memcheck", "racecheck", "synccheck"}
    for faults in wrapper.PLANTED.values():
        assert {f"planted {fault}" for fault in faults} <= set(names)


def test_needs_no_toolkit_at_run_time(program: Path) -> None:
    libraries = subprocess.run(["ldd", str(program)], capture_output=True, text=True).stdout
    assert "cudart" not in libraries


def test_says_so_without_a_gpu(program: Path) -> None:
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([str(program), "tuned"], capture_output=True, text=True, env=environment)
    assert done.returncode == 77
    assert done.stderr.startswith("no GPU: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_the_hosts_part_runs_without_a_gpu(program: Path) -> None:
    """Kernels are left out: results are wrong, but drawing problems, references and hooks work."""
    done = subprocess.run([str(program), "matrix_mma", "--dry", "--short"], capture_output=True, text=True)
    assert done.returncode == 1 and "matrix_mma: " in done.stdout, done.stderr[-2000:]
    done = subprocess.run([str(program), "matrix_reference", "--dry"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.cuda
def test_kernels_agree_with_float64_on_a_gpu(program: Path, tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    built = program if (major, minor) == (9, 0) else build_native((10 * major + minor,))
    command = [sys.executable, wrapper.__file__, str(built), "--deadline", "300", "--out", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# ------------------------------------------------------------------------------------------- the wrapper

FAKE = """\
#!{python}
import os, sys, time
if sys.argv[1] == "list":
    print("fine", "crash", "hang", "wrong", "planted global-overflow", sep="\\n")
elif sys.argv[1] == "planted":
    sys.exit(9)
elif sys.argv[1] == "fine":
    print("kernel one")
    print("fine: 12 cases, 0 failures, 0.10 s")
elif sys.argv[1] == "hang":
    print("hanging", flush=True)
    if os.fork() == 0:
        time.sleep(60)
    time.sleep(60)
elif sys.argv[1] == "crash":
    os.kill(os.getpid(), 11)
elif sys.argv[1] == "wrong":
    print("FAILED: one is 2, expected 1", file=sys.stderr)
    print("wrong: 3 cases, 1 failures, 0.10 s")
    sys.exit(1)
elif sys.argv[1] == "skip":
    print("no GPU: none is visible", file=sys.stderr)
    sys.exit(77)
"""

# A sanitizer that finds what is planted ({finds}) and runs the program.
FAKE_SANITIZER = """\
#!{python}
import os, sys
program = sys.argv[sys.argv.index("no") + 1 :]
if program[1] == "planted":
    print("========= planted", program[2])
    sys.exit(9 if {finds} else 0)
os.execv(program[0], program)
"""


def script(folder: Path, name: str, text: str, **values: object) -> Path:
    path = folder / name
    path.write_text(text.format(python=sys.executable, **values))
    path.chmod(0o755)
    return path


def run(program: Path, out: Path, *arguments: str) -> tuple[int, dict[str, dict], str]:
    command = [sys.executable, wrapper.__file__, str(program), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    return done.returncode, {result["group"]: result for result in results}, done.stdout + done.stderr


def test_each_group_ends_in_a_line(tmp_path: Path) -> None:
    fake, out = script(tmp_path, "fake", FAKE), tmp_path / "out.jsonl"
    start = time.monotonic()
    status, results, text = run(fake, out, "--deadline", "3", "--jobs", "4")
    assert time.monotonic() - start < 15
    assert status == 1
    assert {name: result["status"] for name, result in results.items()} == {
        "planted global-overflow": "ok",
        "fine": "ok",
        "crash": "failed",
        "hang": "timeout",
        "wrong": "failed",
    }
    assert results["fine"]["cases"] == 12 and results["fine"]["kernels"] == ["one"]
    assert "signal 11" in results["crash"]["message"]
    assert "expected 1" in results["wrong"]["message"] and results["wrong"]["cases"] == 3
    assert results["hang"]["message"] == "hanging"
    assert all(result["stage"] == "plain" for result in results.values())
    assert "1 timeout" in text and "1 kernels were launched" in text


def test_what_the_deadline_leaves_out_is_said(tmp_path: Path) -> None:
    fake, out = script(tmp_path, "fake", FAKE), tmp_path / "out.jsonl"
    status, results, _ = run(fake, out, "--deadline", "2", "--jobs", "1", "--groups", "hang", "fine")
    assert status == 1
    assert [results["hang"]["status"], results["fine"]["status"]] == ["timeout", "not run"]


def test_results_are_there_before_the_end(tmp_path: Path) -> None:
    fake, out = script(tmp_path, "fake", FAKE), tmp_path / "out.jsonl"
    command = [sys.executable, wrapper.__file__, str(fake), "--out", str(out), "--deadline", "8", "--jobs", "2"]
    process = subprocess.Popen([*command, "--groups", "hang", "fine"], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and '"fine"' in out.read_text()):
        time.sleep(0.05)
    assert process.poll() is None, "only written at the end"
    assert process.wait(timeout=30) == 1


def test_only_what_ran_is_ok(tmp_path: Path) -> None:
    fake, out = script(tmp_path, "fake", FAKE), tmp_path / "out.jsonl"
    assert run(fake, out, "--groups", "fine")[0] == 0
    status, results, _ = run(fake, out, "--groups", "skip")
    assert (status, results["skip"]["status"]) == (1, "skipped")
    assert set(results) == {"planted global-overflow", "fine", "skip"}  # appended


@pytest.mark.parametrize("finds", [True, False])
def test_a_tool_has_to_find_what_is_planted(tmp_path: Path, finds: bool) -> None:
    fake, out = script(tmp_path, "fake", FAKE), tmp_path / "out.jsonl"
    sanitizer = script(tmp_path, "sanitizer", FAKE_SANITIZER, finds=finds)
    status, results, _ = run(
        fake, out, "--tool", "memcheck", "--short", "--sanitizer", str(sanitizer), "--groups", "fine"
    )
    assert status == (0 if finds else 1)
    assert results["planted global-overflow"]["status"] == ("ok" if finds else "failed")
    assert results["fine"]["status"] == "ok" and results["fine"]["stage"] == "memcheck short"
