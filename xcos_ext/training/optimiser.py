"""The optimiser of a training: torch's own, or Muon for kernels and matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .settings import TrainConfig
from .task import Task

__all__ = ["MuonAdamW", "create_optimiser", "orthogonalised"]

# Coefficients of the quintic Newton-Schulz step of the Muon authors: five of them bring every singular value
# near 1 (0.7 to 1.2), which is near enough for a direction.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_ADAM_SIZE = 0.2  # root mean square of a typical AdamW update, in units of the learning rate


def create_optimiser(task: Task, module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimiser over a task's groups; each group keeps its highest rate as ``base_rate``.

    Raises:
        ValueError: a parameter that is not the module's.
    """
    groups = []
    for group in task.parameter_groups():
        rate = config.rate * float(group.get("rate_scale", 1.0))
        rest = {name: value for name, value in group.items() if name != "rate_scale"}
        groups.append(rest | {"lr": rate, "base_rate": rate})
    known = {id(parameter) for parameter in module.parameters()}
    strangers = sum(id(p) not in known for group in groups for p in group["params"])
    if strangers:
        raise ValueError(f"parameter_groups: expected parameters of the task's module, got {strangers} others")
    rate, decay, betas = config.rate, config.weight_decay, (0.9, config.beta2)
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, rate, momentum=config.momentum, weight_decay=decay)
    if config.optimiser == "muon":
        return MuonAdamW(groups, rate, momentum=config.momentum, betas=betas, weight_decay=decay)
    return torch.optim.AdamW(groups, rate, betas=betas, weight_decay=decay)


def orthogonalised(matrices: Tensor) -> Tensor:
    """U V^T of M = U S V^T, nearly, by Newton-Schulz iteration (Jordan et al., Muon, 2024).

    Args:
        matrices: [..., m, n], floating-point. An all-zero matrix stays zero.

    Returns:
        The same shape and dtype, singular values about 0.7 to 1.2.

    >>> orthogonalised(torch.diag(torch.tensor([3.0, 3.0]))).diagonal().sub(1).abs().max() < 0.3
    tensor(True)
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """Muon where a group says ``muon=True``, AdamW elsewhere.

    Muon replaces the momentum of a weight matrix by the nearest orthogonal matrix, so that all its directions learn
    at one pace; a convolution's kernel [out, in, h, w] is the matrix [out, in h w]. Updates are scaled to the size of
    AdamW's (Liu et al., arXiv 2502.16982), so one learning rate serves both.

    ``torch.optim.Muon`` computes the same (``adjust_lr_fn="match_rms_adamw"``), but takes two-dimensional parameters
    only, which a network of convolutions hardly has, and iterates in bfloat16, which takes thirteen times as long on a
    processor without it.

    Args:
        params: parameters or groups; groups may set ``lr``, ``weight_decay`` and ``muon``.
        lr: learning rate.
        momentum: Muon's (Nesterov).
        betas: AdamW's.
        weight_decay: decoupled, times the learning rate.

    Raises:
        ValueError: a vector in a group with ``muon=True``.

    >>> weight = nn.Parameter(torch.eye(2))
    >>> optimiser = MuonAdamW([{"params": [weight], "muon": True}], lr=0.1)
    >>> weight.square().sum().backward()
    >>> optimiser.step()
    >>> bool((weight.diagonal() < 1).all())
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        self.momentum = momentum
        for group in self.param_groups:
            if group.setdefault("muon", False) and any(p.dim() < 2 for p in group["params"]):
                raise ValueError("params: expected matrices or kernels in a group with muon=True, got a vector")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; ``closure`` must be None."""
        withheld = []
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._orthogonal_update(parameter, parameter.grad, group)
                    withheld.append((parameter, parameter.grad))
                    parameter.grad = None  # AdamW passes over it
        super().step()
        for parameter, gradient in withheld:
            parameter.grad = gradient

    def _orthogonal_update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # not used here; AdamW looks for it in every state that it loads
        momentum = state["momentum"].lerp_(gradient, 1 - self.momentum)
        matrix = gradient.lerp(momentum, self.momentum).flatten(1)
        size = _ADAM_SIZE * max(matrix.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalised(matrix).view_as(parameter), alpha=-group["lr"] * size)
