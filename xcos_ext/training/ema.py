"""Exponential moving average of everything a module is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA:
    """Averages parameters and floating buffers: ``average += (1 - d) (value - average)``; integer buffers are copied.

    d = min(decay, (1 + n) / (10 + n)) after n updates, so that the first weights do not linger.

    Args:
        module: to follow. Its state at the start is the first average.
        decay: in [0, 1).

    Attributes:
        state: name to average, in the tensors' own dtypes.
        updates: n.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.state: dict[str, Tensor] = {name: t.detach().clone() for name, t in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                averages.append(self.state[name])
                values.append(value.detach())
            else:
                self.state[name].copy_(value)
        if averages:
            torch._foreach_lerp_(averages, values, 1 - decay)

    @contextlib.contextmanager
    def in_place_of(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module holds the averages inside the block, and its own weights again behind it."""
        own = {name: t.detach().clone() for name, t in module.state_dict().items()}
        module.load_state_dict(self.state)
        try:
            yield module
        finally:
            module.load_state_dict(own)
