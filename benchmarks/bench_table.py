"""Tables of what the way to a score takes, from the files of ``xcos bench --json`` in results/bench."""

from __future__ import annotations

from collections.abc import Iterator

import tables
from tables import RESULTS, commit, markdown

from xcos_ext.bench import Report, read_report
from xcos_ext.bench.tables import latency, left_out, shares
from xcos_ext.io.text import rate, span

FOLDER = RESULTS / "bench"
PENDING = f"{tables.PENDING}\n"


def heading(report: Report) -> str:
    """What the figures belong to, one line."""
    machine = report.machine
    name = f"{report.model['name']} (`{report.model['fingerprint']}`)"
    cold = ", caches emptied before every call" if report.settings.get("cold") else ""
    return (
        f"{name} on {report.place}; torch {machine['torch']}; {commit(dict(machine))}. "
        f"Median of a call and its 95 % interval, runtimes in turns{cold}."
    )


def pairs(report: Report) -> Iterator[str]:
    """A whole pair: a row for each runtime and dtype; columns for batches, throughput, error and the head's share."""
    results = sorted(report.results, key=lambda result: result.key.order)
    cases = {result.key: result for result in results if result.key.stage == "pair"}
    batches = sorted({key.batch for key in cases})
    of_head = report.shares()
    rows = []
    for _, runtime, device, dtype in sorted({(key.order[3], key.runtime, key.device, key.dtype) for key in cases}):
        own = [key for key in cases if (key.runtime, key.device, key.dtype) == (runtime, device, dtype)]
        took = {key.batch: cases[key].latency for key in own}
        error = max((cases[key].error or 0.0 for key in own), default=0.0)
        rows.append(
            [
                runtime,
                dtype,
                *(span(t.p50, t.low, t.high) if (t := took.get(batch)) else "" for batch in batches),
                rate(max(cases[key].throughput for key in own), "pairs"),
                f"{error:.0e}" if error else "0",
                ", ".join(f"{100 * of_head[key].median:.2f}" if key in of_head else "-" for key in own) + " %",
            ]
        )
    columns = ["runtime", "backbone", *(f"{n} pair{'' if n == 1 else 's'} a call" for n in batches)]
    yield from markdown([*columns, "best throughput", "largest error", "head's share"], rows)


def table(kind: str) -> str:
    """Markdown of results/bench/cpu.json, or that it is pending.

    Args:
        kind: ``"short"`` (pairs by runtime), ``"shares"`` (of the head), ``"all"`` (every case, and what was left out);
            ``"gpu"``: pairs and all of the other files there, each of one GPU.
    """
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        if (path.name != "cpu.json") == (kind == "gpu"):
            report = read_report(path)
            lines = [heading(report), ""]
            lines += [*pairs(report), ""] if kind in ("short", "gpu") else []
            if kind == "shares":
                made = shares(report)
                lines += [f"{made.title}.", "", *markdown(made.columns, made.rows), ""]
            elif kind != "short":
                made = latency(report)
                lines += [*markdown(made.columns, made.rows), "", *(f"- {line}" for line in left_out(report))]
                lines += [f"- disturbed: {warning}" for warning in report.warnings]
            found.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(found) or PENDING
