"""Tables of runs on GPUs, from whatever gpu_kit.sh and gpu_tune.sh have left below results/gpu, a folder a GPU.

``gpu roofline``: figures beside their ceilings; ``gpu stages``: how the kit's stages ended; ``gpu variants``: the
learned kernel in other blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tables
from tables import Data, commit, duration, markdown, spread

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

from stages import counted, read_lines

RESULTS = tables.RESULTS / "gpu"
PENDING = "Pending: no run on a GPU has been committed yet.\n"


def heading(folder: Path) -> list[str]:
    """What the figures belong to, and the ceilings that were measured there."""
    cases = {row["case"]: row for row in read_lines(folder / "env.jsonl") if "case" in row}
    machine = cases.get("machine", {})
    gpu, packages = machine.get("gpu", {}), machine.get("packages", {})
    parts = [f"**{gpu.get('name', folder.name)}**"]
    if "driver_version" in gpu:
        parts.append(f"driver {gpu['driver_version']}")
    if "torch" in packages:
        parts.append(f"torch {packages['torch']}")
    if machine.get("commit"):
        parts.append(commit(machine))
    ceilings = []
    if "gb_per_s" in cases.get("copy", {}):
        ceilings.append(f"a copy moves {cases['copy']['gb_per_s'] / 1e3:.2f} TB/s (read and written)")
    for dtype in ("float16", "bfloat16", "float32"):
        product = cases.get(f"gemm {dtype}", {})
        if "tflop_per_s" in product:
            ceilings.append(f"{dtype} products of {product['side']}² matrices {product['tflop_per_s']:.0f} TFLOP/s")
    text = ", ".join(parts) + "."
    return [f"{text} Ceilings: {'; '.join(ceilings)}." if ceilings else text, ""]


def _reached(row: Data) -> str:
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
    cells, aims = [], []
    for row in rows:
        if row.get("status") != "ok":
            cells.append([row["case"], f"{row.get('status')}: {str(row.get('message'))[:120]}", "", "", ""])
            continue
        seconds = row["seconds"]
        peers = "; ".join(
            f"{name} {duration(seconds[name]['median'])}, **{speed['median']:.2f}**"
            for name, speed in row["speedup"].items()
            if name not in ("gemm", "copy")
        )
        pairs = f"{row['pairs'] / seconds['xcos_ext']['median']:.3g}" if row.get("pairs") else ""
        cells.append([row["case"], spread(seconds["xcos_ext"], duration), pairs, _reached(row), peers])
        for target in row["targets"]:
            reached = duration(target["reached"]) if target["bound"] < 1e-3 else f"{target['reached']:.3g}"
            aims.append((f"{row['case']}: {target['text']}", reached, "met" if target["met"] else "**missed**"))
    peers = "peers in the same rounds: time, times faster ours is"
    columns = ("case", "xcos_ext, median and quartiles", "pairs/s", "reached", peers)
    return [*markdown(columns, cells), *tables.targets(aims)] if rows else []


def stages(folder: Path) -> list[str]:
    """How the kit's stages ended, and what each counted."""
    cells = []
    for row in read_lines(folder / "kit.jsonl"):
        if "cap" in row:
            counts = sorted(counted(read_lines(folder / row["file"])).items())
            text = ", ".join(f"{count} {status}" for status, count in counts)
            cells.append([row["stage"], row["status"], f"{row['seconds']:.0f}", text])
    return markdown(("stage", "ended", "seconds", "cases"), cells) if cells else []


def variants(folder: Path) -> list[str]:
    """The learned kernel in other blocks, by size."""
    cells = []
    for row in read_lines(folder / "variants.jsonl"):
        if row.get("status") == "ok":
            size = f"{row['probes']:,} x {row['gallery']:,} {row['type']}"
            registers = f"{max(row['registers'])}, {max(row['spill_bytes'], default=0)}" if row.get("registers") else ""
            cells.append([size, row["variant"], spread(row, duration), f"{row['pairs_per_s']:.3g}", registers])
    columns = ("size", "variant", "median and quartiles", "pairs/s", "registers, bytes spilled")
    return markdown(columns, cells) if cells else []


def table(kind: str) -> str:
    """The tables of a kind, a GPU after the other; a sentence where there is none."""
    make = {"roofline": roofline, "stages": stages, "variants": variants}[kind]
    found = []
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        lines = make(folder)
        if lines:
            found.append("\n".join([*heading(folder), *lines]) + "\n")
    return "\n".join(found) or PENDING
