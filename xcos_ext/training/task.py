"""What a training is about: the engine knows tasks by this interface only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from .seeds import BatchIndex

__all__ = ["Task", "weight_decay_groups"]


class Task(Protocol):
    """One training problem: a module, its batches and its loss.

    Attributes:
        module: everything that is trained or has to be kept with it, e.g. a model and a margin head. The engine moves
            it to the device, saves it, averages it; it never changes its training mode, which is the task's to set.
            A frozen teacher does not belong in it.
    """

    module: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters of ``module`` to optimise: dicts with ``params`` and, if wanted, ``rate_scale`` (times the
        configured learning rate, default 1), ``weight_decay`` (instead of the configured one) and ``muon`` (whether
        :class:`~xcos_ext.training.muon.MuonAdamW` may orthogonalise them; without effect elsewhere). With several
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
        """Figures on held-out data; empty where there are none. ``module`` is ``self.module``, holding the averaged
        weights where there are some."""
        ...

    def export(self, module: nn.Module, folder: Path) -> list[Path]:
        """Write the result into a folder and say which files; ``module`` as in :meth:`evaluate`."""
        ...


def weight_decay_groups(module: nn.Module, *, rate_scale: float = 1.0) -> list[dict[str, Any]]:
    """A module's trainable parameters in two groups: matrices and kernels decay, vectors (biases, norms, slopes) do
    not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "rate_scale": rate_scale},
        {"params": [p for p in trained if p.dim() <= 1], "rate_scale": rate_scale, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
