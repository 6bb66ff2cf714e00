"""Random numbers as a function of where in a training they are drawn, so that resuming needs no generator's state."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["BatchIndex", "derived_seed"]


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
