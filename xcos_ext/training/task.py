"""What a training is about: the engine knows tasks by this interface only, and a batch by its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["BatchIndex", "Task", "derived_seed", "weight_decay_groups"]


def derived_seed(*numbers: int) -> int:
    """A seed in [0, 2^63) that depends on all the numbers (each >= 0) and their order; the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class BatchIndex(NamedTuple):
    """Which part of which optimiser step's batch: all that a batch may depend on.

    The batch of an optimiser step is split into ``parts`` equal ones: processes times accumulated micro-steps. Where a
    task draws the whole batch from ``generator()`` and keeps its own ``slice_of`` it, the same samples are trained on
    however many processes there are.

    Attributes:
        seed: of the training.
        step: optimiser step, from 0.
        part: this part, from 0 to ``parts`` - 1.
        parts: parts of the step's batch.

    >>> whole = torch.arange(6)
    >>> [BatchIndex(seed=0, step=9, part=part, parts=2).slice_of(whole).tolist() for part in range(2)]
    [[0, 1, 2], [3, 4, 5]]
    """

    seed: int
    step: int
    part: int = 0
    parts: int = 1

    def generator(self, salt: int = 0, *, own: bool = False) -> torch.Generator:
        """A generator on the CPU, seeded by this place; the same for all parts of a step unless ``own``.

        Args:
            salt: tells uses apart that are to be independent.
            own: a stream for this part alone.
        """
        numbers = (self.seed, self.step, salt, self.part + 1 if own else 0)
        return torch.Generator().manual_seed(derived_seed(*numbers))

    def slice_of(self, whole: Tensor) -> Tensor:
        """This part's share [n, ...] of the step's samples [n * parts, ...].

        Raises:
            ValueError: the samples cannot be split evenly.
        """
        if len(whole) % self.parts:
            raise ValueError(f"whole: expected a multiple of {self.parts} samples, got {len(whole)}")
        count = len(whole) // self.parts
        return whole[self.part * count : (self.part + 1) * count]


class Task(Protocol):
    """One training problem: a module, its batches and its loss.

    Attributes:
        module: everything that is trained or has to be kept with it, e.g. a model and a margin head. The engine moves
            it to the device, saves it, averages it; it never changes its training mode, which is the task's to set.
            A frozen teacher does not belong in it.
    """

    @property
    def module(self) -> nn.Module: ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters of ``module`` to optimise: dicts with ``params`` and, if wanted, ``rate_scale`` (times the
        configured learning rate, default 1), ``weight_decay`` (instead of the configured one) and ``muon`` (whether
        :class:`~xcos_ext.training.optimiser.MuonAdamW` may orthogonalise them; without effect elsewhere). With several
        processes every trained parameter must take part in every loss."""
        ...

    def batch(self, index: BatchIndex, size: int) -> Any:
        """The samples of one part of a step, on the CPU: tensors, or tuples, lists and dicts of them.

        A pure function of ``index`` and ``size`` (samples in this part), called from other threads and ahead of time:
        random numbers come from ``index.generator()``, never from torch's global generator.
        """
        ...

    def loss(self, batch: Any) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Loss to minimise, a mean over the batch, and named parts of it for the log.

        ``batch`` is on the module's device; autocast is on where asked for. Torch's global generator is seeded by the
        batch's place, so dropout and the like may be used.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """Plain values that a checkpoint must agree with to be resumed: sizes, data, versions of the recipe."""
        ...

    def evaluate(self, module: nn.Module) -> Mapping[str, float]:
        """Figures on held-out data; empty where there are none. ``module`` is ``self.module`` or, with averaged
        weights, a copy that holds them."""
        ...

    def export(self, module: nn.Module, folder: Path) -> list[Path]:
        """Write the result into a folder and say which files; ``module`` as in :meth:`evaluate`."""
        ...


def weight_decay_groups(module: nn.Module, *, rate_scale: float = 1.0) -> list[dict[str, Any]]:
    """A module's trainable parameters in two groups: matrices and kernels decay, vectors (biases, norms, slopes) do
    not.

    >>> [len(group["params"]) for group in weight_decay_groups(nn.Sequential(nn.Linear(4, 2), nn.PReLU()))]
    [1, 2]
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "rate_scale": rate_scale},
        {"params": [p for p in trained if p.dim() <= 1], "rate_scale": rate_scale, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
