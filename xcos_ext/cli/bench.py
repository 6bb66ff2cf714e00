"""``xcos bench``: how long the way to a score takes, stage by stage and runtime by runtime, and what changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from xcos_ext.io.errors import DeviceError, XCosError

from .console import bar, note, print_json, quiet_opencv
from .verify import check_model_path, chosen_device, is_graph, load

if TYPE_CHECKING:
    from xcos_ext.bench import Comparison, Report, Settings

__all__ = ["Request", "run"]

_STDOUT = "-"


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
        from .bench_tables import plain_console, print_comparison, print_report

        console = plain_console()
        if request.new is None:
            print_report(console, new, quiet=request.quiet)
        if comparison is not None:
            print_comparison(console, comparison)
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

    from xcos_ext.bench import Subject, default_picture, run

    devices, gpu = _devices(request.devices)
    settings = replace(settings, devices=devices)
    before = torch.get_num_threads()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    try:
        subject = Subject(
            load(path),
            picture=default_picture() if request.picture is None else request.picture,
            detector=request.detector,
            gallery=settings.gallery,
            seed=settings.seed,
        )
        silent = request.quiet or request.json_file == _STDOUT
        with torch.cuda.device(gpu), subject, bar("measuring", "cases", quiet=silent) as tick:
            report = run(subject, settings, progress=tick)
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
    from xcos_ext.bench.figure import bench_figure
    from xcos_ext.explain import save_figure

    try:
        figure = bench_figure(report)
    except ValueError as error:  # the cases that it would show could not be measured
        raise XCosError(f"--plot: {error}") from error
    save_figure(figure, path)
