"""Renders README's result tables from the files in benchmarks/results.

    python benchmarks/render.py            rewrite README.md between its results markers
    python benchmarks/render.py --check    fail if README.md does not show what the files say

A table is named by a marker ``<!-- results: cpu -->`` ... ``<!-- /results -->``; ``gpu`` takes every other file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _cell(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return ""
    return f"{_time(timing['median'])} ({_time(timing['low'])} – {_time(timing['high'])})"


def _table(results: dict[str, Any]) -> str:
    machine, rows = results["machine"], results["cases"]
    where = (
        machine["gpu"]["name"]
        if rows[0]["device"] == "cuda"
        else f"{machine['processor']}, {machine['threads']} threads"
    )
    lines = [
        f"{where}; torch {machine['torch']}; commit `{machine['commit'][:10]}`, {machine['date'][:10]}. "
        "Median and quartiles; peers in the same run.",
        "",
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
    targets = [(row["name"], target) for row in rows for target in row["targets"]]
    if targets:
        lines += ["", "| target | reached | |", "|---|---|---|"]
        for name, target in targets:
            reached = _time(target["reached"]) if "under" in target["text"] else f"{target['reached']:.2f}"
            lines.append(
                f"| {name.split('/')[-1]}: {target['text']} | {reached} | {'met' if target['met'] else 'missed'} |"
            )
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    """The README with its tables as the results files have them."""

    def replace(match: re.Match[str]) -> str:
        if match[2] == "cpu":
            files = [RESULTS / "cpu.json"]
        else:
            files = sorted(path for path in RESULTS.glob("*.json") if path.name != "cpu.json")
        tables = [_table(json.loads(path.read_text())) for path in files if path.is_file()]
        if not tables:
            tables = ["Pending: no results file of such a machine has been committed yet.\n"]
        return match[1] + "\n".join(tables) + match[3]

    return MARKER.sub(replace, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text()
    rendered = render(text)
    if check:
        if rendered != text:
            print("README.md does not show the figures of benchmarks/results; run python benchmarks/render.py")
        return int(rendered != text)
    temporary = readme.with_suffix(".tmp")
    temporary.write_text(rendered)
    os.replace(temporary, readme)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
