"""A run and a comparison as text, in rows that a terminal and a page in Markdown show alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

from xcos_ext.io.text import counted, duration, rate, span

from .cases import RUNTIMES, STAGES
from .comparison import Comparison, Verdict
from .results import HEAD_TARGET, Report

__all__ = ["Table", "changes", "latency", "left_out", "shares", "summary"]


@dataclass
class Table:
    """Rows of text.

    Attributes:
        title: above them.
        columns: their names.
        left: how many columns, from the first, are names; the others are numbers.
        grouped: how many of these need not be said again in the rows below.
        rows: as many cells as there are columns.
    """

    title: str
    columns: list[str]
    left: int
    grouped: int
    rows: list[list[str]] = field(default_factory=list)


def latency(report: Report) -> Table:
    """Every case: percentiles, throughput, error."""
    columns = ["stage", "batch", "runtime", "device", "dtype", "p50 of a call (95 %)", "p90", "p99"]
    cold = " with cold caches" if report.settings.get("cold") else ""
    table = Table(f"Latency{cold}", [*columns, "throughput", "error"], 5, 2)
    for result in sorted(report.results, key=lambda result: result.key.order):
        key, took = result.key, result.latency
        name = key.runtime if not result.detail else f"{key.runtime} ({result.detail})"
        figures = [span(took.p50, took.low, took.high), duration(took.p90), duration(took.p99)]
        error = "" if result.error is None else f"{result.error:.0e}" if result.error else "0"
        figures += [rate(result.throughput, STAGES[key.stage].unit), error]
        table.rows.append([key.stage, str(key.batch), name, key.device, key.dtype, *figures])
    return table


def shares(report: Report) -> Table:
    """The head's share of a pair's time, and that of the projection of both faces, a column for each batch."""
    found = {part: report.shares(part) for part in ("head", "projection")}
    batches = sorted({key.batch for shares in found.values() for key in shares})
    title = f"Share of a pair's time (95 %), of the fastest calls; aim for the head: under {100 * HEAD_TARGET:g} %"
    table = Table(title, ["part", "runtime", "device", "dtype", *(f"batch {batch}" for batch in batches)], 4, 1)
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    for part, of_pairs in found.items():
        name = part if part == "head" else "projection of both faces"
        for key, share in sorted(of_pairs.items(), key=lambda item: (RUNTIMES.index(item[0].runtime), item[0].order)):
            low, high, fastest = (f"{100 * value:.2f}" for value in (share.low, share.high, share.of_fastest))
            text = f"{100 * share.median:.2f} % ({low} – {high}), {fastest}"
            if part == "head" and key.device == "cpu":
                text += " met" if share.under(HEAD_TARGET) else " missed"
            rows.setdefault((name, key.runtime, key.device, key.dtype), {})[key.batch] = text
    table.rows = [[*names, *(cells.get(batch, "") for batch in batches)] for names, cells in rows.items()]
    return table


def left_out(report: Report) -> Iterator[str]:
    """One line for each runtime, device and reason, with the stages it is about."""
    found: dict[tuple[str, str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for skipped in report.skipped:
        key = skipped.key
        stages, dtypes = found.setdefault((key.runtime, key.device, skipped.reason), ({}, {}))
        stages[key.stage] = dtypes[key.dtype] = None
    for (runtime, device, reason), (stages, dtypes) in found.items():
        names = ", ".join(stages)
        name = names if runtime == "native" else f"{runtime}, {device}, {', '.join(dtypes)} ({names})"
        yield f"not measured: {name}: {reason}"


def summary(report: Report) -> Iterator[str]:
    """What the figures belong to, and how long it took."""
    start = report.conditions.get("start", {})
    clocks = start.get("mhz")
    parts = [
        report.place,
        f"torch {report.machine['torch']}",
        f"{clocks[0]:,.0f} – {clocks[1]:,.0f} MHz" if clocks else "clocks unknown",
        f"governor {start.get('governor') or 'unknown'}",
        f"load {start.get('load')} at the start",
    ]
    yield f"{report.model['name']} ({report.model['fingerprint']}) on {'; '.join(parts)}"
    spent = sum(group["seconds"] for group in report.groups)
    made = sum(result.preparation for result in report.results)
    yield f"{spent:.0f} s of measuring, {made:.0f} s of making runtimes ready"


def changes(comparison: Comparison) -> tuple[Table, list[str]]:
    """Every case that both runs have, changes first; and what is to be said below."""
    table = Table("Changes", ["case", "old", "new", "new / old (99 %)", "verdict"], 1, 0)
    order = get_args(Verdict)
    for change in sorted(comparison.changes, key=lambda change: (order.index(change.verdict), change.key.order)):
        found = f"{change.ratio.median:.3f} ({change.ratio.low:.3f} – {change.ratio.high:.3f})"
        table.rows.append([str(change.key), duration(change.old), duration(change.new), found, change.verdict])
    counts = (f"{sum(c.verdict == verdict for c in comparison.changes)} {verdict}" for verdict in order)
    said = [f"{', '.join(counts)}; changes under {100 * comparison.minimum:g} % do not count"]
    for name, keys in (("old", comparison.only_old), ("new", comparison.only_new)):
        said += [f"{counted(len(keys), 'case')} only in the {name} run"] if keys else []
    return table, [*said, *(["; ".join(comparison.versions)] if comparison.versions else [])]
