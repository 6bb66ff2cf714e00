"""``xcos bench``: how long the way to a score takes, stage by stage and runtime by runtime, and what changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import DeviceError, XCosError
from xcos_ext.io.optional import need
from xcos_ext.io.text import display_name

from . import options
from .console import bar, echo, note, one_line, print_json, print_tables
from .inputs import check_model_path, chosen_device, is_graph, load, write_text

if TYPE_CHECKING:
    from xcos_ext.bench import Report, Settings
    from xcos_ext.bench.tables import Table

_STDOUT = "-"
_STYLES = {"slower": "red", "faster": "green", "unclear": "yellow"}


@options.command("bench")
@click.argument("new", required=False, type=click.Path(), metavar="[NEW.json]")
@options.model
@options.choice(
    "--stage",
    "stages",
    values=["decode", "detect", "align", "backbone", "projection", "head", "pair", "search"],
    default=(),
    help="May be repeated. [default: all]",
)
@options.choice(
    "--runtime",
    "runtimes",
    values=["eager", "for_inference", "compiled", "graph", "onnxruntime", "tensorrt"],
    default=(),
    help="May be repeated. [default: all]",
)
@click.option(
    "--batch",
    "batches",
    type=options.Whole(1, options.MOST_AT_ONCE),
    multiple=True,
    metavar="N",
    help="Pictures, pairs or probes a call; may be repeated. [default: 1, 4 and 16]",
)
@click.option(
    "--device",
    "devices",
    type=options.device_name,
    multiple=True,
    default=("auto",),
    show_default=True,
    metavar=options.DEVICES,
    help="May be repeated; auto: CUDA if it works.",
)
@options.choice(
    "--dtype",
    "dtypes",
    values=["fp32", "bf16", "fp16"],
    default=("fp32",),
    help="Of the backbone and of searched templates; may be repeated.",
)
@options.number("--threads", most=options.MOST_THREADS, help="Threads of every runtime. [default: torch's]")
@click.option(
    "--seconds",
    type=options.Real(0.01, 3600),
    default=0.5,
    show_default=True,
    metavar="S",
    help="To spend on a case, making its runtime ready not counted.",
)
@click.option("--cold", is_flag=True, help="Empty the caches before every call.")
@options.number("--gallery", default=20_000, most=100_000_000, help="Generated faces that search goes through.")
@click.option(
    "--picture",
    metavar="FILE",
    type=click.Path(),
    help="A photograph of a face, for decode, detect, align. [default: that of a checkout; none if installed]",
)
@options.detector
@click.option(
    "--compare",
    "old",
    metavar="OLD.json",
    type=click.Path(),
    help="Say what changed since OLD.json; with NEW.json nothing is measured.",
)
@click.option(
    "--minimum",
    type=options.Real(0, 1, max_open=True),
    metavar="X",
    help="The smallest change that counts. [default: 0.05]",
)
@options.figure("--plot", "latency and stages")
@click.option(
    "--json",
    "json_file",
    metavar="FILE|-",
    type=options.Written(".json", dash=True),
    help="Write all figures and samples; - prints them instead of tables.",
)
@options.quiet
def run(
    new: str | None,
    model: str | None,
    devices: tuple[str, ...],
    threads: int | None,
    picture: str | None,
    detector: str,
    old: str | None,
    minimum: float | None,
    plot: str | None,
    json_file: str | None,
    quiet: bool,
    **chosen: Any,
) -> int:
    """Latency and throughput of a model on this machine, by stage and runtime; or what changed between two runs.

    Runtimes that are missing here are listed with the reason. Nothing else should run meanwhile.
    """
    # Cheap checks first: a typing error should not cost a minute of measuring.
    if new is not None and old is None:
        raise XCosError(f"{new}: a file to compare with is named by --compare OLD.json, which is missing")
    if minimum is not None and old is None:
        raise XCosError("--minimum: expected --compare with it, got none")
    need("rich", "printing tables")
    if old is not None:
        need("scipy", "comparing measurements")
    silent = quiet or json_file == _STDOUT
    from xcos_ext.bench import Settings, compare, read_report

    before = None if old is None else read_report(old)
    if new is not None:
        report = read_report(new)
    else:
        settings = Settings(**{name: value for name, value in chosen.items() if value != ()})
        if plot is not None and not {"pair", "backbone"} & set(settings.stages):
            raise XCosError("--plot: expected --stage pair or backbone among those that are measured, got neither")
        report = _measured(model, settings, devices, threads, picture, detector, silent)
    comparison = None
    if before is not None:
        comparison = compare(before, report, **({} if minimum is None else {"minimum": minimum}))
        if comparison.warning:
            note(comparison.warning)
    # Of two files the comparison, else the report, which stays one that can be read again.
    data = report.as_dict() if new is None or comparison is None else comparison.as_dict()
    if new is None and comparison is not None:
        data["comparison"] = comparison.as_dict()
    if json_file == _STDOUT:
        print_json(data)
    else:
        from xcos_ext.bench import tables

        if new is None:
            below = [*tables.left_out(report), *([] if quiet else tables.summary(report))]
            _say([tables.latency(report), tables.shares(report)], below)
        if comparison is not None:
            changes, below = tables.changes(comparison)
            _say([changes], below)
        if json_file is not None:
            write_text(json_file, json.dumps(data, indent=1, allow_nan=False) + "\n")
    if plot is not None:
        _draw(report, plot)
    if not silent:
        for title, path in (("all figures", json_file), ("picture", plot)):
            if path is not None:
                echo(f"{title}: {display_name(path)}")
    return 0


def _devices(names: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Kinds of devices, and the number of the GPU; -1 where there is none."""
    devices = dict.fromkeys(chosen_device(name) for name in names)
    gpus = [device for device in devices if device.type == "cuda"]
    if len(gpus) > 1:
        raise DeviceError(f"--device: expected one GPU, got {' and '.join(map(str, gpus))}")
    return tuple(device.type for device in devices), gpus[0].index if gpus else -1


