"""Settings: typed frozen dataclasses read from TOML, every mistake named by its key; those of the engine."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from xcos_ext.io.errors import XCosError
from xcos_ext.io.several import several

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["NONE", "SETTINGS", "ConfigError", "TrainConfig", "build", "override", "read_toml"]

Settings = TypeVar("Settings")

#: How classes of settings are made: ``@dataclass(frozen=True, config=SETTINGS)`` of pydantic.
SETTINGS = ConfigDict(extra="forbid", allow_inf_nan=False)
#: In an optional field's type, last: TOML has no null, so the text "none" stands for it.
NONE = BeforeValidator(lambda value: None if value == "none" else value)


# Names in a row that an assignment may have; no settings lie so deep.
_DEEPEST = 16


class ConfigError(XCosError, ValueError):
    """A setting that cannot be used; the message names its key, what was expected and what came."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: missing, unreadable, or not TOML; the message names line and column.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for, a device read without end
            raise ConfigError(f"{file}: expected a TOML file, got something that is not a regular file")
        # With the mark that some editors write; dotted keys nest without a bracket, so the copy is what may fail.
        return copy.deepcopy(tomllib.loads(file.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and what nests too deep
        raise ConfigError(f"{file}: not a TOML file ({error})") from error


def override(tables: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Tables with ``table.key=value`` assignments applied; values are TOML, bare words are strings.

    Raises:
        ConfigError: an assignment of another form.

    >>> override({"train": {"steps": 1}}, ["train.steps=20", "loss.kind=l1"])
    {'train': {'steps': 20}, 'loss': {'kind': 'l1'}}
    """
    result: dict[str, Any] = copy.deepcopy(dict(tables))
    for assignment in several(assignments, "assignments"):
        name, equals, text = assignment.partition("=")
        keys = [key.strip() for key in name.split(".")]
        if not equals or not all(keys) or len(keys) > _DEEPEST:
            raise ConfigError(f"--set {assignment}: expected table.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text.strip()
        table = result
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {assignment}: {key} is a value, not a table")
        table[keys[-1]] = value
    return result


def build(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """A settings object from a table; nested dataclasses, of pydantic with :data:`SETTINGS`, are tables in it.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing one, or a value of a wrong type or size.

    >>> build(TrainConfig, {"steps": 10, "batch": 8, "rate": 0.1}).optimiser
    'adamw'
    >>> build(TrainConfig, {"steps": 10, "batch": 8, "rte": 0.1})
    Traceback (most recent call last):
    xcos_ext.training.settings.ConfigError: rte: no such setting; did you mean rate?
    """
    try:
        # As JSON, which has the types that TOML has: a list is a tuple, but 1.5, true and "1" are no whole numbers.
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_mistake(kind, error.errors()[0])) from error


def _mistake(kind: Any, found: Any) -> str:
    """One of pydantic's errors in a line that starts with the setting's key."""
    keys = [part for part in found["loc"] if isinstance(part, str)]
    key = ".".join(keys)
    if found["type"] == "unexpected_keyword_argument":
        for name in keys[:-1]:
            kind = kind.__pydantic_fields__[name].annotation
        near = difflib.get_close_matches(keys[-1], kind.__pydantic_fields__, 1, 0.0)
        return f"{key}: no such setting; did you mean {'.'.join([*keys[:-1], near[0]])}?"
    if found["type"] == "missing":
        return f"{key}: expected a value, got nothing"
    return f"{key}: {found['msg'].replace('Input should be', 'expected')}, got {found['input']!r}"


@dataclass(frozen=True, config=SETTINGS)
class TrainConfig:
    """How to train, whatever the task: the table ``[train]`` of an experiment's file.

    Attributes:
        steps: optimiser steps.
        batch: samples of one optimiser step, over all processes and micro-steps.
        accumulate: micro-steps per optimiser step and process, for batches that do not fit in memory.
        optimiser: ``"adamw"`` (betas 0.9 and ``beta2``), ``"sgd"`` (with ``momentum``), or ``"muon"`` (with
            ``momentum``, for the kernels that a task names; AdamW for the rest).
        rate: highest learning rate.
        weight_decay: decoupled for adamw, L2 for sgd.
        momentum: of sgd and muon.
        beta2: of adamw, muon's too.
        warmup: steps over which the rate rises.
        final_rate: share of ``rate`` that the cosine ends at.
        clip: largest norm of the gradient, or none.
        ema: decay of the averaged weights that are evaluated and exported; 0: the last weights are.
        amp: autocast type: ``"off"``, ``"bf16"``, or ``"fp16"`` with scaled gradients (CUDA only).
        seed: of batches and of everything random in a step.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.
        workers: threads that prepare batches ahead; 0: prepared when needed. No effect on results.
        log_every: steps between two rows of the log.
        evaluate_every: steps between evaluations; 0: at the end only.
        checkpoint_every: steps between checkpoints; 0: none by steps.
        checkpoint_minutes: minutes between checkpoints; 0: none by time. One is written at the end in any case.
        tensorboard: also write events for TensorBoard.

    >>> TrainConfig(steps=10, batch=64, accumulate=2).part_size(world=4)
    8
    """

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimiser: Literal["adamw", "muon", "sgd"] = "adamw"
    rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    warmup: int = Field(default=0, ge=0)
    final_rate: float = Field(default=0.0, ge=0, le=1)
    clip: Annotated[float | None, Field(gt=0), NONE] = None
    ema: float = Field(default=0.0, ge=0, lt=1)
    amp: Literal["off", "bf16", "fp16"] = "off"
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = Field(default=2, ge=0)
    log_every: int = Field(default=10, ge=1)
    evaluate_every: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=0, ge=0)
    checkpoint_minutes: float = Field(default=10.0, ge=0)
    tensorboard: bool = False

    #: Settings that may differ when a training is resumed: they do not change what is computed.
    FREE: ClassVar = frozenset(
        ("device", "workers", "log_every", "evaluate_every", "checkpoint_every", "checkpoint_minutes", "tensorboard")
    )

    def fixed(self) -> dict[str, object]:
        """The settings that a resumed training must share."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in self.FREE}

    def part_size(self, world: int) -> int:
        """Samples of one micro-step of one process.

        Raises:
            ConfigError: the batch cannot be split evenly.
        """
        parts = self.accumulate * world
        if self.batch % parts:
            raise ConfigError(
                f"train.batch: expected a multiple of {parts} ({world} processes x {self.accumulate} micro-steps), "
                f"got {self.batch}"
            )
        return self.batch // parts
