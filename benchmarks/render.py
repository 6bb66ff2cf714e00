"""Renders the result tables of README and of pages in docs from the files in benchmarks/results.

    python benchmarks/render.py            rewrite the pages between their results markers
    python benchmarks/render.py --check    fail if a page does not show what the files say

A table is named by a marker ``<!-- results: cpu pairs -->`` ... ``<!-- /results -->``: ``cpu`` and ``pairs``
(operators on N pairs), ``matrix`` (all pairs) or ``all`` (both); ``head pairs`` is of the files in results/head.
``bench`` is in bench_table.py (stages and runtimes), ``gpu`` in gpu_table.py; the others are functions of tables.py.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import bench_table
import gpu_table
import tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKER = re.compile(r"(<!-- results: (\w+) (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
TABLES = {
    "alignment": tables.alignment,
    "faithfulness": tables.faithfulness,
    "gallery": tables.gallery,
    "inference": tables.inference,
    "models": tables.models,
    "onnx": tables.onnx,
    "speed": tables.speed,
}


def _table(kind: str, name: str) -> str:
    if kind in ("bench", "gpu"):
        return {"bench": bench_table, "gpu": gpu_table}[kind].table(name)
    if kind in ("cpu", "head"):
        files = [tables.RESULTS / "cpu.json"] if kind == "cpu" else sorted((tables.RESULTS / "head").glob("*.json"))
        return "\n".join(tables.operators(files, name)) + "\n"
    return "\n".join(TABLES[kind](name)) + "\n"


def render(text: str) -> str:
    """A page with its tables as the results files have them."""
    return MARKER.sub(lambda match: match[1] + _table(match[2], match[3]) + match[4], text)


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
