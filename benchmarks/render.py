"""Renders the result tables of README and of pages in docs from the files in benchmarks/results.

    python benchmarks/render.py            rewrite the pages between their results markers
    python benchmarks/render.py --check    fail if a page does not show what the files say

A table is named by a marker ``<!-- results: cpu pairs -->`` ... ``<!-- /results -->``: a key of TABLES, and what its
function takes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import bench_table
import gpu_table
import tables

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "studies"))

import study_tables

from xcos_ext.io.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKER = re.compile(r"(<!-- results: (\w+) (\w+) -->)\n.*?(<!-- /results -->)", re.DOTALL)
TABLES = {
    "alignment": study_tables.alignment,
    "bench": lambda kind: [bench_table.table(kind).rstrip("\n")],
    "cpu": lambda kind: tables.operators(["cpu.json"], kind),
    "detectors": study_tables.detectors,
    "faithfulness": study_tables.faithfulness,
    "gallery": study_tables.gallery,
    "gpu": lambda kind: [gpu_table.table(kind).rstrip("\n")],
    "head": lambda kind: tables.operators(["head/threads1.json", "head/threads2.json"], kind),
    "inference": study_tables.inference,
    "measured": study_tables.measured,
    "models": study_tables.models,
    "onnx": study_tables.onnx,
    "plugged": study_tables.plugged,
    "speed": tables.speed,
}


def render(text: str) -> str:
    """A page with its tables as the results files have them."""
    return MARKER.sub(lambda match: "\n".join([match[1], *TABLES[match[2]](match[3]), match[4]]), text)


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
        write_atomically(page, lambda file, rendered=rendered: file.write(rendered.encode()))  # type: ignore[misc]
    return status


if __name__ == "__main__":
    raise SystemExit(main())
