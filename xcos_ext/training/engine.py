"""The training loop: any task, on one process or several, resumable to the bit."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xcos_ext.backbones.modes import kept_modes
from xcos_ext.io.atomic import OutputError, local_path
from xcos_ext.io.errors import XCosError

from .logs import Log, Means, Progress, tensorboard_writer
from .optimiser import create_optimiser
from .parallel import Processes, mean_over_processes, prefetch, processes
from .settings import ConfigError, TrainConfig
from .state import Checkpoint, averaged_model, load_optimiser, optimiser_tensors
from .task import BatchIndex, Task, derived_seed

__all__ = ["CHECKPOINT", "TrainResult", "train", "warmup_cosine"]

#: Names of the files in a training's folder.
CHECKPOINT, LOG, EVALUATIONS = "checkpoint.safetensors", "log.csv", "evaluations.csv"

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainResult:
    """What a training ended with.

    Attributes:
        steps: optimiser steps done in all.
        resumed: steps that were done before this run.
        loss: of the last step; NaN if none was done.
        metrics: of the last evaluation.
        seconds: that this run took, evaluation and files included.
        step_seconds: mean time of its steps.
        files: that the task exported.
    """

    steps: int
    resumed: int
    loss: float
    metrics: Mapping[str, float]
    seconds: float
    step_seconds: float
    files: list[Path]


def train(
    task: Task,
    config: TrainConfig,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    show: bool = True,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> TrainResult:
    """Train a task.

    Everything random is a function of the seed and of where in the training it is drawn, so a training that was
    killed and resumed from its last checkpoint ends with the same bits as one that was not (same machine, same number
    of threads and processes).

    Under ``torchrun`` every process trains its parts of each batch and gradients are averaged; the first one writes.

    Args:
        task: what to train; its ``module`` is left with the trained weights (not the averaged ones).
        config: how.
        out: folder for log, checkpoints and exported files; None writes nothing.
        resume: go on from the folder's checkpoint, or start if there is none.
        show: progress on stderr.
        on_step: called with the step's number, from 1, and its log values, after each step that is logged.

    Returns:
        :class:`TrainResult`.

    Raises:
        XCosError: a setting, file or checkpoint that cannot be used, or a loss that is not finite.

    >>> class Zeros:  # learns to say 0, whatever it is given
    ...     module = nn.Linear(4, 1)
    ...     def parameter_groups(self): return [{"params": list(self.module.parameters())}]
    ...     def batch(self, index, size): return torch.randn(size, 4, generator=index.generator(own=True))
    ...     def loss(self, batch): return self.module(batch).square().mean(), {}
    ...     def describe(self): return {}
    ...     def evaluate(self, module): return {"size": float(module.weight.abs().max())}
    >>> result = train(Zeros(), TrainConfig(steps=60, batch=8, rate=0.1, workers=0), show=False)
    >>> result.steps, result.metrics["size"] < 0.05
    (60, True)
    """
    device = _device(config)
    folder = None if out is None else local_path(out).absolute()  # written to all along, wherever os.chdir goes
    with processes(device) as group:
        if device.type == "cuda":
            device = torch.device("cuda", group.local if group.world > 1 else torch.cuda.current_device())
            torch.cuda.set_device(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return _Run(task, config, folder, device, group, resume, show and group.first, on_step).run()


def warmup_cosine(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Factor of the learning rate: a linear rise over ``warmup`` steps, then half a cosine down to ``final``.

    (Loshchilov and Hutter, SGDR, arXiv 1608.03983, one period.)

    Args:
        step: from 0 to ``steps`` - 1.
        steps: of the whole training.
        warmup: steps of the rise; the first has factor 1 / ``warmup``.
        final: factor that the cosine ends at.

    >>> [round(warmup_cosine(step, 12, 2), 3) for step in (0, 1, 2, 7, 11)]
    [0.5, 1.0, 1.0, 0.5, 0.024]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _device(config: TrainConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("train.device: expected a GPU that torch can use, got none; use 'cpu'")
    device = torch.device("cuda" if available and config.device != "cpu" else "cpu")
    if config.amp == "fp16" and device.type != "cuda":
        raise ConfigError("train.amp: expected 'off' or 'bf16' on a CPU, got 'fp16'")
    return device


class _Loss(nn.Module):
    """A task's loss as a module's forward pass, which is what ``DistributedDataParallel`` wraps."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.module = task.module
        self._loss = task.loss

    def forward(self, batch: Any) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        return self._loss(batch)


