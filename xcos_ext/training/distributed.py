"""Training with several processes, started by ``torchrun``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes", "mean_over_processes", "processes"]


class Processes(NamedTuple):
    """Attributes: rank of this process, number of them, and its index on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Joins the group that ``torchrun`` describes in the environment (NCCL for CUDA, gloo else); alone without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    elif world == 1:
        yield Processes()
    else:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
            # Nobody hangs up while another still reads what was last said; with the work done, who is gone may be.
            with contextlib.suppress(RuntimeError):
                dist.barrier()
        finally:
            dist.destroy_process_group()


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes; itself where there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
