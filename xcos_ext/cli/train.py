"""``xcos train``: an experiment's file in, a trained model out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import click

from . import options
from .console import bar, note, print_json, print_rows


@options.command("train")
@click.argument("config", type=click.Path())
@click.option(
    "--set", "assignments", multiple=True, metavar="TABLE.KEY=VALUE", help="Change a setting of the file; repeatable."
)
@click.option("--out", metavar="DIR", type=click.Path(), help="Folder for the results.  [default: runs/CONFIG's name]")
@click.option("--resume", is_flag=True, help="Go on from the folder's checkpoint.")
@options.number("--threads", most=options.MOST_THREADS, help="Threads of torch's operators.")
@options.as_json
def run(
    config: str, assignments: tuple[str, ...], out: str | None, resume: bool, threads: int | None, as_json: bool
) -> int:
    """Train a head or a model as a TOML file says; with torchrun, on several processes.

    The folder gets a log (CSV), checkpoints that resume to the bit, and the model. Files for a start are in
    recipes/ of a checkout.
    """
    from xcos_ext.io.atomic import check_apart, local_path
    from xcos_ext.training.tasks import create_task, load_experiment

    experiment = load_experiment(config, assignments)
    import torch

    from xcos_ext.training import train
    from xcos_ext.training.engine import CHECKPOINT, EVALUATIONS, LOG

    if threads is not None:
        torch.set_num_threads(threads)
    folder = out if out is not None else os.path.join("runs", os.path.splitext(os.path.basename(config))[0])
    local_path(folder)
    written = (CHECKPOINT, LOG, EVALUATIONS, "model.safetensors")
    check_apart(
        {f"--out {name}": os.path.join(folder, name) for name in written}, [("CONFIG", config), *_read(experiment)]
    )
    first = os.environ.get("RANK", "0") == "0"
    with bar("", "", quiet=not first) as tick:
        task = create_task(experiment, lambda what, done, total: tick(done, total, what))
    report = getattr(task, "report", None)
    for line in report() if first and report is not None else ():
        note(line)
    result = train(task, experiment.train, folder, resume=resume, show=first)
    if not first:
        return 0
    if as_json:
        data = {name: getattr(result, name) for name in ("steps", "resumed", "seconds", "step_seconds")}
        data |= {"loss": result.loss if result.loss == result.loss else None, "metrics": dict(result.metrics)}
        print_json({"out": folder, **data, "files": [str(file) for file in result.files]})
        return 0
    print_rows(
        ("steps", f"{result.steps}" + (f" ({result.resumed} before)" if result.resumed else "")),
        ("loss", f"{result.loss:.6g}"),
        *((name, f"{value:.6g}") for name, value in result.metrics.items()),
        ("time", f"{result.seconds:.1f} s, {1e3 * result.step_seconds:.1f} ms a step"),
        *(("written", str(file)) for file in result.files),
    )
    return 0


def _read(settings: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The settings that may name files: all texts."""
    if isinstance(settings, str):
        yield name, settings
    elif dataclasses.is_dataclass(settings):
        for field in dataclasses.fields(settings):
            yield from _read(getattr(settings, field.name), f"{name}.{field.name}".lstrip("."))
