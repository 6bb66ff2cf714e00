"""The kit for a lent GPU, without one: its stages are bounded, write as they go, and never stop each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _paths() -> Iterator[None]:
    folders = [str(BENCHMARKS / "gpu"), str(BENCHMARKS)]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture
def stages() -> ModuleType:
    import stages

    return stages


@pytest.fixture
def kit() -> ModuleType:
    import kit

    return kit


def python(code: str) -> list[str]:
    """A stage of a few lines; `emit` and `time` are there."""
    start = f"import sys, os, time; sys.path.insert(0, {str(BENCHMARKS / 'gpu')!r}); from stages import emit\n"
    return [sys.executable, "-c", start + code]


HANGS = python(
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "emit(case='before', status='ok'); print('about to hang')\n"
    "if os.fork() == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "open(sys.argv[1] if len(sys.argv) > 1 else os.devnull, 'a').write(f'{os.getpid()}\\n'); time.sleep(600)"
)
CRASHES = python("emit(case='before', status='ok'); print('about to crash'); os.abort()")
FINE = python("emit(case='one', status='ok'); print('fine')")


def outside() -> dict[str, str]:
    """The environment, for a pytest of its own: it is no worker of this one's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_stage_that_hangs_and_one_that_crashes_stop_nothing(
    stages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pids = tmp_path / "pids"
    plan = [
        stages.Stage("first", FINE, 20),
        stages.Stage("hangs", [*HANGS, str(pids)], 1.5),
        stages.Stage("crashes", CRASHES, 20),
        stages.Stage("missing", ["/nowhere/to/be/found"], 20),
        stages.Stage("fails", python("emit(case='bad', status='failed', message='why'); sys.exit(3)"), 20),
        stages.Stage("skips", python("sys.exit(77)"), 20),
        stages.Stage("last", FINE, None),
    ]
    begin = time.monotonic()
    status = stages.run(plan, tmp_path, 60)
    assert status == 1
    assert time.monotonic() - begin < 40
    rows = {row["stage"]: row for row in stages.read_lines(tmp_path / "kit.jsonl")}
    assert [row["status"] for row in rows.values()] == ["ok", "timeout", "failed", "failed", "failed", "skipped", "ok"]
    assert rows["crashes"]["code"] == -6 and "about to crash" in rows["crashes"]["tail"]
    assert 1.5 <= rows["hangs"]["seconds"] < 8 and "about to hang" in rows["hangs"]["tail"]
    # What they had found out is kept.
    for name in ("hangs", "crashes"):
        assert stages.read_lines(tmp_path / f"{name}.jsonl") == [{"case": "before", "status": "ok"}]
    # Nobody is left behind, not even who ignores the first signal.
    left = [int(line) for line in pids.read_text().split()]
    assert len(left) == 2
    for _ in range(50):
        if all(map(gone, left)):
            break
        time.sleep(0.1)
    assert all(map(gone, left))
    out = capsys.readouterr().out
    assert "hangs        timeout" in out and "failed: bad: why" in out


def test_the_deadline_is_obeyed(stages: ModuleType, tmp_path: Path) -> None:
    plan = [stages.Stage("greedy", HANGS, 500), stages.Stage("late", FINE, 500), stages.Stage("rest", FINE, None)]
    begin, deadline = time.monotonic(), 14.0
    stages.run(plan, tmp_path, deadline)
    assert time.monotonic() - begin <= deadline
    rows = stages.read_lines(tmp_path / "kit.jsonl")
    assert [row["status"] for row in rows] == ["timeout", "not run", "not run"]


