"""Tables of exported graphs against torch, from benchmarks/results/models/onnx.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "models" / "onnx.json"


def _parity(data: dict[str, Any]) -> list[str]:
    lines = [
        "| model | inside | graph | batch | score | S | W |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        if row["batch"] != "all":
            figures = " | ".join(f"{row[name]:.1e}" for name in ("score", "similarity", "attention"))
            lines.append(f"| {row['model']} | {row['dtype']} | {row['graph']} | {row['batch']} | {figures} |")
    return lines


def _verdicts(data: dict[str, Any]) -> list[str]:
    lines = [
        "| model | inside | pairs | largest difference of scores, median | verdicts that change | size |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        if row["batch"] == "all":
            lines.append(
                f"| {row['model']} | {row['dtype']} | {row['pairs']:,} | {row['score']:.1e}, {row['median']:.1e} | "
                f"{row['changed']} | {row['bytes'] / 1e6:.1f} MB |"
            )
    return lines


def table(kind: str) -> str:
    """``"parity"``: largest differences by batch; ``"verdicts"``: over all pairs of the folds."""
    if not RESULTS.is_file():
        return "Pending: no results file has been committed yet.\n"
    data = json.loads(RESULTS.read_text())
    machine = data["machine"]
    folds = " and ".join(map(str, data["folds"]))
    head = (
        f"onnxruntime {data['onnxruntime']} against torch {machine['torch']} in fp32, faces of LFW folds {folds}; "
        f"{machine['processor']}, commit `{machine['commit'][:10]}`, {machine['date'][:10]}."
    )
    lines = {"parity": _parity, "verdicts": _verdicts}[kind](data)
    return "\n".join([head, "", *lines]) + "\n"
