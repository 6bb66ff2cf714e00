"""Settings of the engine: the table ``[train]`` of an experiment's file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from .settings import ConfigError, number

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train, whatever the task.

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
    """

    steps: int = number(minimum=1)
    batch: int = number(minimum=1)
    accumulate: int = number(1, minimum=1)
    optimiser: Literal["adamw", "muon", "sgd"] = "adamw"
    rate: float = number(1e-3, above=0)
    weight_decay: float = number(0.0, minimum=0)
    momentum: float = number(0.9, minimum=0, below=1)
    beta2: float = number(0.999, minimum=0, below=1)
    warmup: int = number(0, minimum=0)
    final_rate: float = number(0.0, minimum=0, maximum=1)
    clip: float | None = number(None, above=0)
    ema: float = number(0.0, minimum=0, below=1)
    amp: Literal["off", "bf16", "fp16"] = "off"
    seed: int = number(0, minimum=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = number(2, minimum=0)
    log_every: int = number(10, minimum=1)
    evaluate_every: int = number(0, minimum=0)
    checkpoint_every: int = number(0, minimum=0)
    checkpoint_minutes: float = number(10.0, minimum=0)
    tensorboard: bool = False

    #: Settings that may differ when a training is resumed: they do not change what is computed.
    FREE = ("device", "workers", "log_every", "evaluate_every", "checkpoint_every", "checkpoint_minutes", "tensorboard")

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
