"""The tables of ``xcos bench``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .console import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from xcos_ext.bench import Comparison, Key, Report, Share

__all__ = ["print_comparison", "print_report"]

_STYLES = {"slower": "red", "faster": "green", "unclear": "yellow", "same": ""}


def _table(title: str, columns: Sequence[str], left: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, no_wrap=True), title_justify="left", box=box.ROUNDED if sys.stdout.isatty() else None
    )
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", no_wrap=place < left)
    return table


def _plain(value: Any) -> str:
    """Text of a file that may come from anywhere, for a terminal and for rich."""
    from rich.markup import escape

    return escape(one_line(str(value)))


def print_report(console: Console, report: Report, *, quiet: bool) -> None:
    """Latency of every case, the head's share, what was left out, and what the figures belong to (not if quiet)."""
    from xcos_ext.bench import STAGES
    from xcos_ext.io.text import duration, rate, span

    results = report.results
    columns = ["stage", "batch", "runtime", "device", "dtype"]
    columns += ["p50 of a call (95 %)", "p90", "p99", "throughput", "error"]
    cold = " with cold caches" if report.settings.get("cold") else ""
    table = _table(f"Latency{cold}", columns, 5)
    before = None
    for result in sorted(results, key=lambda result: _order(result.key)):
        key, latency = result.key, result.latency
        if before not in (None, (key.stage, key.batch)):
            table.add_section()
        name = _plain(key.runtime if not result.detail else f"{key.runtime} ({result.detail})")
        table.add_row(
            "" if before is not None and before[0] == key.stage else key.stage,
            "" if before == (key.stage, key.batch) else str(key.batch),
            name,
            key.device,
            key.dtype,
            span(latency.p50, latency.low, latency.high),
            duration(latency.p90),
            duration(latency.p99),
            rate(result.throughput, STAGES[key.stage].unit),
            "" if result.error is None else f"{result.error:.0e}" if result.error else "0",
        )
        before = key.stage, key.batch
    console.print(table)
    shares = list(_share_rows(report))
    if shares:
        console.print()
        console.print(_share_table(report, shares))
    if report.skipped:
        console.print("\nnot measured:")
        for line in _left_out(report):
            console.print(f"  {line}", soft_wrap=True)
    if not quiet:
        console.print()
        for line in _summary(report):
            console.print(line, soft_wrap=True)


def _order(key: Key) -> tuple[int, int, str, int, int]:
    from xcos_ext.bench import DTYPES, RUNTIMES, STAGES

    place = DTYPES.index(key.dtype) if key.dtype in DTYPES else 0
    return list(STAGES).index(key.stage), key.batch, key.device, RUNTIMES.index(key.runtime), place


def _share_rows(report: Report) -> Iterator[tuple[str, dict[Key, Share]]]:
    for part in ("head", "projection"):
        found = report.shares(part)
        if found:
            yield part, found


def _share_table(report: Report, shares: Sequence[tuple[str, dict[Key, Share]]]) -> Table:
    """A row for each part, runtime, device and dtype; a column for each batch."""
    from xcos_ext.bench.results import HEAD_TARGET

    batches = sorted({key.batch for _, found in shares for key in found})
    table = _table(
        f"Share of a pair's time (95 %), of the fastest calls; aim for the head: under {100 * HEAD_TARGET:g} %",
        ["part", "runtime", "device", "dtype", *(f"batch {batch}" for batch in batches)],
        4,
    )
    for part, found in shares:
        rows: dict[tuple[str, str, str], dict[int, str]] = {}
        for key, share in sorted(found.items(), key=lambda item: _order(item[0])):
            low, high, fastest = (f"{100 * value:.2f}" for value in (share.low, share.high, share.of_fastest))
            text = f"{100 * share.median:.2f} % ({low} – {high}), {fastest}"
            if part == "head" and key.device == "cpu":
                text += " met" if share.under(HEAD_TARGET) else " missed"
            rows.setdefault((key.runtime, key.device, key.dtype), {})[key.batch] = text
        for place, (names, cells) in enumerate(rows.items()):
            name = {"head": "head", "projection": "projection of both faces"}[part] if place == 0 else ""
            table.add_row(name, *names, *(cells.get(batch, "") for batch in batches))
        table.add_section()
    return table


def _left_out(report: Report) -> Iterator[str]:
    """One line for each runtime, device and reason, with the stages it is about."""
    found: dict[tuple[str, str, str], list[Key]] = {}
    for skipped in report.skipped:
        found.setdefault((skipped.key.runtime, skipped.key.device, skipped.reason), []).append(skipped.key)
    for (runtime, device, reason), keys in found.items():
        stages = ", ".join(dict.fromkeys(key.stage for key in keys))
        dtypes = ", ".join(dict.fromkeys(key.dtype for key in keys))
        name = stages if runtime == "native" else f"{runtime}, {device}, {dtypes} ({stages})"
        yield _plain(f"{name}: {reason}")


def _summary(report: Report) -> Iterator[str]:
    machine, start = report.machine, report.conditions.get("start", {})
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    gpu = machine.get("gpu", {}).get("name")
    clocks = start.get("mhz")
    parts = [
        f"{machine['processor']}, {threads}",
        *([gpu] if gpu and any(result.key.device == "cuda" for result in report.results) else []),
        f"torch {machine['torch']}",
        f"{clocks[0]:,.0f} – {clocks[1]:,.0f} MHz" if clocks else "clocks unknown",
        f"governor {start.get('governor') or 'unknown'}",
        f"load {start.get('load')} at the start",
    ]
    yield _plain(f"{report.model['name']} ({report.model['fingerprint']}) on {'; '.join(parts)}")
    spent = sum(group["seconds"] for group in report.groups)
    made = sum(result.preparation for result in report.results)
    yield f"{spent:.0f} s of measuring, {made:.0f} s of making runtimes ready"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Every case that both runs have, changes first."""
    from xcos_ext.io.text import duration

    table = _table("Changes", ["case", "old", "new", "new / old (99 %)", "verdict"], 1)
    order = list(_STYLES)
    for change in sorted(comparison.changes, key=lambda change: (order.index(change.verdict), _order(change.key))):
        found, style = change.ratio, _STYLES[change.verdict]
        table.add_row(
            _plain(change.key),
            duration(change.old),
            duration(change.new),
            f"{found.median:.3f} ({found.low:.3f} – {found.high:.3f})",
            f"[{style}]{change.verdict}[/{style}]" if style else change.verdict,
        )
    console.print()
    console.print(table)
    counts = {verdict: sum(change.verdict == verdict for change in comparison.changes) for verdict in order}
    console.print(
        ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        + f"; changes under {100 * comparison.minimum:g} % do not count"
    )
    for name, keys in (("old", comparison.only_old), ("new", comparison.only_new)):
        if keys:
            console.print(f"{len(keys)} cases only in the {name} run")
    if comparison.versions:
        console.print(_plain("; ".join(comparison.versions)), soft_wrap=True)
