"""Builds the emulator's driver: the CUDA sources of this repository, compiled by the host compiler.

Run by hand it prints the driver's path: ``D=$(python tests/cuda_emulator/build.py) && $D list``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent
SOURCES = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu")) + sorted(EMULATOR.glob("*.cpp"))
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


class Unavailable(RuntimeError):
    """The emulator cannot be built on this machine; the message says why."""


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{done.stderr[-8000:]}")


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
        _run([compiler, *SANITIZERS, str(source), "-o", str(probe)])
        _run([str(probe)])
    except RuntimeError as error:
        raise Unavailable(f"{compiler} has no working sanitizers: {error}") from None
    finally:
        source.unlink()
        probe.unlink(missing_ok=True)
    return compiler


def build_driver() -> Path:
    """Builds the driver, or finds the one already built from the same sources, flags and compiler."""
    compiler = find_compiler()
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest.update("\n".join([compiler, version, *FLAGS]).encode())
    inputs = [
        path for folder in ("csrc/core", "csrc/cuda") for path in (REPOSITORY / folder).rglob("*") if path.is_file()
    ]
    inputs += [path for path in EMULATOR.rglob("*") if path.suffix in (".h", ".cpp")]
    for path in sorted(inputs):
        digest.update(str(path.relative_to(REPOSITORY)).encode())
        digest.update(path.read_bytes())
    folder = REPOSITORY / "build" / "cuda_emulator" / digest.hexdigest()[:16]
    driver = folder / "driver"
    if driver.is_file():
        return driver
    for old in folder.parent.glob("*/driver"):
        shutil.rmtree(old.parent, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    # A folder of one's own until the driver is whole: test processes may build side by side.
    with tempfile.TemporaryDirectory(dir=folder) as own, ThreadPoolExecutor(max_workers=2) as pool:

        def compile_one(source: Path) -> str:
            target = Path(own) / f"{source.name}.o"
            _run([compiler, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(target)])
            return str(target)

        objects = list(pool.map(compile_one, sorted(SOURCES, key=lambda path: -path.stat().st_size)))
        fresh = Path(own) / "driver"
        _run([compiler, *SANITIZERS, *objects, "-o", str(fresh)])
        os.replace(fresh, driver)
    return driver


if __name__ == "__main__":
    try:
        print(build_driver())
    except Unavailable as reason:
        sys.exit(str(reason))
