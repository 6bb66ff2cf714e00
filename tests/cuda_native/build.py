"""Builds the emulator's driver and the kernels for a real GPU. Needs nvcc and Python's standard library.

``P=$(python tests/cuda_native/build.py) && $P list``; ``--times`` says on stderr what each file took.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from cached_build import KERNELS, REPOSITORY, Unavailable, cached_build
from cubin_gate import find_nvcc, supported

NATIVE = Path(__file__).resolve().parent
EMULATOR = NATIVE.parent / "cuda_emulator"
# Of these the kernels are compiled too, and for the device.
WITH_KERNELS = ("limits.cpp", "planted.cpp")
HOOKED = (
    "cudaLaunchKernel",
    "cudaFuncSetAttribute",
    "cudaFuncGetAttributes",
    "cudaDeviceGetAttribute",
    "cudaGetDevice",
    "cudaMalloc",
    "cudaFree",
    "cudaMemcpy",
)
INCLUDES = [f"-I{REPOSITORY / 'csrc'}", f"-I{EMULATOR}", f"-I{NATIVE}"]
# As cmake/cuda.cmake has it; line numbers are for sanitizers and profilers and change no code.
DEVICE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-DXCOS_CUDA_MAX_GRID=machine::max_grid",
    "-include",  # declares it
    str(EMULATOR / "machine.h"),
    *INCLUDES,
]
HOST_FLAGS = ["-std=c++17", "-O2", "-Xcompiler=-Wall,-Wextra", *INCLUDES]


def build_native(
    architectures: tuple[int, ...] = (90,), jobs: int | None = None, out: Path | None = None, times: bool = False
) -> Path:
    """Builds the program, or finds the one already built from the same sources, flags and compiler."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise Unavailable("nvcc not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)")
    lacking = set(architectures) - set(supported(nvcc, architectures))
    if lacking:
        raise Unavailable(f"{nvcc} does not compile for {sorted(lacking)}")
    code = [word for arch in architectures for word in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    device = [nvcc, *DEVICE_FLAGS, *code]
    commands = {source: device for source in KERNELS.glob("*.cu")}
    for source in [*EMULATOR.glob("*.cpp"), *NATIVE.glob("*.cpp")]:
        if source.name == "emulator.cpp":
            continue
        commands[source] = [*device, "-x", "cu"] if source.name in WITH_KERNELS else [nvcc, *HOST_FLAGS]
    wraps = [word for name in HOOKED for word in ("-Xlinker", f"--wrap={name}")]
    return cached_build(
        (out or REPOSITORY / "build" / "cuda_native") / "native",
        commands,
        [nvcc, "-cudart", "static", *wraps],
        subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout,
        (REPOSITORY / "csrc" / "core", KERNELS, EMULATOR, NATIVE),
        jobs or os.cpu_count() or 1,
        lambda name, seconds: print(f"{seconds:6.1f} s  {name}", file=sys.stderr) if times else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", default="90", help="compute capabilities, as 80,90 (default: 90)")
    parser.add_argument("--jobs", type=int, help="files compiled at a time (default: one a core)")
    parser.add_argument("--out", type=Path, help="folder to build in (default: build/cuda_native)")
    parser.add_argument("--times", action="store_true", help="say what each file took")
    arguments = parser.parse_args()
    try:
        architectures = tuple(int(word) for word in arguments.architectures.split(","))
        print(build_native(architectures, arguments.jobs, arguments.out, arguments.times))
    except Unavailable as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
