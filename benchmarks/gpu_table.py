"""Tables of runs on GPUs, from whatever gpu_kit.sh and gpu_tune.sh have left below results/gpu, a folder a GPU.

``gpu roofline``: figures beside their ceilings; ``gpu stages``: how the kit's stages ended; ``gpu variants``: the
learned kernel in other blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

from harness import duration
from stages import counted, read_lines

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
PENDING = "Pending: no run on a GPU has been committed yet.\n"
Row = dict[str, Any]


def _named(folder: Path, stage: str, case: str) -> Row:
    """A case's line; empty where it is missing."""
    return next((row for row in read_lines(folder / f"{stage}.jsonl") if row.get("case") == case), {})


def heading(folder: Path) -> list[str]:
    """What the figures belong to, and the ceilings that were measured there."""
    machine = _named(folder, "env", "machine")
    gpu, packages = machine.get("gpu", {}), machine.get("packages", {})
    parts = [f"**{gpu.get('name', folder.name)}**"]
    if "driver_version" in gpu:
        parts.append(f"driver {gpu['driver_version']}")
    if "torch" in packages:
        parts.append(f"torch {packages['torch']}")
    if machine.get("commit"):
        parts.append(f"commit `{machine['commit'][:10]}`, {machine.get('date', '')[:10]}")
    ceilings = []
    copy = _named(folder, "env", "copy")
    if "gb_per_s" in copy:
        ceilings.append(f"a copy moves {copy['gb_per_s'] / 1e3:.2f} TB/s (read and written)")
    for dtype in ("float16", "bfloat16", "float32"):
        product = _named(folder, "env", f"gemm {dtype}")
        if "tflop_per_s" in product:
            ceilings.append(f"{dtype} products of {product['side']}² matrices {product['tflop_per_s']:.0f} TFLOP/s")
    text = ", ".join(parts) + "."
    return [f"{text} Ceilings: {'; '.join(ceilings)}." if ceilings else text, ""]


def _spread(timing: Row) -> str:
    return f"{duration(timing['median'])} ({duration(timing['low'])} – {duration(timing['high'])})"


def _reached(row: Row) -> str:
    """How near to the ceiling."""
    said = []
    if "xcos_ext" in row["bandwidth"]:
        text = f"{row['bandwidth']['xcos_ext'] / 1e9:.0f} GB/s"
        share = row.get("bandwidth_share")
        said.append(f"{text}, {share['median']:.2f} of a copy" if share else text)
    rates = row["multiply_adds"]
    if "xcos_ext" in rates and "gemm" in rates:
        said.append(f"{2 * rates['xcos_ext'] / 1e12:.0f} TFLOP/s, {rates['xcos_ext'] / rates['gemm']:.2f} of a product")
    return "; ".join(said)


def roofline(folder: Path) -> list[str]:
    """A line a case; cases that failed or had no time say so."""
    rows = [row for row in read_lines(folder / "roofline.jsonl") if row.get("case") != "machine"]
    if not rows:
        return []
    peers = "peers in the same rounds: time, times faster ours is"
    lines = [f"| case | xcos_ext, median and quartiles | pairs/s | reached | {peers} |", "|---|---|---|---|---|"]
    targets = []
    for row in rows:
        if row.get("status") != "ok":
            lines.append(f"| {row['case']} | {row.get('status')}: {str(row.get('message'))[:120]} | | | |")
            continue
        peers = "; ".join(
            f"{name} {duration(row['seconds'][name]['median'])}, **{speed['median']:.2f}**"
            for name, speed in row["speedup"].items()
            if name not in ("gemm", "copy")
        )
        pairs = f"{row['pairs'] / row['seconds']['xcos_ext']['median']:.3g}" if row.get("pairs") else ""
        lines.append(f"| {row['case']} | {_spread(row['seconds']['xcos_ext'])} | {pairs} | {_reached(row)} | {peers} |")
        targets += [(row["case"], target) for target in row["targets"]]
    if targets:
        lines += ["", "| target | reached | |", "|---|---|---|"]
        for case, target in targets:
            reached = duration(target["reached"]) if target["bound"] < 1e-3 else f"{target['reached']:.3g}"
            lines.append(f"| {case}: {target['text']} | {reached} | {'met' if target['met'] else '**missed**'} |")
    return lines


def stages(folder: Path) -> list[str]:
    """How the kit's stages ended, and what each counted."""
    rows = [row for row in read_lines(folder / "kit.jsonl") if "cap" in row]
    if not rows:
        return []
    lines = ["| stage | ended | seconds | cases |", "|---|---|---|---|"]
    for row in rows:
        counts = counted(read_lines(folder / row["file"]))
        text = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        lines.append(f"| {row['stage']} | {row['status']} | {row['seconds']:.0f} | {text} |")
    return lines


def variants(folder: Path) -> list[str]:
    """The learned kernel in other blocks, by size."""
    rows = [row for row in read_lines(folder / "variants.jsonl") if row.get("status") == "ok"]
    if not rows:
        return []
    lines = ["| size | variant | median and quartiles | pairs/s | registers, bytes spilled |", "|---|---|---|---|---|"]
    for row in rows:
        size = f"{row['probes']:,} x {row['gallery']:,} {row['type']}"
        registers = f"{max(row['registers'])}, {max(row['spill_bytes'], default=0)}" if row.get("registers") else ""
        lines.append(f"| {size} | {row['variant']} | {_spread(row)} | {row['pairs_per_s']:.3g} | {registers} |")
    return lines


def table(kind: str) -> str:
    """The tables of a kind, a GPU after the other; a sentence where there is none."""
    make = {"roofline": roofline, "stages": stages, "variants": variants}[kind]
    found = []
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        lines = make(folder)
        if lines:
            found.append("\n".join([*heading(folder), *lines]) + "\n")
    return "\n".join(found) or PENDING
