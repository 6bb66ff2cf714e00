"""The curves of deletion, insertion, identification and patch replacement, and the bars of region swaps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.explain.explainers.interface import Saliency
from xcos_ext.explain.plotting import DASHES, GRID, LINES, new_figure
from xcos_ext.io.optional import need

from .deletion import Deletion
from .maps import Curve
from .measure import CONTROLS, Faithfulness
from .patch import Patch
from .swap import RegionSwap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["faithfulness_figure"]

# Line styles and markers tell more explainers apart than there are colours; controls are grey.
_MARKERS = "os^vDPX*"
_CONTROL_COLOUR = "#8c8c8c"


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each explainer is drawn."""
    made: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(name for name in names if name not in CONTROLS):
        made[name] = {
            "color": LINES[i % len(LINES)],
            "linestyle": DASHES[(i // len(LINES)) % len(DASHES)],
            "marker": _MARKERS[i % len(_MARKERS)],
        }
    for style, marker, name in zip(((0, (1, 1.5)), (0, (5, 2))), ("x", "+"), CONTROLS, strict=True):
        made[name] = {"color": _CONTROL_COLOUR, "linestyle": style, "marker": marker}
    return made


def faithfulness_figure(result: Faithfulness) -> Figure:
    """Draw what was measured: a row of panels for each protocol.

    Args:
        result: with at least one of region swap, deletion, identification and patch replacement.

    Returns:
        A figure on the Agg canvas; write it with :func:`xcos_ext.explain.save_figure`.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: nothing in it has curves.
    """
    # Region swaps have a line for each explainer in each region.
    rows: list[tuple[Any, Callable[..., None], float]] = [
        (result.region_swap, _draw_swap, max(3.3, 0.75 * len(result.explainers))),
        (result.deletion, _draw_deletion, 3.3),
        (result.identification, _draw_deletion, 3.3),
        (result.patch, _draw_patch, 3.3),
    ]
    rows = [row for row in rows if row[0] is not None]
    if not rows:
        raise ValueError("result: expected a region swap, deletion, identification or patch replacement, got none")
    heights = [height for _, _, height in rows]
    figure = new_figure(13.0, 0.9 + sum(heights), layout="constrained")
    looks = _looks(result.explainers)
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (found, draw, _) in zip(parts, rows, strict=True):
        draw(part, found, looks)
    line = need("matplotlib.lines", "drawing").Line2D
    handles = [line([], [], label=name, markersize=5, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False, fontsize=9)
    figure.suptitle(f"{result.model}: faithfulness of its explanations", fontsize=11, parse_math=False)
    return figure


def _row(part: Any, count: int) -> Any:
    return part.subplots(1, count, squeeze=False, sharey=True)[0]


def _tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9.5, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=9)
    place = axes.get_subplotspec()
    if place is not None and place.is_first_col():
        axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_swap(part: Any, found: RegionSwap, looks: dict[str, dict[str, Any]]) -> None:
    readings = ("absolute", "difference", "centred")
    directions = [draw.direction for draw in found.draws]
    axes_rows = _row(part, len(directions) * len(readings))
    size = found.rows[0].size
    regions = list(dict.fromkeys(row.region for row in found.rows))
    names = [name for name in looks if any(row.explainer == name for row in found.rows)]
    for axes, (direction, reading) in zip(axes_rows, itertools.product(directions, readings), strict=True):
        for place, name in enumerate(names):
            values = [
                getattr(found.find(name, direction=direction, region=region, size=size), reading) for region in regions
            ]
            shift = 0.7 * ((place + 0.5) / len(names) - 0.5)
            look = looks[name] | {"linestyle": "", "markersize": 4}
            y = np.arange(len(regions)) + shift
            axes.plot([value.value for value in values], y, **look)
            low, high = zip(*(value.interval or (value.value, value.value) for value in values), strict=True)
            axes.hlines(y, low, high, colors=look["color"], linewidth=0.8)
        axes.axvline(0.5, color="#444444", linewidth=0.8)
        axes.set_xlim(0, 1.02)
        axes.set_yticks(range(len(regions)), regions)
        _tidy(axes, f"{direction}\n{reading}", "AUC over the cells", "")
    axes_rows[0].invert_yaxis()


def _curve(axes: Axes, curve: Curve, look: dict[str, Any]) -> None:
    x, y = (100 * np.array(values) for values in (curve.levels, curve.values))
    axes.plot(x, y, linewidth=1.5, markersize=3.5, **look)


def _draw_deletion(part: Any, found: Deletion, looks: dict[str, dict[str, Any]]) -> None:
    fill = found.rows[0].fill  # the first that was asked for
    name, what = {
        "deletion": ("verification", "accuracy, %"),
        "identification": ("identification", "rank-1 rate, %"),
    }[found.protocol]
    panels = itertools.product({"deletion": "deleted", "insertion": "kept"}.items(), Saliency._fields)
    for axes, ((mode, verb), kind) in zip(_row(part, 4), panels, strict=True):
        for row in found.rows:
            if (row.mode, row.kind, row.fill) == (mode, kind, fill):
                _curve(axes, row.curve, looks[row.explainer])
        _tidy(axes, f"{name}, fill: {fill}\n{mode}, {kind} map", f"pixels {verb}, %", what)


def _draw_patch(part: Any, found: Patch, looks: dict[str, dict[str, Any]]) -> None:
    kinds = list(dict.fromkeys(row.pairs for row in found.rows))
    for axes, kind in zip(_row(part, len(kinds)), kinds, strict=True):
        for row in found.rows:
            if row.pairs == kind:
                _curve(axes, row.flips, looks[row.explainer])
        _tidy(axes, f"patch replacement, {kind} pairs", "cells replaced, %", "verdicts turned, %")