def _measured(
    model: str | None,
    settings: Settings,
    devices: Sequence[str],
    threads: int | None,
    picture: str | None,
    detector: str,
    quiet: bool,
) -> Report:
    """Measure on this machine."""
    path = check_model_path(model)
    if is_graph(path):
        raise XCosError(f"{path}: expected a model in torch, of which graphs are made here, got an ONNX graph")
    from xcos_ext.faces import create_detector, read_picture

    if picture is not None:
        read_picture(picture)
    if detector != "small":
        create_detector(detector)
    import torch

    from xcos_ext.bench import Workload, default_picture, run

    kinds, gpu = _devices(devices)
    settings = replace(settings, devices=kinds)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        workload = Workload(
            load(path),
            picture=default_picture() if picture is None else picture,
            detector=detector,
            gallery=settings.gallery,
            seed=settings.seed,
        )
        with torch.cuda.device(gpu), workload, bar("measuring", "cases", quiet=quiet) as tick:
            report = run(workload, settings, progress=tick)
    finally:
        torch.set_num_threads(before)
    for warning in report.warnings:
        note(warning)
    if not report.results:
        reasons = dict.fromkeys(skipped.reason for skipped in report.skipped)
        raise XCosError(f"nothing could be measured: {'; '.join(reasons)}")
    return report


def _say(tables: Sequence[Table], lines: Iterable[str]) -> None:
    """Print tables and then lines, which may have names from files that come from anywhere."""
    from rich import box
    from rich.table import Table as Shown
    from rich.text import Text

    frame = box.ROUNDED if sys.stdout.isatty() else None
    made = []
    for one in tables:
        if not one.rows:
            continue
        shown = Shown(title=Text(one.title, "table.title"), box=frame)
        for place, column in enumerate(one.columns):
            shown.add_column(column, justify="left" if place < one.left else "right")
        group: list[str] = []
        for row in one.rows:
            if row[: one.grouped] != group:
                shown.add_section()
            group = row[: one.grouped]
            shown.add_row(*(Text(one_line(cell), _STYLES.get(cell, "")) for cell in row))
        made.append(shown)
    print_tables(*made)
    for line in lines:
        echo(one_line(line))


def _draw(report: Report, path: str) -> None:
    from xcos_ext.bench.plot import plot_report
    from xcos_ext.explain import save_figure

    try:
        figure = plot_report(report)
    except ValueError as error:  # the cases that it would show could not be measured
        raise XCosError(f"--plot: {error}") from error
    save_figure(figure, path)
