"""What machine this is, and its ceilings: a large copy, large products. Needs torch, not xcos_ext.

python benchmarks/gpu/env.py [--device cuda|cpu]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

from stages import emit, gpu_facts

PACKAGES = (
    "torch", "numpy", "safetensors", "pybind11", "cmake", "ninja", "setuptools", "pytest", "pytest-xdist",
    "pytest-timeout", "pytest-benchmark", "hypothesis", "click", "rich", "scikit-learn", "scipy", "matplotlib",
    "opencv-python-headless", "pillow", "onnx", "onnxruntime", "onnxscript", "pylance", "captum", "faiss-cpu",
    "tensorrt", "triton",
)  # fmt: skip
GPU_FACTS = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,pstate,ecc.mode.current"
)


def said(*command: str) -> str:
    """The last line that a tool prints; empty where there is none."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}"
    return (done.stdout or done.stderr).strip().splitlines()[-1] if (done.stdout or done.stderr).strip() else ""


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def timed(call: Callable[[], Any], seconds: float, wait: Callable[[], Any]) -> list[float]:
    """Quartiles of seconds a call, for as long as said."""
    for _ in range(3):
        call()
    wait()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        for _ in range(5):
            call()
        wait()
        samples.append((time.perf_counter() - start) / 5)
    return quantiles(samples, n=4)


def ceilings(device: str, small: bool) -> None:
    """Copy bandwidth, counting bytes read and written, and products of large matrices of random numbers."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    size = (8 << 20) if small else (4 << 30)
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    low, median, high = timed(lambda s=source, t=target: t.copy_(s), 0.5, wait)
    emit(
        case="copy", status="ok", bytes=2 * size, seconds=[low, median, high], gb_per_s=2 * size / median / 1e9,
    )  # fmt: skip
    del source, target
    torch.backends.cuda.matmul.allow_tf32 = False
    side = 256 if small else 8192
    for name in ("float16", "bfloat16", "float32"):
        a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, name)) for _ in range(2))
        low, median, high = timed(lambda a=a, b=b: a @ b, 0.7, wait)
        emit(
            case=f"gemm {name}", status="ok", side=side, seconds=[low, median, high],
            tflop_per_s=2 * side**3 / median / 1e12,
        )  # fmt: skip


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    facts: dict[str, Any] = {
        "commit": os.environ.get("XCOS_COMMIT", ""),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "packages": versions(),
        "tools": {
            "nvcc": said("nvcc", "--version"),
            "g++": said("g++", "-dumpfullversion"),
            "ncu": said("ncu", "--version"),
            "compute-sanitizer": said("compute-sanitizer", "--version"),
        },
        "gpu": dict(zip(GPU_FACTS.split(","), gpu_facts(GPU_FACTS), strict=False)),
    }
    emit(case="machine", status="ok", **facts)
    print(facts)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        emit(case="gpu", status="failed", message=f"torch {torch.__version__} sees no GPU")
        return 1
    ceilings(options.device, options.device == "cpu")
    if options.device == "cuda":
        emit(case="gpu after the products", status="ok", gpu=", ".join(gpu_facts(GPU_FACTS)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
