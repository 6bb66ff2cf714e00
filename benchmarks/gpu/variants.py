"""Variants of the learned all-pairs kernel beside each other: other blocks, compiled from the same source.

    python benchmarks/gpu/variants.py build FOLDER     a program a variant; needs nvcc, no GPU
    python benchmarks/gpu/variants.py run FOLDER       times them in turns, a JSON line a variant and size
    python benchmarks/gpu/variants.py ncu FOLDER       the fastest under Nsight Compute
    python benchmarks/gpu/variants.py list

A variant is a set of macros of csrc/cuda/xcos_matrix_mma.cu. Variants that the folder lacks are compiled first where
nvcc is there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cubin_gate import find_nvcc
from ncu import SECTIONS, find_ncu, parse
from stages import SKIPPED, emit, read_lines, seconds_left

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SOURCES = (HERE / "variants.cu", REPOSITORY / "csrc/cuda/xcos_matrix_mma.cu", REPOSITORY / "csrc/cuda/runtime.cu")
# Shared memory holds one block of eight warps, or two of three; registers 65,536 / (32 x warps x blocks) a thread.
VARIANTS: dict[str, dict[str, int]] = {
    "as shipped": {},
    "4 warps": {"WARPS": 4},
    "6 warps": {"WARPS": 6},
    "12 warps": {"WARPS": 12},
    "3 warps, 2 blocks": {"WARPS": 3, "BLOCKS": 2},
    "least 4 warps": {"LEAST_WARPS": 4},
    "least 8 warps": {"LEAST_WARPS": 8},
}
# Which sizes say what: throughput, one probe, a training batch.
SIZES = ((256, 1_000_000, "f16"), (256, 1_000_000, "bf16"), (1, 1_000_000, "f16"), (64, 64, "f16"))


def program(folder: Path, name: str) -> Path:
    """Of a variant."""
    return folder / re.sub(r"[^a-z0-9]+", "-", name)


def build(folder: Path, architecture: str) -> int:
    """Compile the variants that are not there; what ptxas says of each is its first result."""
    nvcc, missing = find_nvcc(), [name for name in VARIANTS if not program(folder, name).is_file()]
    if not missing:
        return 0
    if nvcc is None:
        print(f"variants: nvcc not found; not built: {', '.join(missing)}", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)

    def one(name: str) -> str | None:
        macros = [f"-DXCOS_MMA_{macro}={value}" for macro, value in VARIANTS[name].items()]
        target = program(folder, name)
        command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-cudart", "static", f"-arch=sm_{architecture}", "-Xptxas",
                   "-v", f"-I{REPOSITORY / 'csrc'}", *macros, *map(str, SOURCES), "-o", f"{target}.new"]  # fmt: skip
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        message = None
        if done.returncode == 0:
            os.replace(f"{target}.new", target)
            tensor = done.stderr.split("matrix_tensor")
            said = re.findall(r"(\d+) bytes spill stores|Used (\d+) registers", "".join(tensor[1:]))
            spills, registers = ([int(n) for pair in said if (n := pair[which])] for which in (0, 1))
            (folder / f"{target.name}.ptxas").write_text(json.dumps({"registers": registers, "spill_bytes": spills}))
            print(
                f"{name}: registers {registers}, spilled {spills} bytes, {time.monotonic() - begin:.0f} s", flush=True
            )
        else:
            message = f"{name}: {done.stderr[-1500:]}"
            print(message, file=sys.stderr)
        return message

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return 1 if any(list(pool.map(one, missing))) else 0


def run(folder: Path) -> int:
    """Every variant at every size, in turns, the sizes that decide first."""
    begin, bad = time.monotonic(), build(folder, "90")
    sums: dict[tuple[int, int, str], float] = {}
    for probes, gallery, kind in SIZES:
        for name in VARIANTS:
            case = f"{name}: {probes} x {gallery} {kind}"
            if not program(folder, name).is_file():
                emit(case=case, status="failed", message="not built")
                continue
            if seconds_left(begin, 120) < 3:
                emit(case=case, status="not run", message="no time was left")
                continue
            program(folder, name).chmod(0o755)  # modes may be lost on the way
            command = [str(program(folder, name)), str(probes), str(gallery), kind, "0.6"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == SKIPPED:
                return SKIPPED
            said = folder / f"{program(folder, name).name}.ptxas"
            facts = json.loads(said.read_text()) if said.is_file() else {}
            if done.returncode != 0:
                bad = 1
                emit(case=case, status="failed", message=done.stderr[-500:], **facts)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            # The order of a pair's sums is the same in all variants.
            expected = sums.setdefault((probes, gallery, kind), row["sum"])
            wrong = not row["finite"] or abs(row["sum"] - expected) > 1e-6 * row["magnitude"]
            bad |= wrong
            message = f"scores add up to {row['sum']}, expected {expected}" if wrong else None
            emit(case=case, variant=name, status="failed" if wrong else "ok", message=message, **row, **facts)
            print(f"{case}: {row['median'] * 1e3:.3f} ms, {row['pairs_per_s']:.3g} pairs/s", flush=True)
    return int(bad)


def ncu(folder: Path) -> int:
    """The fastest at the first size, on a gallery whose replays are short."""
    probes, gallery, kind = SIZES[0]
    measured = read_lines(Path(os.environ.get("XCOS_STAGE_OUT", "")).parent / "variants.jsonl")
    at_the_first = [row for row in measured if (row.get("probes"), row.get("gallery"), row.get("type")) == SIZES[0]]
    rows = [row for row in at_the_first if row.get("status") == "ok"]
    best = min(rows, key=lambda row: row["median"])["variant"] if rows else next(iter(VARIANTS))
    command = [find_ncu() or "ncu", "--clock-control", "none", "--kernel-name", "regex:matrix_tensor"]
    command += ["--launch-count", "1", "--csv", "--page", "details"]
    for section in SECTIONS:
        command += ["--section", section]
    command += [str(program(folder, best)), str(probes), str(gallery // 16), kind, "once"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        emit(case=best, status="skipped", message=str(error))
        return SKIPPED
    kernels = parse(done.stdout)
    for name, metrics in kernels.items():
        emit(case=f"{best}: {name}", status="ok", metrics=metrics)
        print(best, metrics)
    if not kernels:
        emit(case=best, status="failed", message=(done.stderr or done.stdout)[-1500:])
    return 0 if kernels else 1


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "run", "ncu", "list"))
    parser.add_argument("folder", nargs="?", type=Path, default=REPOSITORY / ".kit" / "variants")
    parser.add_argument("--architecture", default="90")
    options = parser.parse_args()
    if options.what == "list":
        for name, macros in VARIANTS.items():
            print(f"{name}: {' '.join(f'-DXCOS_MMA_{macro}={value}' for macro, value in macros.items())}")
        return 0
    if options.what == "build":
        return build(options.folder, options.architecture)
    return run(options.folder) if options.what == "run" else ncu(options.folder)


if __name__ == "__main__":
    raise SystemExit(main())
