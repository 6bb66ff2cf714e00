"""The picture of a run: latency and throughput against the batch, and what the stages take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xcos_ext.io.optional import need
from xcos_ext.io.text import duration

from .cases import PIXELS, STAGES, Key
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
    stage = next((name for name in ("pair", "backbone") if _of(report, name)), None)
    bars = _bars(report)
    if stage is None and not bars:
        raise ValueError("report: expected cases of pair, backbone or head, got none")
    canvas = need("matplotlib.backends.backend_agg", "drawing").FigureCanvasAgg
    figure = need("matplotlib.figure", "drawing").Figure(figsize=(13.5, 4.6), layout="constrained", facecolor="white")
    canvas(figure)
    panels = figure.subplots(1, (2 if stage else 0) + (1 if bars else 0), squeeze=False)[0]
    if stage is not None:
        unit = STAGES[stage].unit
        name = "a pair of crops to its score" if stage == "pair" else "the backbone"
        for axes, throughput in zip(panels, (False, True), strict=False):
            _draw_lines(axes, _of(report, stage), throughput)
        _tidy(panels[0], f"Latency of a call, {name}", f"{unit} a call", "ms (bars: 95 %)")
        _tidy(panels[1], f"Throughput, {name}", f"{unit} a call", f"{unit} a second")
        panels[0].legend(fontsize=8, frameon=False, loc="upper left")
    if bars:
        _draw_bars(panels[-1], bars)
    cold = "; cold caches" if report.settings.get("cold") else ""
    heading = f"{report.model['name']} on {report.place}; torch {report.machine['torch']}{cold}"
    figure.suptitle(heading, fontsize=10.5, x=0.01, ha="left", parse_math=False)
    return figure


def _of(report: Report, stage: str) -> list[Result]:
    """A stage's cases, those of a runtime, device and dtype together, by batch."""
    found = [result for result in report.results if result.key.stage == stage]
    return sorted(found, key=lambda r: (r.key.order[3], r.key.device, r.key.order[4], r.key.batch))


def _label(key: Key, among: Sequence[Result]) -> str:
    """Its runtime; devices and dtypes are named where there are several."""
    several = [name for name in ("device", "dtype") if len({getattr(result.key, name) for result in among}) > 1]
    return ", ".join([key.runtime, *(getattr(key, name) for name in several)])


def _draw_lines(axes: Axes, results: Sequence[Result], throughput: bool) -> None:
    ticker = need("matplotlib.ticker", "drawing")
    values: list[float] = []
    for label in dict.fromkeys(_label(result.key, results) for result in results):
        line = [result for result in results if _label(result.key, results) == label]
        key = line[0].key
        colour, marker = _LOOKS[key.runtime]
        look: dict[str, Any] = {"color": colour, "linestyle": _LINES[key.dtype], "marker": marker, "label": label}
        look |= {"markerfacecolor": "white" if key.device == "cuda" else None, "markersize": 5, "linewidth": 1.5}
        if throughput:
            middle = low = high = [result.throughput for result in line]
        else:
            low, middle, high = ([1e3 * getattr(r.latency, name) for r in line] for name in ("low", "p50", "high"))
        ends = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
        axes.errorbar(
            [r.key.batch for r in line], middle, None if throughput else ends, elinewidth=1, capsize=2, **look
        )
        values += low + high
    ticks = sorted({result.key.batch for result in results})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    if throughput and max(values) < _WIDE * min(values):
        axes.set_ylim(0, 1.1 * max(values))
    else:  # 1, 2, 5 times powers of ten, written without exponents
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.3, max(values) * 1.3)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.6g}"))
    axes.minorticks_off()


def _bars(report: Report) -> dict[str, dict[str, float]]:
    """Label -> seconds of one pair by stage, for the smallest and the largest batch of every runtime.

    Where photographs were measured, the first bar has the whole way from two of them, in the runtime that is fastest.
    """
    pairs = sorted(_of(report, "pair"), key=lambda r: (r.key.device, r.key.order))
    batches = [result.key.batch for result in pairs]
    found: dict[str, dict[str, float]] = {}
    singles: dict[str, float] = {}
    for result in pairs:
        key = result.key
        parts = _parts(report, key) if key.batch in (min(batches), max(batches)) else {}
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
    start, totals = [0.0] * len(bars), [sum(parts.values()) for parts in bars.values()]
    for part, colour in _PARTS.items():
        shares = [100 * parts.get(part, 0.0) / total for parts, total in zip(bars.values(), totals, strict=True)]
        if any(shares):
            axes.barh(range(len(bars)), shares, 0.68, start, color=colour, label=part)
            start = [a + b for a, b in zip(start, shares, strict=True)]
    for place, (parts, total) in enumerate(zip(bars.values(), totals, strict=True)):
        text = f"{duration(total)}, head {100 * parts['head'] / total:.1f} %"
        axes.text(101.5, place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    _tidy(axes, "Stages of one pair, both faces", "share of their time, %", "")
    axes.grid(False, axis="y")
    axes.legend(
        loc="upper center", frameon=False, fontsize=8, bbox_to_anchor=(0.45, -0.13), ncols=6, columnspacing=0.9,
        handlelength=1.2,
    )  # fmt: skip


def _tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
