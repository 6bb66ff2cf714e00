"""Tables of what the way to a score takes, from the files of ``xcos bench --json`` in results/bench."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from xcos_ext.bench import RUNTIMES, STAGES, Key, Report, Result, read_report
from xcos_ext.bench.results import HEAD_TARGET
from xcos_ext.io.text import duration, rate, span

FOLDER = Path(__file__).resolve().parent / "results" / "bench"
PENDING = "Pending: not measured in a committed results file yet.\n"


def heading(report: Report) -> str:
    """What the figures belong to, one line."""
    machine = report.machine
    cold = ", caches emptied before every call" if report.settings.get("cold") else ""
    return (
        f"{report.model['name']} (`{report.model['fingerprint']}`) on {report.place}; torch {machine['torch']}; commit "
        f"`{machine['commit'][:10]}`, {machine['date'][:10]}. Median of a call and its 95 % interval, runtimes in turns"
        f"{cold}."
    )


def _order(result: Result) -> tuple[int, str, int, str, int]:
    key = result.key
    return list(STAGES).index(key.stage), key.device, RUNTIMES.index(key.runtime), key.dtype, key.batch


def _p50(result: Result | None) -> str:
    return "" if result is None else span(result.latency.p50, result.latency.low, result.latency.high)


def _markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def pairs(report: Report) -> str:
    """A whole pair: a row for each runtime and dtype; columns for batches, throughput, error and the head's share."""
    results = sorted((r for r in report.results if r.key.stage == "pair"), key=_order)
    if not results:
        return PENDING
    batches = sorted({r.key.batch for r in results})
    shares = report.shares()
    rows = []
    for runtime, device, dtype in dict.fromkeys((r.key.runtime, r.key.device, r.key.dtype) for r in results):
        own = {batch: report.find(Key("pair", runtime, device, dtype, batch)) for batch in batches}
        found = [result for result in own.values() if result is not None]
        errors = [result.error for result in found if result.error is not None]
        parts = [shares.get(Key("pair", runtime, device, dtype, batch)) for batch in batches]
        rows.append(
            [
                runtime,
                dtype,
                *(_p50(result) for result in own.values()),
                rate(max(result.throughput for result in found), "pairs"),
                f"{max(errors):.0e}" if errors and max(errors) else "0",
                ", ".join("-" if share is None else f"{100 * share.median:.2f}" for share in parts) + " %",
            ]
        )
    columns = ["runtime", "backbone", *(f"{n} pair{'' if n == 1 else 's'} a call" for n in batches)]
    return _markdown([*columns, "best throughput", "largest error", "head's share"], rows)


def stages(report: Report) -> str:
    """Every case: percentiles and throughput."""
    rows = []
    for result in sorted(report.results, key=_order):
        key, latency = result.key, result.latency
        rows.append(
            [
                key.stage,
                key.runtime + (f" ({result.detail})" if result.detail else ""),
                f"{key.device}, {key.dtype}",
                str(key.batch),
                _p50(result),
                duration(latency.p90),
                duration(latency.p99),
                rate(result.throughput, STAGES[key.stage].unit),
            ]
        )
    return _markdown(["stage", "runtime", "", "batch", "p50 (95 %)", "p90", "p99", "throughput"], rows)


def shares(report: Report) -> str:
    """The head's share of a pair's time, and that of the projection of both faces."""
    rows = []
    for part in ("head", "projection"):
        for key, share in report.shares(part).items():
            aim = part == "head" and key.device == "cpu"
            rows.append(
                [
                    part,
                    f"{key.runtime}, {key.device}, {key.dtype}",
                    str(key.batch),
                    f"{100 * share.median:.2f} % ({100 * share.low:.2f} – {100 * share.high:.2f})",
                    f"{100 * share.of_fastest:.2f} %",
                    ("met" if share.under(HEAD_TARGET) else "missed") if aim else "",
                ]
            )
    columns = ["part", "runtime", "batch", "of the median (95 %)", "of the fastest call"]
    return _markdown([*columns, f"aim: under {100 * HEAD_TARGET:g} %"], rows) if rows else PENDING


def left_out(report: Report) -> str:
    """What was not measured and why, and what disturbed the figures."""
    reasons: dict[str, list[str]] = {}
    for skipped in report.skipped:
        name = f"{skipped.key.runtime} ({skipped.key.dtype})"
        reasons.setdefault(skipped.reason, []).append(name)
    lines = [f"- not measured: {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    lines += [f"- disturbed: {warning}" for warning in report.warnings]
    return "\n".join(lines) + "\n" if lines else ""


def table(kind: str) -> str:
    """Markdown of results/bench/cpu.json, or that it is pending.

    Args:
        kind: ``"short"`` (pairs by runtime), ``"shares"`` (of the head), ``"all"`` (every case, and what was left out);
            ``"gpu"``: all of the other files there.
    """
    if kind == "gpu":
        files = sorted(path for path in FOLDER.glob("*.json") if path.name != "cpu.json")
        reports = [read_report(path) for path in files]
        return "\n".join(f"{heading(r)}\n\n{pairs(r)}\n{stages(r)}\n{left_out(r)}" for r in reports) or PENDING
    file = FOLDER / "cpu.json"
    if not file.is_file():
        return PENDING
    report = read_report(file)
    if kind == "all":
        return f"{heading(report)}\n\n{stages(report)}\n{left_out(report)}"
    return f"{heading(report)}\n\n{pairs(report) if kind == 'short' else shares(report)}"
