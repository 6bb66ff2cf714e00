"""Builds the emulator's driver: the CUDA sources of this repository, compiled by the host compiler.

Run by hand it prints the driver's path: ``D=$(python tests/cuda_emulator/build.py) && $D list``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from cached_build import KERNELS, REPOSITORY, Unavailable, cached_build, run

EMULATOR = Path(__file__).resolve().parent
SOURCES = sorted(KERNELS.glob("*.cu")) + sorted(EMULATOR.glob("*.cpp"))
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    *SANITIZERS,
    # Kernels look at shared memory through words of several types, which CUDA allows.
    "-fno-strict-aliasing",
    "-fno-omit-frame-pointer",
    "-DXCOS_CUDA_EMULATOR",
    "-DXCOS_CUDA_MAX_GRID=machine::max_grid",
    "-include",  # declares it
    str(EMULATOR / "machine.h"),
    f"-I{EMULATOR / 'include'}",
    f"-I{EMULATOR}",
    f"-I{REPOSITORY / 'csrc'}",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # unroll
]


def find_compiler() -> str:
    """Path of a host compiler whose programs run under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = shutil.which(os.environ.get("CXX", "").split(" ")[0] or "g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("no C++ compiler (g++, clang++ or $CXX)")
    probe = REPOSITORY / "build" / "cuda_emulator" / f"probe-{os.getpid()}"
    probe.parent.mkdir(parents=True, exist_ok=True)
    source = probe.with_suffix(".cpp")
    source.write_text("int main() { return 0; }\n")
    try:
        run([compiler, *SANITIZERS, str(source), "-o", str(probe)])
        run([str(probe)])
    except RuntimeError as error:
        raise Unavailable(f"{compiler} has no working sanitizers: {error}") from None
    finally:
        source.unlink()
        probe.unlink(missing_ok=True)
    return compiler


def build_driver() -> Path:
    """Builds the driver, or finds the one already built from the same sources, flags and compiler."""
    compiler = find_compiler()
    commands = {source: [compiler, *FLAGS, "-x", "c++"] for source in SOURCES}
    return cached_build(
        REPOSITORY / "build" / "cuda_emulator" / "driver",
        commands,
        [compiler, *SANITIZERS],
        subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout,
        (REPOSITORY / "csrc" / "core", KERNELS, EMULATOR),
    )


if __name__ == "__main__":
    try:
        print(build_driver())
    except Unavailable as reason:
        sys.exit(str(reason))
