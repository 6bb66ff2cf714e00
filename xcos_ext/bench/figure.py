"""The picture of a run: latency and throughput against the batch, and what the stages take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xcos_ext.io.optional import need
from xcos_ext.io.text import duration

from .cases import RUNTIMES, Key
from .report import Report, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bench_figure"]

# Okabe and Ito's colours, which stay apart under colour blindness.
_COLOURS = {
    "eager": "#4d4d4d",
    "for_inference": "#0072b2",
    "compiled": "#009e73",
    "graph": "#e69f00",
    "onnxruntime": "#d55e00",
    "tensorrt": "#cc79a7",
}
_MARKERS = {"eager": "o", "for_inference": "s", "compiled": "^", "graph": "v", "onnxruntime": "D", "tensorrt": "P"}
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
_PICTURES = ("decode", "detect", "align")


def bench_figure(report: Report) -> Figure:
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
        unit = "pairs" if stage == "pair" else "pictures"
        name = "a pair of crops to its score" if stage == "pair" else "the backbone"
        _draw_lines(panels[0], report, stage, throughput=False)
        _tidy(panels[0], f"Latency of a call, {name}", f"{unit} a call", "ms (bars: 95 %)")
        _draw_lines(panels[1], report, stage, throughput=True)
        _tidy(panels[1], f"Throughput, {name}", f"{unit} a call", f"{unit} a second")
        panels[0].legend(fontsize=8, frameon=False, loc="upper left")
    if bars:
        _draw_bars(panels[-1], bars)
    figure.suptitle(_heading(report), fontsize=10.5, x=0.01, ha="left", parse_math=False)
    return figure


def _heading(report: Report) -> str:
    machine = report.machine
    gpu = machine.get("gpu")
    where = f"{machine['processor']}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    if isinstance(gpu, dict):
        where += f"; {gpu['name']}"
    cold = "; cold caches" if report.settings.get("cold") else ""
    return f"{report.model['name']} on {where}; torch {machine['torch']}{cold}"


def _lines(report: Report, stage: str) -> dict[tuple[str, str, str], list[Result]]:
    """(runtime, device, dtype) -> its cases by batch."""
    found: dict[tuple[str, str, str], list[Result]] = {}
    for result in report.results:
        key = result.key
        if key.stage == stage:
            found.setdefault((key.runtime, key.device, key.dtype), []).append(result)
    order = sorted(found, key=lambda name: (name[1], RUNTIMES.index(name[0]), name[2]))
    return {name: sorted(found[name], key=lambda result: result.key.batch) for name in order}


def _draw_lines(axes: Axes, report: Report, stage: str, *, throughput: bool) -> None:
    lines = _lines(report, stage)
    devices = {device for _, device, _ in lines}
    dtypes = {dtype for _, _, dtype in lines}
    for (runtime, device, dtype), results in lines.items():
        batches = [result.key.batch for result in results]
        label = runtime + (f", {device}" if len(devices) > 1 else "") + (f", {dtype}" if len(dtypes) > 1 else "")
        look: dict[str, Any] = {
            "color": _COLOURS.get(runtime, "#222222"),
            "linestyle": _LINES.get(dtype, "-"),
            "marker": _MARKERS.get(runtime, "o"),
            "markerfacecolor": "white" if device == "cuda" else None,
            "markersize": 5,
            "linewidth": 1.5,
            "label": label,
        }
        if throughput:
            axes.plot(batches, [result.throughput for result in results], **look)
            continue
        middle = [1e3 * result.latency.p50 for result in results]
        low = [m - 1e3 * result.latency.low for m, result in zip(middle, results, strict=True)]
        high = [1e3 * result.latency.high - m for m, result in zip(middle, results, strict=True)]
        axes.errorbar(batches, middle, [low, high], elinewidth=1, capsize=2, **look)
    ticks = sorted({result.key.batch for results in lines.values() for result in results})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    shown = [result for results in lines.values() for result in results]
    if throughput:
        values = [result.throughput for result in shown]
    else:
        values = [1e3 * end for result in shown for end in (result.latency.low, result.latency.high)]
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
    pairs = sorted(
        (result for result in report.results if result.key.stage == "pair"),
        key=lambda result: (result.key.device, result.key.batch, RUNTIMES.index(result.key.runtime), result.key.dtype),
    )
    batches = sorted({result.key.batch for result in pairs})
    several = len({result.key.device for result in pairs}) > 1, len({result.key.dtype for result in pairs}) > 1
    found: dict[str, dict[str, float]] = {}
    best: tuple[float, str] | None = None
    for result in pairs:
        key = result.key
        parts = _parts(report, key) if key.batch in (batches[0], batches[-1]) else {}
        if not parts:
            continue
        label = key.runtime + (f", {key.device}" if several[0] else "") + (f", {key.dtype}" if several[1] else "")
        label += f", batch {key.batch}"
        found[label] = parts
        if key.batch == 1 and (best is None or result.latency.p50 < best[0]):
            best = result.latency.p50, label
    pictures = _picture_seconds(report)
    if pictures and best is not None:
        first = f"from photographs,\n{best[1]}"
        found = {first: {**pictures, **found[best[1]]}, **found}
    return found


def _parts(report: Report, key: Key) -> dict[str, float]:
    """Seconds of one pair by stage: both faces' backbones, projections where these were measured, and the head."""

    def seconds(stage: str) -> float | None:
        result = report.find(Key(stage, key.runtime, key.device, key.dtype, key.batch))
        return None if result is None else result.latency.p50 / key.batch

    backbone, projection, head = seconds("backbone"), seconds("projection"), seconds("head")
    if backbone is None or head is None:
        return {}
    inner = min(projection or 0.0, backbone)
    return {"backbone": 2 * (backbone - inner), "projection": 2 * inner, "head": head}


def _picture_seconds(report: Report) -> dict[str, float]:
    """Seconds that two photographs take before the model, by stage."""
    keys = {stage: Key(stage, "native", "cpu", "uint8", 1) for stage in _PICTURES}
    results = {stage: report.find(key) for stage, key in keys.items()}
    return {stage: 2 * result.latency.p50 for stage, result in results.items() if result is not None}


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
        [handles[place] for place in order],
        [names[place] for place in order],
        fontsize=8,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.13),
        ncols=6,
        columnspacing=0.9,
        handlelength=1.2,
    )


def _tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
