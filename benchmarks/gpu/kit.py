"""The two calls for a machine with an NVIDIA GPU that is lent for minutes: what runs, in which order, for how long.

    benchmarks/gpu_kit.sh [FOLDER] [--dry-run]      is it right, how fast, how far from the limits: at most 480 s
    benchmarks/gpu_tune.sh [FOLDER] [--dry-run]     variants beside each other, deployment: at most 200 s

FOLDER (default: benchmarks/results/gpu/NAME of the GPU) gets a JSON-lines file a stage, written as it goes; for the kit
eight files. ``render.py`` draws README's tables from whatever is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stages import Stage, gpu_facts, run

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SECONDS = {"kit": 480.0, "tune": 200.0}


def paths(*first: Path) -> str:
    """PYTHONPATH with some folders before what it has."""
    return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def tests_of_gpus() -> list[str]:
    """Files with tests that want a GPU: every worker collects them all. The native driver has a stage of its own."""
    files = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    wanted = [file for file in files if re.search(r"mark\.(cuda|tensorrt)|\bdevice\b", file.read_text())]
    return [
        str(file.relative_to(REPOSITORY))
        for file in wanted
        if file.name not in ("test_cuda_native.py", "test_gpu_kit.py")
    ]


def kit() -> list[Stage]:
    """Right first, then fast; what is most worth having comes first."""
    python, workers = sys.executable, ["-n", "12"] if _has("xdist") else []
    pytest = [
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "report_lines",
        "--continue-on-collection-errors", "-m", "cuda or tensorrt" if _has("tensorrt") else "cuda and not tensorrt",
        *tests_of_gpus(),
    ]  # fmt: skip
    build, native = [python, "benchmarks/gpu/building.py"], [python, "benchmarks/gpu/native.py"]
    return [
        # The first import of torch from a cold disk may take most of it.
        Stage("env", [python, "benchmarks/gpu/env.py"], 25, [python, "benchmarks/gpu/env.py", "--device", "cpu"]),
        # No more than eight files come back: the build's few lines stand beside those of the kit itself.
        Stage("build", build, 85, [*build, "--dry-run"], file="kit"),
        Stage("native", native, 35),
        Stage(
            "smoke", [python, "benchmarks/gpu/smoke.py"], 55, [python, "benchmarks/gpu/smoke.py", "--device", "cpu"],
        ),
        Stage(
            "roofline", [python, "benchmarks/gpu/roofline.py"], 90,
            [python, "benchmarks/gpu/roofline.py", "--device", "cpu", "--small", "--budget", "0.01"],
        ),
        Stage("sanitize", [*native, "--tools", "memcheck,racecheck,synccheck"], 100),
        Stage("ncu", [python, "benchmarks/gpu/ncu.py"], 50),
        Stage(
            "pytest", [*pytest, *workers], None, [*pytest, "--collect-only"],
            # A process a core: threads of twelve processes would wait for each other.
            {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": paths(HERE, REPOSITORY)},
        ),
    ]  # fmt: skip


def tune(folder: Path) -> list[Stage]:
    """Variants of the learned kernel, built beforehand where prepare.sh was run; then the model in its runtimes."""
    python = sys.executable
    variants = [python, "benchmarks/gpu/variants.py"]
    bench = [python, "-m", "xcos_ext", "bench", "--stage", "pair", "--stage", "head", "--runtime", "eager"]
    return [
        Stage("variants", [*variants, "run", ".kit/variants"], 80, [*variants, "list"]),
        Stage("variants-ncu", [*variants, "ncu", ".kit/variants"], 40),
        Stage(
            "deployment",
            [*bench, "--runtime", "compiled", "--runtime", "graph", "--device", "cuda", "--batch", "1", "--batch", "64",
             "--dtype", "fp16", "--seconds", "0.5", "--json", str(folder / "deployment.json")],
            None,
            [*bench, "--device", "cpu", "--batch", "1", "--seconds", "0.05", "--json", str(folder / "deployment.json")],
        ),
    ]  # fmt: skip


def gpu_name() -> str | None:
    """As a file's name; None where no GPU answers."""
    return re.sub(r"[^a-z0-9]+", "-", "".join(gpu_facts("name")).lower()).strip("-") or None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=tuple(SECONDS))
    parser.add_argument("folder", nargs="?", type=Path, help="for the results")
    parser.add_argument("--dry-run", action="store_true", help="every stage's command and cap; run what needs no GPU")
    parser.add_argument("--seconds", type=float, help="for all stages together")
    parser.add_argument("--only", help="stages, with commas between")
    options = parser.parse_args(arguments)
    name = gpu_name()
    # A driver that answers late is no reason to stop where a folder was given.
    if name is None and not options.dry_run and not (options.folder and Path("/dev/nvidia0").exists()):
        print("gpu_kit: nvidia-smi shows no GPU here; --dry-run tries what needs none", file=sys.stderr)
        return 2
    if options.folder is None and options.dry_run:
        parser.error("--dry-run: expected a folder for the results, got none")
    folder = (options.folder or REPOSITORY / "benchmarks" / "results" / "gpu" / str(name)).resolve()
    stages = kit() if options.which == "kit" else tune(folder)
    if options.only:
        wanted = options.only.split(",")
        unknown = set(wanted) - {stage.name for stage in stages}
        if unknown:
            parser.error(
                f"--only: expected {', '.join(stage.name for stage in stages)}, got {', '.join(sorted(unknown))}"
            )
        stages = [stage for stage in stages if stage.name in wanted]
    os.chdir(REPOSITORY)
    os.environ["PYTHONPATH"] = paths(REPOSITORY)
    os.environ.setdefault("XCOS_COMMIT", commit())
    return run(stages, folder, options.seconds or SECONDS[options.which], dry=options.dry_run, name=options.which)


def commit() -> str:
    """Of the checkout; a copy without one is told it in XCOS_COMMIT."""
    try:
        done = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git either
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
