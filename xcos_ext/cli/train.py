"""``xcos train``: an experiment's file in, a trained model out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .console import note, on_terminal, print_json

__all__ = ["Request", "run"]


@dataclass(frozen=True)
class Request:
    """The command line's options."""

    config: str
    assignments: tuple[str, ...] = ()
    out: str | None = None
    resume: bool = False
    threads: int | None = None
    as_json: bool = False


def _preparing() -> tuple[Callable[[str, int, int], None], Callable[[], None]]:
    """What reports progress while data is read, on a terminal, and what ends it."""
    if not on_terminal():
        return (lambda what, done, total: None), (lambda: None)
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if not tasks:
            bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)

    return progress, bar.stop


def run(request: Request) -> int:
    """Train, and say what came of it.

    Raises:
        XCosError: anything wrong with the settings, the data, the folder or the training.
    """
    from xcos_ext.training.tasks import create_task, load_experiment

    experiment = load_experiment(request.config, request.assignments)
    import torch

    from xcos_ext.training import train

    if request.threads is not None:
        torch.set_num_threads(request.threads)
    out = Path(request.out if request.out is not None else Path("runs") / Path(request.config).stem)
    first = os.environ.get("RANK", "0") == "0"
    progress, finish = _preparing()
    try:
        task = create_task(experiment, progress if first else None)
    finally:
        finish()
    report = getattr(task, "report", None)
    for line in report() if first and report is not None else ():
        note(line)
    result = train(task, experiment.train, out, resume=request.resume, show=first)
    if not first:
        return 0
    if request.as_json:
        print_json(
            {
                "out": str(out),
                "steps": result.steps,
                "resumed": result.resumed,
                "loss": result.loss if result.loss == result.loss else None,
                "metrics": dict(result.metrics),
                "seconds": result.seconds,
                "step_seconds": result.step_seconds,
                "files": [str(file) for file in result.files],
            }
        )
        return 0
    rows = [("steps", f"{result.steps}" + (f" ({result.resumed} before)" if result.resumed else ""))]
    rows.append(("loss", f"{result.loss:.6g}"))
    rows += [(name, f"{value:.6g}") for name, value in result.metrics.items()]
    rows.append(("time", f"{result.seconds:.1f} s, {1e3 * result.step_seconds:.1f} ms a step"))
    rows += [("written", str(file)) for file in result.files]
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        click.echo(f"{name:<{width}}{value}")
    return 0
