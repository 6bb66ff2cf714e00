"""``xcos bench``: how long the way to a score takes, stage by stage and runtime by runtime, and what changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from xcos_ext.io.durations import duration, rate, span
from xcos_ext.io.errors import DeviceError, XCosError

from .console import bar, note, one_line, print_json, quiet_opencv
from .verify import check_model_path, chosen_device, is_graph, load

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from xcos_ext.bench import Comparison, Key, Report, Settings, Share

__all__ = ["Request", "run"]

_STDOUT = "-"
_STYLES = {"slower": "red", "faster": "green", "unclear": "yellow", "same": ""}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line's options; None and () mean the default."""

    new: str | None = None
    model: str | None = None
    stages: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    devices: tuple[str, ...] = ("auto",)
    dtypes: tuple[str, ...] = ()
    threads: int | None = None
    seconds: float | None = None
    cold: bool = False
    gallery: int | None = None
    picture: str | None = None
    detector: str = "cascade"
    old: str | None = None
    minimum: float | None = None
    plot: str | None = None
    json_file: str | None = None
    quiet: bool = False


def run(request: Request) -> int:
    """Measure, or read what was measured; print, draw, write, compare.

    Returns:
        0.

    Raises:
        XCosError: anything wrong with the model, the picture, the files to compare or the output; nothing could be
            measured.
    """
    # Cheap checks first: a typing error should not cost a minute of measuring.
    quiet_opencv()
    if request.new is not None and request.old is None:
        raise XCosError(f"{request.new}: a file to compare with is named by --compare OLD.json, which is missing")
    if request.minimum is not None and request.old is None:
        raise XCosError("--minimum: expected --compare with it, got none")
    _check_outputs(request)
    from xcos_ext.bench import compare, read_report

    old = None if request.old is None else read_report(request.old)
    new = read_report(request.new) if request.new is not None else _measured(request)
    comparison = None
    if old is not None:
        options = {} if request.minimum is None else {"minimum": request.minimum}
        comparison = compare(old, new, **options)
        if comparison.warning:
            note(comparison.warning)
    if request.json_file == _STDOUT:
        print_json(_document(request, new, comparison))
    else:
        console = _console()
        if request.new is None:
            _print_report(console, new, quiet=request.quiet)
        if comparison is not None:
            _print_comparison(console, comparison)
        if request.json_file is not None:
            _write(_document(request, new, comparison), request.json_file)
    if request.plot is not None:
        _draw(new, request.plot)
    if not request.quiet and request.json_file != _STDOUT:
        from xcos_ext.faces import display_name

        for title, path in (("all figures", request.json_file), ("picture", request.plot)):
            if path is not None:
                print(f"{title}: {display_name(path)}")
    return 0


def _document(request: Request, new: Report, comparison: Comparison | None) -> dict[str, Any]:
    """What ``--json`` gets: of two files the comparison, else the report, which stays one that can be read again."""
    if comparison is None:
        return new.as_dict()
    if request.new is not None:
        return comparison.as_dict()
    return {**new.as_dict(), "comparison": comparison.as_dict()}


def _check_outputs(request: Request) -> None:
    from xcos_ext.io.optional import need

    need("rich", "printing tables")
    if request.json_file not in (None, _STDOUT):
        from xcos_ext.io.atomic import check_output

        check_output(str(request.json_file), (".json",))
    if request.plot is not None:
        from xcos_ext.explain import check_figure_path

        check_figure_path(request.plot)
        need("matplotlib", "drawing")
    if request.old is not None:
        need("scipy", "comparing measurements")


def _settings(request: Request) -> Settings:
    from xcos_ext.bench import Settings

    given = {
        name: value
        for name in ("stages", "runtimes", "batches", "dtypes", "seconds", "gallery")
        if (value := getattr(request, name)) not in (None, ())
    }
    try:
        return Settings(**given, cold=request.cold)
    except ValueError as error:
        raise XCosError(str(error)) from error