def test_lines_are_there_as_soon_as_they_are_written(stages: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = python("emit(case='now', status='ok'); time.sleep(60)")
    process = subprocess.Popen(command, env={**os.environ, "XCOS_STAGE_OUT": str(out)})
    try:
        for _ in range(200):
            if stages.read_lines(out):
                break
            time.sleep(0.1)
        assert stages.read_lines(out) == [{"case": "now", "status": "ok"}]
    finally:
        process.kill()
        process.wait()
    with open(out, "a") as file:
        file.write('{"case": "cut o')
    assert len(stages.read_lines(out)) == 1


def test_the_kit_fits_its_call(kit: ModuleType, tmp_path: Path) -> None:
    """Eight minutes, of which the tests get the rest; no more files than come back."""
    plan = kit.kit()
    caps = [stage.cap for stage in plan]
    assert caps[-1] is None and sum(caps[:-1]) <= kit.SECONDS["kit"] - 40 and kit.SECONDS["kit"] <= 480
    assert [stage.name for stage in plan] == [
        "env",
        "build",
        "native",
        "smoke",
        "roofline",
        "sanitize",
        "ncu",
        "pytest",
    ]
    assert len({stage.results for stage in plan} | {"kit.jsonl"}) <= 8
    assert kit.SECONDS["tune"] <= 200
    for stage in [*plan, *kit.tune(tmp_path)]:
        for word in stage.command:
            if word.startswith(("benchmarks/", "tests/")):
                assert (REPOSITORY / word).exists(), f"{stage.name}: {word} is not there"


@pytest.mark.parametrize("which", ["kit", "tune"])
def test_dry_run(kit: ModuleType, stages: ModuleType, tmp_path: Path, which: str) -> None:
    """Every stage's command and cap; what needs no GPU runs, and runs well."""
    command = [str(BENCHMARKS / f"gpu_{which}.sh"), str(tmp_path), "--dry-run"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    plan = kit.kit() if which == "kit" else kit.tune(tmp_path)
    for stage in plan:
        cap = "the rest" if stage.cap is None else f"{stage.cap:.0f} s"
        assert f"=== {stage.name} (cap {cap}): {sys.executable}" in done.stdout or stage.name in done.stdout
        assert f"=== {stage.name} (cap {cap}): " in done.stdout
    rows = [row for row in stages.read_lines(tmp_path / f"{which}.jsonl") if "stage" in row]
    assert [row["stage"] for row in rows] == [stage.name for stage in plan]
    assert {row["status"] for row in rows} <= {"ok", "skipped"}
    assert all(row["status"] == "ok" for row, stage in zip(rows, plan, strict=True) if stage.dry is not None)
    if which == "kit":
        cases = [row["case"] for row in stages.read_lines(tmp_path / "smoke.jsonl")]
        assert not any(row["status"] == "failed" for row in stages.read_lines(tmp_path / "smoke.jsonl"))
        assert len(cases) > 60 and any("xcos_matrix backward fp64" in case for case in cases)
        measured = stages.read_lines(tmp_path / "roofline.jsonl")
        assert len(measured) == 21 and all(row["status"] == "ok" for row in measured)
        assert {row["case"] for row in stages.read_lines(tmp_path / "env.jsonl")} >= {"machine", "copy", "gemm float16"}


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if subprocess.run(["sh", "-c", "nvidia-smi"], capture_output=True).returncode == 0:
        pytest.skip("a GPU is here")
    done = subprocess.run(
        [str(BENCHMARKS / "gpu_kit.sh"), str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2 and "no GPU" in done.stderr and not list(tmp_path.iterdir())


def test_only_and_its_error(kit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kit.main(["kit", str(tmp_path), "--dry-run", "--only", "env,rooflin"])
    assert "--only: expected env, build" in capsys.readouterr().err


def test_a_library_takes_the_place_of_a_build_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import building

    checkout = tmp_path / "checkout"
    (checkout / "xcos_ext").mkdir(parents=True)
    (checkout / "setup.py").write_text("import sys; print('no compiler here'); sys.exit(1)")
    monkeypatch.setattr(building, "REPOSITORY", checkout)
    monkeypatch.setattr(building, "LOADS", "import pathlib; assert list(pathlib.Path('xcos_ext').glob('_C*.so'))")
    out = tmp_path / "kit.jsonl"
    monkeypatch.setenv("XCOS_STAGE_OUT", str(out))
    monkeypatch.setattr(sys, "argv", ["building.py", "--only", "extension"])
    assert building.carried() is None and building.main() == 1
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["status"] == "failed" and "no compiler here" in row["message"]
    out.unlink()
    library = checkout / ".kit" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.parent.mkdir()
    library.write_bytes(b"library")
    assert building.main() == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["extension built here", "extension"]
    assert rows[1]["status"] == "ok" and rows[1]["how"] == "built beforehand"
    assert (checkout / "xcos_ext" / library.name).read_bytes() == b"library"
    # A build that is late, and has begun to write its own: its compilers are ended before the stage's time is over.
    late = f"import pathlib, time; pathlib.Path('xcos_ext', {library.name!r}).write_bytes(b'half'); time.sleep(300)"
    (checkout / "setup.py").write_text(late)
    monkeypatch.setenv("XCOS_STAGE_SECONDS", str(building.LAST_S + 2))
    out.unlink()
    begin = time.monotonic()
    assert building.main() == 0 and time.monotonic() - begin < building.LAST_S
    assert (checkout / "xcos_ext" / library.name).read_bytes() == b"library"


def test_failures_of_tests_are_written_as_they_end(stages: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("def test_fine(): pass\ndef test_with_inductor(): assert 1 == 2\n")
    (tmp_path / "test_xcos_score.py").write_text("def test_first(): assert 3 == 4\n")
    out = tmp_path / "pytest.jsonl"
    environment = {**outside(), "XCOS_STAGE_OUT": str(out), "PYTHONPATH": str(BENCHMARKS / "gpu")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "report_lines", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    rows = [row for row in stages.read_lines(out) if row["status"] == "failed"]
    assert ["first" in row["test"] for row in rows] == [True, False]  # operators come first, compilers last
    assert "assert 3 == 4" in rows[0]["message"]
    assert stages.read_lines(out)[-1] == {"test": "all", "status": "count", "counts": {"failed": 2, "ok": 1}, "exit": 1}


def test_a_case_that_breaks_the_device_is_alone(stages: ModuleType, tmp_path: Path) -> None:
    """After an illegal access every call of a process fails: its worker ends, the tests behind it run in another."""
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(
        "import torch\nbroken = []\n"
        "def synchronize():\n    if broken: raise RuntimeError('illegal memory access')\n"
        "torch.cuda.is_available, torch.cuda.synchronize = lambda: True, synchronize\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import conftest, pytest\n"
        "def test_breaks():\n    conftest.broken.append(1); raise RuntimeError('no')\n"
        "@pytest.mark.parametrize('n', range(6))\ndef test_behind(n):\n    assert not conftest.broken\n"
    )
    out = tmp_path / "pytest.jsonl"
    environment = {**outside(), "XCOS_STAGE_OUT": str(out), "PYTHONPATH": str(BENCHMARKS / "gpu")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "report_lines", "-n", "1", "."]
    subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    rows = stages.read_lines(out)
    assert any("for good in this process: no" in row.get("message", "") for row in rows)
    assert rows[-1]["counts"]["ok"] == 6


def test_what_ncu_prints_is_read() -> None:
    import ncu

    text = (
        "==PROF== Profiling\n"
        '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","12","staged_forward","GPU Speed Of Light Throughput","DRAM Throughput","%","91.2"\n'
        '"0","12","staged_forward","Occupancy","Achieved Occupancy","%","48.1"\n'
        '"1","12","matrix_tensor","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","71"\n'
    )
    assert ncu.parse(text) == {
        "0 staged_forward": {"DRAM Throughput": "91.2 %", "Achieved Occupancy": "48.1 %"},
        "1 matrix_tensor": {"Compute (SM) Throughput": "71 %"},
    }
    assert ncu.parse("==ERROR== no counters") == {}


def test_tables_of_whatever_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_table

    monkeypatch.setattr(gpu_table, "RESULTS", tmp_path)
    assert {gpu_table.table(kind) for kind in ("roofline", "stages", "variants")} == {gpu_table.PENDING}
    folder = tmp_path / "nvidia-h100-80gb-hbm3"
    folder.mkdir()
    assert gpu_table.table("roofline") == gpu_table.PENDING

    def write(name: str, *rows: dict[str, object]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"case": "cut o')

    timing = {"median": 1e-3, "low": 0.9e-3, "high": 1.1e-3, "rounds": 9}
    row = {
        "case": "xcos_score/forward/fp32", "status": "ok", "seconds": {"xcos_ext": timing, "copy": timing},
        "speedup": {"copy": timing}, "bandwidth": {"xcos_ext": 2.5e12, "copy": 3e12},
        "bandwidth_share": {"median": 0.83}, "multiply_adds": {}, "pairs": None,
        "targets": [{"text": "share >= 0.85", "bound": 0.85, "reached": 0.83, "met": False}],
    }  # fmt: skip
    write("roofline", row, {"case": "xcos_head/1", "status": "failed", "message": "no kernel image"})
    text = gpu_table.table("roofline")  # without the machine's own line: the run was cut off
    assert "**nvidia-h100-80gb-hbm3**" in text and "2500 GB/s, 0.83 of a copy" in text and "**missed**" in text
    assert "failed: no kernel image" in text
    write(
        "env",
        {"case": "machine", "status": "ok", "gpu": {"name": "NVIDIA H100", "driver_version": "580.1"},
         "packages": {"torch": "2.11.0+cu130"}, "commit": "0123456789abcdef", "date": "2026-12-01T00:00:00Z"},
        {"case": "copy", "status": "ok", "gb_per_s": 3000.0},
        {"case": "gemm float16", "status": "ok", "side": 8192, "tflop_per_s": 790.0},
    )  # fmt: skip
    write("kit", {"case": "extension", "status": "ok"},
          {"stage": "pytest", "file": "pytest.jsonl", "cap": None, "status": "timeout", "seconds": 60.0},
          {"stage": "native", "file": "native.jsonl", "cap": 40, "status": "failed", "seconds": 30.0},
          {"stage": "build", "file": "kit.jsonl", "cap": 90, "status": "ok", "seconds": 9.0})  # fmt: skip
    # As tests/cuda_native/run.py writes them.
    groups = (("tuned", "ok"), ("topk", "failed"))
    write("native", *({"stage": "plain", "group": group, "status": status} for group, status in groups))
    write(
        "pytest",
        {"test": "a", "status": "failed"},
        {"test": "so far", "status": "count", "counts": {"failed": 1, "ok": 7}},
    )
    text = gpu_table.table("stages")
    assert "**NVIDIA H100**, driver 580.1, torch 2.11.0+cu130, commit `0123456789`, 2026-12-01." in text
    assert "a copy moves 3.00 TB/s" in text and "float16 products of 8192² matrices 790 TFLOP/s" in text
    assert "| pytest | timeout | 60 | 1 failed, 7 ok |" in text and "| build | ok | 9 | 1 ok |" in text
    assert "| native | failed | 30 | 1 failed, 1 ok |" in text
    write("variants", {"case": "x", "variant": "4 warps", "status": "ok", "probes": 256, "gallery": 1_000_000,
                       "type": "f16", "pairs_per_s": 5e9, "registers": [214, 247], "spill_bytes": [0],
                       **timing})  # fmt: skip
    assert "| 256 x 1,000,000 f16 | 4 warps | 1 ms (900 µs – 1.1 ms) | 5e+09 | 247, 0 |" in gpu_table.table("variants")