def _to(batch: Any, device: torch.device) -> Any:
    """Every tensor of nested tuples, lists and dicts on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(value, device) for value in batch)
    return batch


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise XCosError(
            f"step {step}: the loss is {loss}; lower train.rate or set train.clip (the last checkpoint stays as it is)"
        )
    return loss


class _Run:
    """One call of :func:`train`."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        out: Path | None,
        device: torch.device,
        group: Processes,
        resume: bool,
        show: bool,
        on_step: Callable[[int, Mapping[str, float]], None] | None,
    ) -> None:
        self.task, self.config, self.out, self.device, self.group = task, config, out, device, group
        self.on_step = on_step
        self.size = config.part_size(group.world)
        self.started = time.monotonic()
        self.module = task.module.to(device)
        self.must_match = {"train": config.fixed(), "task": dict(task.describe()), "processes": group.world}
        self.optimiser = create_optimiser(task, self.module, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.ema = averaged_model(self.module, config.ema) if config.ema > 0 else None
        self.means = Means(device)
        self.step = 0
        self.loss = math.nan
        self.metrics: Mapping[str, float] = {}
        if out is not None:
            self._open_folder(out, resume)
        self.resumed = self.step
        self.progress = Progress(config.steps, self.step, show)
        self.log = self.evaluations = self.events = None
        if out is not None and group.first:
            self.events = tensorboard_writer(out, self.step) if config.tensorboard else None
            self.log = Log(out / LOG, self.step, "train", self.events)
            self.evaluations = Log(out / EVALUATIONS, self.step, "evaluation", self.events)
        loss: nn.Module = _Loss(task)
        if group.world > 1:
            places = [device.index] if device.type == "cuda" else None
            loss = torch.nn.parallel.DistributedDataParallel(loss, device_ids=places)
        self.forward: Any = loss

    def _open_folder(self, out: Path, resume: bool) -> None:
        checkpoint = out / CHECKPOINT
        try:
            if self.group.first:
                out.mkdir(parents=True, exist_ok=True)
            found = checkpoint.is_file()
        except OSError as error:
            raise XCosError(f"{out}: cannot be used as a folder: {error.strerror or error}") from error
        if found and not resume:
            raise XCosError(f"{out}: holds a training already; resume it (--resume) or choose another folder")
        if found:
            self._load(checkpoint)

    # --- state

    def _load(self, path: Path) -> None:
        checkpoint = Checkpoint.load(path, self.module, self.must_match)
        tensors, values = checkpoint.tensors, checkpoint.values
        self.module.load_state_dict(tensors["module"])
        load_optimiser(self.module, self.optimiser, tensors["optimiser"])
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors["ema"])
            self.ema.n_averaged.fill_(int(values["ema_updates"]))
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(values["scaler"])
        self.means.restore(values["means"])
        self.step = checkpoint.step
        self.loss = math.nan if values["loss"] is None else float(values["loss"])

    def _save(self, *, final: bool = False) -> None:
        """Write a checkpoint; only at the end is it an error if that fails, for the last one is still there."""
        if self.out is None or not self.group.first:
            return
        values = {
            "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "means": self.means.plain(),
            "loss": self.loss if math.isfinite(self.loss) else None,
        }
        tensors = {
            "module": self.module.state_dict(),
            "ema": {} if self.ema is None else self.ema.module.state_dict(),
            "optimiser": optimiser_tensors(self.module, self.optimiser),
        }
        try:
            Checkpoint(self.step, self.must_match, values, tensors).save(self.out / CHECKPOINT)
        except OutputError as error:
            if final:
                raise
            self.progress.say(f"{error}; the checkpoint before it is kept, and training goes on")

    # --- steps

    def run(self) -> TrainResult:
        steps_started = time.monotonic()
        first = self.step
        try:
            if self.step < self.config.steps:
                self._steps()
            seconds = time.monotonic() - steps_started
            files = self._finish()
        finally:
            self.progress.close()
            if self.events is not None:
                self.events.close()
        return TrainResult(
            steps=self.step,
            resumed=self.resumed,
            loss=self.loss,
            metrics=self.metrics,
            seconds=time.monotonic() - self.started,
            step_seconds=seconds / max(1, self.step - first),
            files=files,
        )

    def _indices(self) -> Iterator[BatchIndex]:
        world, parts = self.group.world, self.config.accumulate * self.group.world
        for step in range(self.step, self.config.steps):
            for micro in range(self.config.accumulate):
                yield BatchIndex(self.config.seed, step, micro * world + self.group.rank, parts)

    def _steps(self) -> None:
        config = self.config
        saved = time.monotonic()
        indices = self._indices()
        batches = prefetch(lambda index: (index, self.task.batch(index, self.size)), indices, config.workers)
        with contextlib.closing(batches):  # type: ignore[type-var]
            while self.step < config.steps:
                self._one_step(batches)
                self.step += 1
                row = None
                if self.step % config.log_every == 0 or self.step == config.steps:
                    row = self._log()
                self.progress.update(self.step, row)
                if self.step == config.steps:
                    break
                if config.evaluate_every and self.step % config.evaluate_every == 0:
                    self._evaluate()
                minutes = (time.monotonic() - saved) / 60
                if (config.checkpoint_every and self.step % config.checkpoint_every == 0) or (
                    config.checkpoint_minutes and minutes >= config.checkpoint_minutes
                ):
                    self._save()
                    saved = time.monotonic()

    def _one_step(self, batches: Iterator[tuple[BatchIndex, Any]]) -> None:
        config = self.config
        self.rate = warmup_cosine(self.step, config.steps, config.warmup, config.final_rate)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base_rate"] * self.rate
        self.optimiser.zero_grad(set_to_none=True)
        total: Tensor | float = 0.0
        for micro in range(config.accumulate):
            index, batch = next(batches)
            batch = _to(batch, self.device)
            torch.manual_seed(derived_seed(index.seed, index.step, index.part, 1 << 20))
            shared = self.group.world == 1 or micro == config.accumulate - 1
            dtype = _DTYPES.get(config.amp)
            with contextlib.nullcontext() if shared else self.forward.no_sync():
                with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                    loss, parts = self.forward(batch)
                self.scaler.scale(loss / config.accumulate).backward()
            total = total + loss.detach() / config.accumulate
            self.means.add({name: value / config.accumulate for name, value in parts.items()})
        assert isinstance(total, Tensor)
        self.total = total
        if self.device.type == "cpu":  # elsewhere reading it would wait for the device: the log reads it
            self.loss = _finite(float(total), self.step + 1)
        self.scaler.unscale_(self.optimiser)
        if config.clip is not None:
            trained = [p for group in self.optimiser.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip)
            self.means.add({"gradient": norm})
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.module)
        self.means.add({"loss": total})
        self.means.count += 1

    def _log(self) -> dict[str, float]:
        values = self.means.read()
        self.loss = float(mean_over_processes(self.total.double()))
        if not self.scaler.is_enabled():  # which skips steps that overflow
            _finite(values["loss"], self.step)
        row = {"loss": values.pop("loss"), "rate": self.config.rate * self.rate, **values}
        if self.log is not None:
            self.log.write(self.step, row | {"seconds": round(time.monotonic() - self.started, 3)})
        if self.on_step is not None:
            self.on_step(self.step, row)
        return row

    # --- looking at the weights

    @contextlib.contextmanager
    def _judged(self) -> Iterator[nn.Module]:
        """The module with the weights to judge, its modes restored behind."""
        judged = self.module if self.ema is None else self.ema.module
        with torch.no_grad(), kept_modes(judged):
            yield judged

    def _evaluate(self) -> None:
        if not self.group.first:
            return
        with self._judged() as module:
            self.metrics = dict(self.task.evaluate(module))
        if not self.metrics:
            return
        if self.evaluations is not None:
            self.evaluations.write(self.step, self.metrics)
        shown = "  ".join(f"{name} {value:.5g}" for name, value in self.metrics.items())
        self.progress.say(f"step {self.step}: {shown}")

    def _finish(self) -> list[Path]:
        self._save(final=True)
        self._evaluate()
        if self.out is None or not self.group.first:
            return []
        with self._judged() as module:
            return self.task.export(module, self.out)
