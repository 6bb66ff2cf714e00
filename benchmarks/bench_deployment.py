"""The shipped model from photographs to a score, in every runtime: the run that README's figures come from.

    python benchmarks/bench_deployment.py                    one thread: results/bench/cpu.json, docs/images/bench.png
    python benchmarks/bench_deployment.py --device cuda --out benchmarks/results/bench/GPU.json

The measuring is that of ``xcos bench``; the same cases run under pytest-benchmark (test_benchmarks.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xcos_ext.bench import Key, Settings, Workload
from xcos_ext.bench.cases import plan
from xcos_ext.bench.runtimes import make_ready
from xcos_ext.cli.app import xcos

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "bench"
PICTURE = ROOT / "docs" / "images" / "bench.png"
BATCHES = {"cpu": (1, 4, 16, 64), "cuda": (1, 16, 64, 256)}
DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}


def keys(device: str, batches: tuple[int, ...] = (1, 16), dtypes: tuple[str, ...] = ("fp32",)) -> list[Key]:
    """The cases of a device."""
    groups = plan(Settings(devices=(device,), batches=batches, dtypes=dtypes))
    return [key for group in groups.values() for key in group]


def step(key: Key, workload: Workload) -> Callable[[], Any]:
    """What one call of a case does, its work included that goes on behind the host's back.

    Raises:
        Exception: the case cannot be run here; the message says why.
    """
    ready = make_ready(key, workload)
    if not ready.on_device:
        return ready.call

    def call() -> None:
        ready.call()
        torch.cuda.synchronize()

    return call


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="a case")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/bench/DEVICE.json")
    parser.add_argument("--plot", type=Path, help="default: docs/images/bench.png, on a CPU")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    plot = options.plot or (PICTURE if options.device == "cpu" and options.out is None else None)
    arguments = ["bench", "--device", options.device, "--threads", options.threads, "--seconds", options.seconds]
    arguments += [text for batch in BATCHES[options.device] for text in ("--batch", batch)]
    arguments += [text for dtype in DTYPES[options.device] for text in ("--dtype", dtype)]
    arguments += ["--json", options.out or RESULTS / f"{options.device}.json"]
    arguments += [] if plot is None else ["--plot", plot]
    return int(xcos.main([*map(str, arguments)], standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
