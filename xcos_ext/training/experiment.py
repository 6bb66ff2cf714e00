"""Experiments: one TOML file each, whose ``task`` says which module reads its tables."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .settings import ConfigError, build, override, read_toml
from .task import Task

__all__ = ["TASKS", "create_task", "load_experiment"]

#: Task -> module with ``Experiment``, a dataclass with a field ``train: TrainConfig``, and ``create(experiment,
#: progress)``, which makes the task of it.
TASKS = {
    "decode": "xcos_ext.training.decode",
    "distill": "xcos_ext.training.distill",
    "head": "xcos_ext.training.head_task",
    "model": "xcos_ext.training.model_task",
}


def load_experiment(path: str | Path, assignments: Sequence[str] = ()) -> Any:
    """The settings of an experiment.

    Args:
        path: TOML file; paths in it are relative to the working directory.
        assignments: ``table.key=value``, put over the file's values.

    Returns:
        The ``Experiment`` of its task.

    Raises:
        ConfigError: a file, task, key or value that cannot be used.
    """
    tables = override(read_toml(path), assignments)
    try:
        return build(importlib.import_module(_module(tables.get("task"))).Experiment, tables)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def create_task(experiment: Any, progress: Callable[[str, int, int], None] | None = None) -> Task:
    """The task of an experiment; reads whatever data it needs.

    Args:
        experiment: from :func:`load_experiment`.
        progress: called with what is done, items done and items in all.
    """
    return importlib.import_module(TASKS[experiment.task]).create(experiment, progress)


def _module(task: object) -> str:
    if task is None:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got nothing")
    if task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, 1, 0.0)
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}; did you mean {near[0]}?")
    return TASKS[str(task)]
