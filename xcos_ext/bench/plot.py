"""The picture of a run: latency and throughput against the batch, and what the stages take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xcos_ext.io.optional import need
from xcos_ext.io.text import duration

from .cases import PIXELS, RUNTIMES, STAGES, Key
from .results import Report, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_report"]

# Okabe and Ito's colours, which stay apart under colour blindness; and a marker.
_LOOKS = {
    "eager": ("#4d4d4d", "o"),
    "for_inference": ("#0072b2", "s"),
    "compiled": ("#009e73", "^"),
    "graph": ("#e69f00", "v"),
    "onnxruntime": ("#d55e00", "D"),
    "tensorrt": ("#cc79a7", "P"),
}
_LINES = {"fp32": "-", "bf16": (0, (4, 1.5)), "fp16": (0, (1, 1))}
_PARTS = {
    "decode": "#bdbdbd",
    "detect": "#8c8c8c",
    "align": "#5a5a5a",
    "backbone": "#56b4e9",
    "projection": "#f0c808",
    "head": "#d55e00",
}
#: Throughputs that are further apart go on a logarithmic axis.
_WIDE = 20


def plot_report(report: Report) -> Figure:
    """Draw a run.

    Latency and throughput of a whole pair (or of the backbone, where no pair was measured) against the batch, a line
    for each runtime and dtype; and bars of what the stages take of one pair.

    Returns:
        A figure on the Agg canvas; write it with :func:`xcos_ext.explain.save_figure`.

    Raises:
        ValueError: neither pairs nor stages of one were measured.
        MissingPackageError: matplotlib is not installed.
    """
    stage = next((name for name in ("pair", "backbone") if _lines(report, name)), None)
    bars = _bars(report)
    if stage is None and not bars:
        raise ValueError("report: expected cases of pair, backbone or head, got none")
    need("matplotlib.backends.backend_agg", "drawing")
    figure = need("matplotlib.figure", "drawing").Figure(figsize=(13.5, 4.6), layout="constrained", facecolor="white")
    need("matplotlib.backends.backend_agg", "drawing").FigureCanvasAgg(figure)
    panels = figure.subplots(1, (2 if stage else 0) + (1 if bars else 0), squeeze=False)[0]
    if stage is not None:
        unit = STAGES[stage].unit
        name = "a pair of crops to its score" if stage == "pair" else "the backbone"
        lines = _lines(report, stage)
        _draw_lines(panels[0], lines, throughput=False)
        _tidy(panels[0], f"Latency of a call, {name}", f"{unit} a call", "ms (bars: 95 %)")
        _draw_lines(panels[1], lines, throughput=True)
        _tidy(panels[1], f"Throughput, {name}", f"{unit} a call", f"{unit} a second")
        panels[0].legend(fontsize=8, frameon=False, loc="upper left")
    if bars:
        _draw_bars(panels[-1], bars)
    cold = "; cold caches" if report.settings.get("cold") else ""
    heading = f"{report.model['name']} on {report.place}; torch {report.machine['torch']}{cold}"
    figure.suptitle(heading, fontsize=10.5, x=0.01, ha="left", parse_math=False)
    return figure


def _lines(report: Report, stage: str) -> dict[str, list[Result]]:
    """Label -> its cases by batch; devices and dtypes are named where there are several."""
    results = sorted((r for r in report.results if r.key.stage == stage), key=lambda r: (r.key.device, r.key.order))
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(_label(result.key, results), []).append(result)
    runtimes = {label: RUNTIMES.index(found[label][0].key.runtime) for label in found}
    return {label: found[label] for label in sorted(found, key=runtimes.__getitem__)}


def _label(key: Key, among: Sequence[Result]) -> str:
    several = [name for name in ("device", "dtype") if len({getattr(result.key, name) for result in among}) > 1]
    return ", ".join([key.runtime, *(getattr(key, name) for name in several)])


def _draw_lines(axes: Axes, lines: dict[str, list[Result]], *, throughput: bool) -> None:
    values: list[float] = []
    for label, results in lines.items():
        key = results[0].key
        colour, marker = _LOOKS[key.runtime]
        look: dict[str, Any] = {"color": colour, "linestyle": _LINES[key.dtype], "marker": marker, "label": label}
        look |= {"markerfacecolor": "white" if key.device == "cuda" else None, "markersize": 5, "linewidth": 1.5}
        batches = [result.key.batch for result in results]
        if throughput:
            rates = [result.throughput for result in results]
            axes.plot(batches, rates, **look)
            values += rates
            continue
        low, middle, high = ([1e3 * getattr(r.latency, name) for r in results] for name in ("low", "p50", "high"))
        ends = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
        axes.errorbar(batches, middle, ends, elinewidth=1, capsize=2, **look)
        values += low + high
    ticks = sorted({result.key.batch for results in lines.values() for result in results})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    if throughput and max(values) < _WIDE * min(values):
        axes.set_ylim(0, 1.1 * max(values))
    else:
        axes.set_yscale("log")
        _plain_ticks(axes, values)
    axes.minorticks_off()


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """1, 2, 5 times powers of ten inside the range of the values, written without exponents."""
    least, most = min(values), max(values)
    ticks = [m * 10.0**e for e in range(-6, 10) for m in (1, 2, 5)]
    inside = [tick for tick in ticks if least / 1.6 <= tick <= most * 1.6]
    if inside:
        axes.set_yticks(inside, [f"{tick:,.6g}" for tick in inside])
    axes.set_ylim(least / 1.3, most * 1.3)


def _bars(report: Report) -> dict[str, dict[str, float]]:
    """Label -> seconds of one pair by stage, for the smallest and the largest batch of every runtime.

    Where photographs were measured, the first bar has the whole way from two of them, in the runtime that is fastest.
    """
    pairs = sorted((r for r in report.results if r.key.stage == "pair"), key=lambda r: (r.key.device, r.key.order))
    batches = sorted({result.key.batch for result in pairs})
    found: dict[str, dict[str, float]] = {}
    singles: dict[str, float] = {}
    for result in pairs:
        key = result.key
        parts = _parts(report, key) if key.batch in (batches[0], batches[-1]) else {}
        if parts:
            label = f"{_label(key, pairs)}, batch {key.batch}"
            found[label] = parts
            if key.batch == 1:
                singles[label] = result.latency.p50
    stages = [name for name, stage in STAGES.items() if stage.of_pictures]
    pictures = {name: report.find(Key(name, "native", "cpu", PIXELS, 1)) for name in stages}
    before = {name: 2 * result.latency.p50 for name, result in pictures.items() if result is not None}
    if before and singles:
        best = min(singles, key=singles.__getitem__)
        found = {f"from photographs,\n{best}": {**before, **found[best]}, **found}
    return found


def _parts(report: Report, key: Key) -> dict[str, float]:
    """Seconds of one pair by stage: both faces' backbones, projections where these were measured, and the head."""
    results = [report.find(replace(key, stage=stage)) for stage in ("backbone", "projection", "head")]
    backbone, projection, head = (None if r is None else r.latency.p50 / key.batch for r in results)
    if backbone is None or head is None:
        return {}
    inner = min(projection or 0.0, backbone)
    return {"backbone": 2 * (backbone - inner), "projection": 2 * inner, "head": head}


def _draw_bars(axes: Axes, bars: dict[str, dict[str, float]]) -> None:
    seen: set[str] = set()
    for place, parts in enumerate(bars.values()):
        start, total = 0.0, sum(parts.values())
        for part, seconds in parts.items():
            if seconds <= 0:
                continue
            share = 100 * seconds / total
            axes.barh(place, share, 0.68, start, color=_PARTS[part], label=None if part in seen else part)
            seen.add(part)
            start += share
        share = 100 * parts["head"] / total
        axes.text(101.5, place, f"{duration(total)}, head {share:.1f} %", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    _tidy(axes, "Stages of one pair, both faces", "share of their time, %", "")
    axes.grid(False, axis="y")
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda place: list(_PARTS).index(names[place]))
    axes.legend(
        [handles[place] for place in order], [names[place] for place in order], loc="upper center", frameon=False,
        fontsize=8, bbox_to_anchor=(0.45, -0.13), ncols=6, columnspacing=0.9, handlelength=1.2,
    )  # fmt: skip


def _tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
