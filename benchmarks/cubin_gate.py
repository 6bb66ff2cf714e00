"""Compiles every CUDA kernel for every supported architecture and checks what the compiler made of it.

A spill, a stack frame or too many registers is invisible in tests and costs bandwidth on a GPU.
Needs nvcc and no GPU::

    python benchmarks/cubin_gate.py                    # all architectures, a table, status 1 on a violation
    python benchmarks/cubin_gate.py -a 90
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
KERNELS = REPOSITORY / "csrc" / "cuda"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

# Registers of one thread, by kernel family. Staged kernels hide latency with 24 warps an SM
# (docs/kernels.md): 65,536 registers / (24 x 32 threads) = 85, in multiples of 8.
# General kernels run two blocks of 256 threads an SM, matrix_plain and matrix_backward too (one in fp64); a block of
# topk_update has 512 threads. match_* have four blocks of 128, head_forward
# has three of 256.
# matrix_tensor fills shared memory with one block of 256 and lives on independent products, not on many warps.
REGISTER_LIMITS = {
    "staged": 80,
    "general": 128,
    "matrix_plain<f64>": 255,
    "matrix_plain": 128,
    "matrix_backward": 128,
    "matrix_backward<f64>": 255,
    "matrix_tensor": 255,
    "topk": 128,
    "match": 128,
    "head": 80,
}

# All kernels there are: growth of this number is growth of every build. 22 of pairs; all pairs take 4 (plain) and 4
# (backward), a type each, 4 (tensor cores: two halves, tuned or not), 2 (sums of the backward pass) and 2 (top-k);
# 8 of matched pairs; 3 of the head.
MOST_KERNELS = 49


@dataclass(frozen=True)
class KernelReport:
    """What ptxas says about one kernel of one architecture."""

    architecture: int
    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int
    byte_stores: int = 0  # to shared memory


class CompilerError(RuntimeError):
    """nvcc failed; the message ends with what it said."""


def find_nvcc() -> str | None:
    """Path of nvcc: $CUDACXX, then $CUDA_HOME and $CUDA_PATH, then PATH, then the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [
        os.environ.get("CUDACXX", ""),
        *(f"{home}/bin/nvcc" for home in homes),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def supported(nvcc: str, architectures: Iterable[int]) -> list[int]:
    """Those of the architectures that this nvcc can compile for."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in architectures if f"sm_{arch}" in listed.split()]


def kernel_name(mangled: str) -> str:
    """``staged_forward<__half, 32, 49>`` from the mangled name of a kernel template in xcos::cuda."""
    match = re.search(r"\d+((?:staged|general|match|head|matrix|topk)_[a-z_]+)I(.*?)E", mangled)
    if match is None:
        return mangled
    names = {"6__half": "f16", "13__nv_bfloat16": "bf16", "f": "f32", "d": "f64"}
    element = next((name for code, name in names.items() if match.group(2).startswith(code)), match.group(2))
    shape = re.findall(r"Li(\d+)E", mangled)
    suffix = f", {shape[0]}x{shape[1]}" if len(shape) == 2 and shape[0] != "0" else ""
    if "Lb1E" in mangled:
        suffix = ", tuned"
    return f"{match.group(1)}<{element}{suffix}>"


def parse(architecture: int, text: str, ptx: str = "") -> list[KernelReport]:
    """Reads the output of ``ptxas -v``, and the PTX of the same kernels."""
    reports = []
    bodies = {body.split("(", 1)[0].strip(): body for body in ptx.split(".entry ")[1:]}
    blocks = re.split(r"Compiling entry function '", text)[1:]
    for block in blocks:
        mangled = block.split("'", 1)[0]
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers", block)
        if stack is None or used is None:
            raise CompilerError(f"cannot read what ptxas says about {mangled}:\n{block[:500]}")
        shared = re.search(r"(\d+) bytes smem", block)
        reports.append(
            KernelReport(
                architecture=architecture,
                name=kernel_name(mangled),
                registers=int(used.group(1)),
                stack_bytes=int(stack.group(1)),
                spill_bytes=int(stack.group(2)) + int(stack.group(3)),
                static_shared_bytes=int(shared.group(1)) if shared else 0,
                byte_stores=len(re.findall(r"st\.shared\.[usb]8\b", bodies.get(mangled, ""))),
            )
        )
    return reports


def compile_kernels(nvcc: str, architecture: int, source: Path, folder: Path) -> list[KernelReport]:
    """Compiles one source for one architecture to a cubin in ``folder``."""
    own = folder / f"{source.stem}.{architecture}"
    own.mkdir()
    command = [nvcc, "-std=c++17", "-O3", f"-I{REPOSITORY / 'csrc'}", f"-arch=sm_{architecture}", "-Werror",
               "all-warnings", "-Xptxas", "-v", "-keep", "-keep-dir", str(own), "-cubin", str(source),
               "-o", str(own / "kernels.cubin")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompilerError(f"{' '.join(command)}\nfailed:\n{done.stderr[-4000:]}")
    return parse(architecture, done.stderr, next(own.glob("*.ptx")).read_text())


def gather(nvcc: str, architectures: Sequence[int], workers: int = 2) -> list[KernelReport]:
    """Compiles all kernels for the architectures and returns what ptxas said, in that order."""
    sources = [path for path in sorted(KERNELS.glob("*.cu")) if "__global__" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(compile_kernels, nvcc, architecture, source, Path(folder))
            for architecture in architectures
            for source in sources
        ]
        return [report for job in jobs for report in job.result()]


def violations(reports: Iterable[KernelReport]) -> list[str]:
    """One line for everything that breaks a limit; empty when all is well."""
    reports, found = list(reports), []
    count = Counter(r.architecture for r in reports)
    for r in reports:
        where = f"sm_{r.architecture} {r.name}"
        if r.spill_bytes:
            found.append(f"{where}: spills {r.spill_bytes} bytes, expected none")
        if r.stack_bytes:
            found.append(f"{where}: has a stack frame of {r.stack_bytes} bytes, expected none")
        if r.static_shared_bytes:
            found.append(f"{where}: {r.static_shared_bytes} bytes of static shared memory, expected dynamic only")
        if r.byte_stores:
            # ptxas 13.0 turns one of a half's two byte stores into the half's conversion to an integer.
            found.append(f"{where}: {r.byte_stores} stores of bytes to shared memory, expected whole words")
        families = [family for family in REGISTER_LIMITS if r.name.startswith(family)]
        most = REGISTER_LIMITS[max(families, key=len)] if families else None
        if most is None:
            found.append(f"{where}: a kernel of no known family; give it a limit in benchmarks/cubin_gate.py")
        elif r.registers > most:
            found.append(f"{where}: {r.registers} registers, at most {most} expected")
    found += [
        f"sm_{architecture}: {kernels} kernels, at most {MOST_KERNELS} expected"
        for architecture, kernels in count.items()
        if kernels > MOST_KERNELS
    ]
    return found


def table(reports: Sequence[KernelReport]) -> str:
    """Registers of each kernel, a column for each architecture; ``!`` marks a spill or stack frame."""
    cells = {(r.name, r.architecture): f"{r.registers}{'!' if r.spill_bytes or r.stack_bytes else ''}" for r in reports}
    names, architectures = (sorted(set(part)) for part in zip(*cells, strict=True))
    rows = [["registers", *(f"sm_{a}" for a in architectures)]]
    rows += [[name, *(cells.get((name, a), "-") for a in architectures)] for name in names]
    width = max(map(len, names))
    return "\n".join(" ".join([name.ljust(width), *(cell.rjust(6) for cell in row)]) for name, *row in rows)


def main() -> int:
    """Entry point; 0 when every kernel is within its limits, 1 when not, 2 without nvcc."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-a", "--architecture", type=int, action="append", help="compute capability such as 90")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="compilations at a time")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc not found: set CUDACXX or CUDA_HOME, or put it on PATH", file=sys.stderr)
        return 2
    wanted = options.architecture or list(ARCHITECTURES)
    architectures = supported(nvcc, wanted)
    for missing in sorted(set(wanted) - set(architectures)):
        print(f"sm_{missing}: not supported by {nvcc}, left out", file=sys.stderr)
    start = time.perf_counter()
    reports = gather(nvcc, architectures, options.jobs)
    print(table(reports))
    print(f"{len(reports)} kernels in {time.perf_counter() - start:.0f} s")
    found = violations(reports)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
