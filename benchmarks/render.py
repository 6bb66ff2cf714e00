"""Renders the result tables of README and of pages in docs from the files in benchmarks/results.

    python benchmarks/render.py            rewrite the pages between their results markers
    python benchmarks/render.py --check    fail if a page does not show what the files say

A table is named by a marker ``<!-- results: cpu pairs -->`` ... ``<!-- /results -->``: ``cpu`` and ``pairs``
(operators on N pairs), ``matrix`` (all pairs) or ``all`` (both); ``head pairs`` is of the files in results/head. Others
have a module each:

* ``models short``, ``all``, ``compact``: models on LFW (models_table.py);
* ``gallery short``, ``scale``, ``identification``: searches (gallery_table.py);
* ``gpu roofline``, ``stages``, ``variants``: runs on GPUs (gpu_table.py);
* ``faithfulness ...``: explainers (faithfulness_table.py);
* ``alignment ...``: matched cells (alignment_table.py);
* ``onnx ...``: exported graphs (onnx_table.py);
* ``inference ...``: ways to run a model in torch (inference_table.py);
* ``bench ...``: stages and runtimes (bench_table.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import alignment_table
import bench_table
import faithfulness_table
import gallery_table
import gpu_table
import inference_table
import models_table
import onnx_table
from harness import duration

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "training.md",
    ROOT / "docs" / "default_model.md",
    ROOT / "docs" / "gallery.md",
    ROOT / "docs" / "alignment_tolerance.md",
    ROOT / "docs" / "faithfulness.md",
    ROOT / "docs" / "local_cells.md",
    ROOT / "docs" / "inference.md",
    ROOT / "docs" / "onnx.md",
    ROOT / "docs" / "bench.md",
)
MARKER = re.compile(r"(<!-- results: (\w+) (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
TABLES = {
    "alignment": alignment_table,
    "bench": bench_table,
    "faithfulness": faithfulness_table,
    "gallery": gallery_table,
    "gpu": gpu_table,
    "inference": inference_table,
    "models": models_table,
    "onnx": onnx_table,
}
ALL_PAIRS = ("xcos_topk/", "xcos_matrix/")


def _cell(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return ""
    return f"{duration(timing['median'])} ({duration(timing['low'])} – {duration(timing['high'])})"


def _heading(results: dict[str, Any]) -> list[str]:
    machine, rows = results["machine"], results["cases"]
    where = (
        machine["gpu"]["name"]
        if rows[0]["device"] == "cuda"
        else f"{machine['processor']}, {machine['threads']} threads"
    )
    return [
        f"{where}; torch {machine['torch']}; commit `{machine['commit'][:10]}`, {machine['date'][:10]}. "
        "Median and quartiles; peers in the same run.",
        "",
    ]


def _targets(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        for target in row["targets"]:
            reached = target["reached"]
            text = (
                duration(reached)
                if "under 10 us" in target["text"]
                else f"{reached:.0f}"
                if reached >= 100
                else f"{reached:.3g}"
            )
            verdict = "met" if target["met"] else "missed"
            lines.append(f"| {row['name'].split('/')[-1]}: {target['text']} | {text} | {verdict} |")
    return ["", "| target | reached | |", "|---|---|---|", *lines] if lines else []


def _pairs_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| case | xcos_ext | eager | torch.compile | times eager | times compile | bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds, speedup = row["seconds"], row["speedup"]

        def times(name: str, speedup: dict[str, Any] = speedup) -> str:
            return f"{speedup[name]['median']:.2f}" if name in speedup else ""

        bandwidth = ""
        if "bandwidth_share" in row:
            (peer,) = set(row["bandwidth"]) - {"xcos_ext"}
            share = row["bandwidth_share"]["median"]
            bandwidth = f"{row['bandwidth']['xcos_ext'] / 1e9:.3g} GB/s, {share:.2f} of {peer}"
        lines.append(
            f"| {row['name']} | {_cell(seconds['xcos_ext'])} | {_cell(seconds.get('eager'))} | "
            f"{_cell(seconds.get('torch.compile'))} | {times('eager')} | {times('torch.compile')} | {bandwidth} |"
        )
    return lines


def _share_of_gemm(row: dict[str, Any]) -> str:
    rates = row["multiply_adds"]
    if "gemm" not in rates:
        return ""
    # Halves on a CPU are held against torch's fp32 product: see bench_xcos_topk.py.
    kind = "fp32 GEMM" if row["name"].endswith("fp16") and row["device"] == "cpu" else "GEMM"
    return f"{rates['xcos_ext'] / 1e9:.0f} G/s, {rates['xcos_ext'] / rates['gemm']:.2f} of a {kind}"


def _matrix_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| case | xcos_ext | pairs/s | against peers: their time, times faster ours is | multiply-adds | error against "
        "fp64, largest / mean; top-10 agreement | extra memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        facts = row["facts"]
        peers = "; ".join(
            f"{name}{' (scaled)' if name in row['scaled'] else ''} {duration(row['seconds'][name]['median'])}, "
            f"**{_times(speed['median'])}**"
            for name, speed in row["speedup"].items()
            if name != "gemm"
        )
        error = ""
        if "largest error" in facts:
            agreement = facts["top-10 agreement"]
            error = f"{facts['largest error']:.1e} / {facts['mean error']:.1e}; {100 * agreement:.1f} %"
        memory = f"{facts['extra MB']:.0f} MB" if "extra MB" in facts else ""
        if "extra MB of eager" in facts:
            memory += f" (eager {facts['extra MB of eager']:.0f} MB)"
        rate = row["pairs"] / row["seconds"]["xcos_ext"]["median"]
        lines.append(
            f"| {row['name']}: {row['note']} | {_cell(row['seconds']['xcos_ext'])} | {_rate(rate)} | {peers} | "
            f"{_share_of_gemm(row)} | {error} | {memory} |"
        )
    return lines


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.2f}"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.3g} billion" if rate >= 1e9 else f"{rate / 1e6:.3g} million"


def _table(results: dict[str, Any], kind: str) -> str:
    rows = [row for row in results["cases"] if row["name"].startswith(ALL_PAIRS) == (kind == "matrix")]
    if not rows:
        return "Pending: not in the committed results file yet.\n"
    body = _matrix_table(rows) if kind == "matrix" else _pairs_table(rows)
    return "\n".join([*_heading(results), *body, *_targets(rows)]) + "\n"


def render(text: str) -> str:
    """A page with its tables as the results files have them."""

    def replace(match: re.Match[str]) -> str:
        module = TABLES.get(match[2])
        if module is not None:
            return match[1] + module.table(match[3]) + match[4]
        files = [RESULTS / "cpu.json"] if match[2] == "cpu" else sorted((RESULTS / "head").glob("*.json"))
        kinds = ["pairs", "matrix"] if match[3] == "all" else [match[3]]
        tables = [_table(json.loads(path.read_text()), kind) for path in files if path.is_file() for kind in kinds]
        if not tables:
            tables = ["Pending: no results file of such a machine has been committed yet.\n"]
        return match[1] + "\n".join(tables) + match[4]

    return MARKER.sub(replace, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    status = 0
    for page in PAGES:
        text = page.read_text()
        rendered = render(text)
        if rendered == text:
            continue
        if check:
            print(f"{page.name} does not show the figures of benchmarks/results; run python benchmarks/render.py")
            status = 1
            continue
        temporary = page.with_suffix(".tmp")
        temporary.write_text(rendered)
        os.replace(temporary, page)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
