"""Draws docs/images/faithfulness.png from the files of faithfulness.py.

python recipes/studies/faithfulness_plot.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import study_tables as tables
from matplotlib.figure import Figure

from xcos_ext.explain import save_figure

TARGET = Path(__file__).resolve().parents[2] / "docs" / "images" / "faithfulness.png"
# Okabe and Ito's colours, which stay apart under colour blindness; controls are grey.
COLOURS = {
    "xcos": "#0072b2",
    "xcos-similarity": "#56b4e9",
    "corrrise": "#d55e00",
    "occlusion": "#009e73",
    "xssab": "#cc79a7",
    "gradcam": "#e69f00",
    "random": "#9a9a9a",
    "centre": "#4d4d4d",
}


def curves(part: dict[str, Any], mode: str) -> dict[str, tuple[list[float], list[float]]]:
    """Explainer -> levels and accuracies, in the order of the similar map."""
    rows = (r for r in part["deletion"]["rows"] if r["kind"] == "similar" and r["mode"] == mode)
    return {r["explainer"]: (r["curve"]["levels"], r["curve"]["values"]) for r in rows if r["explainer"] in COLOURS}


def main() -> int:
    """Returns the exit status."""
    data = tables.load("faithfulness/slim.json")
    if data is None:
        print("faithfulness_plot: there is no benchmarks/results/faithfulness/slim.json", file=sys.stderr)
        return 2
    part = next(p for p in data["parts"] if p["deletion"])
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.35))
    for axes, mode in ((left, "deletion"), (middle, "insertion")):
        for name, (levels, values) in curves(part, mode).items():
            dashed = name in ("random", "centre")
            label = tables.LABELS[name].strip("*")
            style: Any = (0, (4, 2)) if dashed else "-"
            axes.plot([100 * x for x in levels], [100 * y for y in values], color=COLOURS[name], ls=style, label=label)
        axes.set_title(f"{mode}, verification, xcos-slim", loc="left", fontsize=10)
        axes.set_xlabel("pixels replaced by black, %" if mode == "deletion" else "pixels kept, %")
        axes.set_ylabel("accuracy, %")
    left.legend(fontsize=8, frameon=False)
    shown = [name for name in tables.EXPLAINED if tables.load(f"faithfulness/{name}.json")]
    maps = ("xcos", "xcos-similarity", "occlusion", "corrrise", "xssab", "gradcam", "centre")
    width = 0.8 / len(maps)
    for place, model in enumerate(shown):
        found = tables.region_swaps(tables.load(f"faithfulness/{model}.json") or {})
        for number, name in enumerate(maps):
            if name not in found:
                continue
            estimate = found[name][1][tables.DIRECTIONS[0], "swap", "mean"]["absolute"]
            value, (low, high) = estimate["value"], estimate["interval"]
            x = place + (number - len(maps) / 2 + 0.5) * width
            right.bar(x, value, width * 0.9, color=COLOURS[name])
            right.errorbar(x, value, [[value - low], [high - value]], color="#222222", lw=0.8)
    right.axhline(0.5, color="#222222", lw=0.8)
    right.axhline(0.95, color="#222222", lw=0.8, ls=(0, (2, 2)))
    right.text(len(shown) - 0.55, 0.955, "aim", fontsize=8, va="bottom")
    right.set_ylim(0.4, 1)
    right.set_xticks(range(len(shown)), [tables.EXPLAINED[name].split(",")[0] for name in shown])
    right.set_title("region swap, AUC over cells, absolute (95 % intervals)", loc="left", fontsize=10)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, TARGET, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
