"""Tables of the ways to run a model, from what inference_choice.py measured.

``inference ways``: every model, batch size and way, times as ratios.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import duration

FILE = Path(__file__).resolve().parent / "results" / "models" / "inference.json"
COLUMNS = ("way", "times faster than eager", "than onnxruntime fp32", "time per pair", "score error", "built in")


def _ratio(spread: dict[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:.2f} ({spread['low']:.2f} – {spread['high']:.2f})"


def _row(name: str, row: dict[str, Any], pairs: int, chosen: dict[str, str]) -> str:
    shown = f"**{name}**" if name in chosen.values() else name
    if "seconds" not in row:
        return f"| {shown} | {row['problem']} | | | | |"
    cells = (
        shown,
        _ratio(row.get("times_eager")),
        _ratio(row.get("times_onnxruntime")),
        duration(row["seconds"]["median"] / pairs),
        f"{row['error']:.0e}" if row["error"] else "0",
        duration(row["build_seconds"]),
    )
    return f"| {' | '.join(cells)} |"


def case_table(case: dict[str, Any]) -> str:
    """One model and batch size, with a line that says what was chosen."""
    count = f"{case['pairs']} pair{'' if case['pairs'] == 1 else 's'} a call"
    chosen = f"chosen: {case['chosen']['fp32']}; with bf16 allowed: {case['chosen']['all']}"
    rows = (_row(name, row, case["pairs"], case["chosen"]) for name, row in case["ways"].items())
    head = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
    return "\n".join([f"{case['model']}, {count} ({chosen}):", "", head, *rows]) + "\n"


def _heading(machine: dict[str, Any]) -> str:
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    commit = f"commit `{machine['commit'][:10]}`{'' if machine['clean'] else ' with changes'}"
    return (
        f"{machine['processor']}, {threads}; torch {machine['torch']}; {commit}, {machine['date'][:10]}. Median "
        "(quartiles) of the rounds, ways in turns.\n"
    )


def table(kind: str) -> str:
    """What goes between the markers of a page.

    Raises:
        ValueError: another kind than ``ways``.
    """
    if kind != "ways":
        raise ValueError(f"inference {kind}: expected inference ways")
    if not FILE.is_file():
        return "Pending: not measured yet.\n"
    cases = json.loads(FILE.read_text(encoding="utf-8"))["cases"]
    return "\n".join([_heading(cases[0]["machine"]), *map(case_table, cases)])
