"""Tables of what matching cells with their neighbourhoods gains, from the file of alignment_tolerance.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results" / "alignment"


def tables(contents: dict[str, Any]) -> str:
    """A table for each model, Markdown: rows are sets of pairs, columns rules of matching.

    Bold: the interval of the gain in accuracy over radius 0 lies above 0; italic: below.
    """
    lines = []
    for label, conditions in contents["results"].items():
        rules = [row["rule"] for row in next(iter(conditions.values()))["rules"]]
        lines += [f"{label}: accuracy % (AUC)", "", f"| pairs | {' | '.join(rules)} |", "|---" * (len(rules) + 1) + "|"]
        for name, condition in conditions.items():
            cells = []
            for row in condition["rules"]:
                low, high = row["accuracy_gain"]
                text = f"{100 * row['accuracy']:.2f} ({row['auc']:.4f})"
                cells.append(f"**{text}**" if low > 0 else f"*{text}*" if high < 0 else text)
            lines.append(f"| {name} ({condition['pairs']:,}) | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def table(name: str) -> str:
    """The tables of ``results/alignment/NAME.json``, or that they are pending."""
    file = FOLDER / f"{name}.json"
    if not file.is_file():
        return "Pending: not measured in a committed results file yet.\n"
    contents = json.loads(file.read_text())
    machine = contents["machine"]
    heading = f"LFW folds {contents['folds']}; commit `{machine['commit'][:10]}`, {machine['date'][:10]}."
    return f"{heading}\n\n{tables(contents)}"
