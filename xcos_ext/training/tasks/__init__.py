"""Experiments: one TOML file each, whose ``task`` says which module reads its tables."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..settings import ConfigError, build, override, read_toml
from ..task import Task

__all__ = ["TASKS", "create_task", "load_experiment"]

#: Built-in task -> its module. A module of a task has ``Experiment``, a pydantic dataclass with fields ``task: str``
#: and ``train: TrainConfig``, and ``create(experiment, progress)``, which makes the task of it.
TASKS = {"head": f"{__name__}.head", "model": f"{__name__}.head"}


def load_experiment(path: str | Path, assignments: Sequence[str] = ()) -> Any:
    """The settings of an experiment.

    Args:
        path: TOML file; paths in it are relative to the working directory. Its ``task`` is one of :data:`TASKS`, or a
            module ``package.module`` that can be imported from the working directory, whose code is run.
        assignments: ``table.key=value``, put over the file's values.

    Returns:
        The ``Experiment`` of its task.

    Raises:
        ConfigError: a file, task, key or value that cannot be used.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
    ...     _ = file.write("task = 'head'"), file.flush()
    ...     settings = ["data.pictures=faces", "model.recogniser=net.pt", "train.steps=20", "train.batch=8"]
    ...     load_experiment(file.name, settings).train.steps
    20
    """
    tables = override(read_toml(path), assignments)
    try:
        return build(_module(tables.get("task")).Experiment, tables)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def create_task(experiment: Any, progress: Callable[[str, int, int], None] | None = None) -> Task:
    """The task of an experiment; reads whatever data it needs.

    Args:
        experiment: from :func:`load_experiment`.
        progress: called with what is done, items done and items in all.
    """
    task: Task = _module(experiment.task).create(experiment, progress)
    return task


def _module(task: object) -> ModuleType:
    known = f"task: expected one of {', '.join(TASKS)}, or a module as package.module"
    if not isinstance(task, str):
        raise ConfigError(f"{known}, got {'nothing' if task is None else repr(task)}")
    if task not in TASKS and "." not in task:
        near = difflib.get_close_matches(task, TASKS, 1, 0.0)
        raise ConfigError(f"{known}, got {task!r}; did you mean {near[0]}?")
    if os.getcwd() not in sys.path:  # the command `xcos` does not look there by itself
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(TASKS.get(task, task))
    except ModuleNotFoundError as error:
        if error.name is None or not f"{task}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"task: there is no module {task} in {os.getcwd()}; run the command from the folder that holds "
            f"{task.partition('.')[0]}/ (a checkout, for recipes)"
        ) from error
    if not hasattr(module, "Experiment") or not hasattr(module, "create"):
        raise ConfigError(f"task: expected a module with Experiment and create, got {task}")
    return module
