"""Runs the benchmarks and writes one results file.

    python benchmarks/run.py --device cpu --threads 2
    python benchmarks/run.py --only forward/fp32 --out /tmp/try.json

Peers run beside ours, in turns; faiss is one of them where faiss-cpu is installed. Numbers belong to the machine
and commit that the file names.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import bench_grid_cosine
import bench_grid_match
import bench_xcos_head
import bench_xcos_score
import bench_xcos_topk
import torch
from harness import RESULTS, describe, machine, measure, write_json

SUITES = (bench_xcos_score, bench_grid_cosine, bench_grid_match, bench_xcos_head, bench_xcos_topk)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument("--pairs", type=int, default=None, help="pairs per case (default: 4096, on a GPU 262144)")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds a case")
    parser.add_argument("--out", type=Path, default=None, help="results file (default: benchmarks/results/DEVICE.json)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    out = options.out or RESULTS / f"{options.device}.json"
    rows: list[dict[str, Any]] = []
    for suite in SUITES:
        for case in suite.cases(options.device, options.pairs):
            if options.only in case.name:
                case.budget = options.budget
                rows.append(measure(case))
                print(describe(rows[-1]), flush=True)
                # What is measured is kept, whatever comes.
                write_json(out, {"schema": 1, "machine": machine(), "cases": rows})
            del case
            if options.device == "cuda":
                torch.cuda.empty_cache()
            torch._dynamo.reset()
    if not rows:
        parser.error(f"--only {options.only}: no case of that name")
    missed = [target["text"] for row in rows for target in row["targets"] if not target["met"]]
    print(f"\n{len(rows)} cases written to {out}; targets missed: {len(missed)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