def _devices(names: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Kinds of devices, and the number of the GPU; -1 where there is none."""
    devices = dict.fromkeys(chosen_device(name) for name in names)
    gpus = [device for device in devices if device.type == "cuda"]
    if len(gpus) > 1:
        raise DeviceError(f"--device: expected one GPU, got {' and '.join(map(str, gpus))}")
    return tuple(device.type for device in devices), gpus[0].index if gpus else -1


def _measured(request: Request) -> Report:
    """Measure on this machine."""
    settings = _settings(request)
    path = check_model_path(request.model)
    if is_graph(path):
        raise XCosError(f"{path}: expected a model in torch, of which graphs are made here, got an ONNX graph")
    if request.plot is not None and not {"pair", "backbone"} & set(settings.stages):
        raise XCosError("--plot: expected --stage pair or backbone among those that are measured, got neither")
    from xcos_ext.faces import create_detector, display_name, read_picture

    if request.picture is not None:
        read_picture(request.picture)
    if request.detector != "cascade":
        try:
            create_detector(request.detector)
        except ValueError as error:
            raise XCosError(str(error)) from error
    import torch

    from xcos_ext.bench import Workload, default_picture, run

    devices, gpu = _devices(request.devices)
    settings = replace(settings, devices=devices)
    before = torch.get_num_threads()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    try:
        workload = Workload(
            load(path),
            picture=default_picture() if request.picture is None else request.picture,
            detector=request.detector,
            gallery=settings.gallery,
            seed=settings.seed,
        )
        silent = request.quiet or request.json_file == _STDOUT
        with torch.cuda.device(gpu), workload, bar("measuring", "cases", quiet=silent) as tick:
            report = run(workload, settings, progress=tick)
    finally:
        torch.set_num_threads(before)
    for warning in report.warnings:
        note(warning)
    if not report.results:
        reasons = dict.fromkeys(skipped.reason for skipped in report.skipped)
        raise XCosError(f"{display_name(path)}: nothing could be measured: {'; '.join(reasons)}")
    return report


def _write(data: dict[str, Any], path: str) -> None:
    from xcos_ext.io.atomic import write_atomically

    text = json.dumps(data, indent=1, allow_nan=False) + "\n"

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_atomically(path, write)


def _draw(report: Report, path: str) -> None:
    from xcos_ext.bench.plot import plot_report
    from xcos_ext.explain import save_figure

    try:
        figure = plot_report(report)
    except ValueError as error:  # the cases that it would show could not be measured
        raise XCosError(f"--plot: {error}") from error
    save_figure(figure, path)


# --- tables


def _console() -> Console:
    """Where tables are printed."""
    from rich.console import Console

    # Where nobody looks at a terminal, lines are not cut to its width.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 170, highlight=False)


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


def _print_report(console: Console, report: Report, *, quiet: bool) -> None:
    """Latency of every case, the head's share, what was left out, and what the figures belong to (not if quiet)."""
    from xcos_ext.bench import STAGES

    results = report.results
    columns = ["stage", "batch", "runtime", "device", "dtype"]
    columns += ["p50 of a call (95 %)", "p90", "p99", "throughput", "error"]
    cold = " with cold caches" if report.settings.get("cold") else ""
    table = _table(f"Latency{cold}", columns, 5)
    before = None
    for result in sorted(results, key=lambda result: result.key.order):
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
    shares = {part: found for part in ("head", "projection") if (found := report.shares(part))}
    if shares:
        console.print()
        console.print(_share_table(shares))
    if report.skipped:
        console.print("\nnot measured:")
        for line in _left_out(report):
            console.print(f"  {line}", soft_wrap=True)
    if not quiet:
        console.print()
        for line in _summary(report):
            console.print(line, soft_wrap=True)


def _share_table(shares: dict[str, dict[Key, Share]]) -> Table:
    """A row for each part, runtime, device and dtype; a column for each batch."""
    from xcos_ext.bench.results import HEAD_TARGET

    batches = sorted({key.batch for found in shares.values() for key in found})
    table = _table(
        f"Share of a pair's time (95 %), of the fastest calls; aim for the head: under {100 * HEAD_TARGET:g} %",
        ["part", "runtime", "device", "dtype", *(f"batch {batch}" for batch in batches)],
        4,
    )
    for part, found in shares.items():
        rows: dict[tuple[str, str, str], dict[int, str]] = {}
        for key, share in sorted(found.items(), key=lambda item: item[0].order):
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
    clocks = start.get("mhz")
    parts = [
        report.place,
        f"torch {machine['torch']}",
        f"{clocks[0]:,.0f} – {clocks[1]:,.0f} MHz" if clocks else "clocks unknown",
        f"governor {start.get('governor') or 'unknown'}",
        f"load {start.get('load')} at the start",
    ]
    yield _plain(f"{report.model['name']} ({report.model['fingerprint']}) on {'; '.join(parts)}")
    spent = sum(group["seconds"] for group in report.groups)
    made = sum(result.preparation for result in report.results)
    yield f"{spent:.0f} s of measuring, {made:.0f} s of making runtimes ready"


def _print_comparison(console: Console, comparison: Comparison) -> None:
    """Every case that both runs have, changes first."""
    table = _table("Changes", ["case", "old", "new", "new / old (99 %)", "verdict"], 1)
    order = list(_STYLES)
    for change in sorted(comparison.changes, key=lambda change: (order.index(change.verdict), change.key.order)):
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
