"""Trains the default model in a given time: as many steps as fit, measured on the machine that it runs on.

    python -m recipes.in_minutes .carry --minutes 8 --out runs/gpu

The folder is one of ``recipes.pack``. The schedule needs to know its end, so some steps are timed first. What comes out
is ``model.safetensors`` in fp16, the log and the evaluations.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from recipes.common import say
from recipes.student import Experiment, StudentTask, create
from xcos_ext.io.errors import XCosError
from xcos_ext.model import load_model, save_model
from xcos_ext.training import TrainConfig, train
from xcos_ext.training.settings import build, override

__all__ = ["steps_that_fit"]

_FIRST = 4  # steps before the clock runs: compiling takes the first ones, and with it
_TIMED = 12  # steps that are timed at most,
_SHARE = 0.1  # or this share of the time
_LEFT = 0.06  # share of the time kept for evaluation and files


def steps_that_fit(task: Callable[[], StudentTask], config: TrainConfig, seconds: float) -> int:
    """Steps that take so long in all, by the time of the first ones; at least one.

    Args:
        task: makes the task; what is timed is thrown away.
        config: how it will be trained.
        seconds: that are left.
    """
    started = time.monotonic()
    made = task()
    times: list[float] = []

    def tick(step: int, row: object) -> None:
        times.append(time.monotonic())
        if len(times) > _FIRST and times[-1] - times[0] > _SHARE * seconds:
            raise _EnoughError

    timed = dataclasses.replace(config, steps=_FIRST + _TIMED, log_every=1, evaluate_every=0, checkpoint_every=0)
    with contextlib.suppress(_EnoughError):
        made.evaluate = lambda module: {}  # type: ignore[method-assign]
        train(made, timed, show=False, on_step=tick)
    each = (times[-1] - times[_FIRST - 1]) / (len(times) - _FIRST)
    return max(1, int((seconds - (time.monotonic() - started)) * (1 - _LEFT) / each))


class _EnoughError(Exception):
    """Steps have been timed long enough."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of recipes.pack")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--minutes", type=float, required=True, help="for everything")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    try:
        out = options.out.absolute()
        settings = json.loads((options.data / "experiment.json").read_bytes())
        settings["train"] |= {"device": options.device, "log_every": 50, "evaluate_every": 0, "checkpoint_minutes": 0}
        if options.device == "cuda":
            settings["train"] |= {"amp": "bf16", "workers": max(1, len(os.sched_getaffinity(0)) - 2)}
            torch.backends.cudnn.benchmark = True
        experiment = build(Experiment, override(settings, options.assignments))
        os.chdir(options.data)  # paths are the folder's
        said = [0.0]

        def progress(what: str, done: int, total: int) -> None:
            if done == total or time.monotonic() - said[0] > 10:
                said[0] = time.monotonic()
                say(f"{what}: {done} of {total}")

        task = create(experiment, progress)

        def again() -> StudentTask:
            made = StudentTask(task.sources, experiment)
            if options.device == "cuda":
                made.grid = torch.compile(made.grid)
            return made

        steps = steps_that_fit(again, experiment.train, end - time.monotonic())
        say(f"{steps} steps of {experiment.train.batch} fit")
        config = dataclasses.replace(experiment.train, steps=steps, warmup=min(experiment.train.warmup, steps // 10))
        result = train(again(), config, out, show=False, on_step=lambda step, row: say(f"{step}: {json.dumps(row)}"))
        say(json.dumps({"steps": result.steps, "step_seconds": result.step_seconds, **result.metrics}))
        save_model(load_model(result.files[0]), out / "model.safetensors", dtype=torch.float16)
        (out / "checkpoint.safetensors").unlink(missing_ok=True)  # four times the weights: too large to be fetched
    except (XCosError, OSError, ValueError) as error:
        say(f"in_minutes: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
