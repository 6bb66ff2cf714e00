"""Threads that prepare batches ahead of the step that needs them, and processes started by ``torchrun``."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from xcos_ext.io.environment import whole_number

__all__ = ["Processes", "mean_over_processes", "prefetch", "processes"]

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch(make: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """``make`` of each item, in order, computed by threads up to two items a thread ahead.

    Decoding pictures and torch's operators release the interpreter's lock, so threads are enough, and nothing is
    copied between processes. ``make`` must depend on its item alone; then the results do not depend on ``workers``.

    Args:
        make: called once per item.
        items: read as far as needed.
        workers: threads; 0 computes each item when it is asked for.

    Raises:
        Exception: whatever ``make`` raised, at its item's place.

    >>> list(prefetch(lambda number: number * number, range(5), workers=2))
    [0, 1, 4, 9, 16]
    """
    if workers == 0:
        yield from map(make, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batch")
    waiting: deque[Future[Made]] = deque()
    source = iter(items)
    try:
        for item in source:
            waiting.append(pool.submit(make, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
    """Joins the group that ``torchrun`` describes in the environment (NCCL for CUDA, gloo else); alone without it.

    Raises:
        XCosError: ``WORLD_SIZE``, ``RANK`` or ``LOCAL_RANK`` holds no number that it may hold.
    """
    joined = dist.is_available() and dist.is_initialized()
    local = whole_number("LOCAL_RANK", 0)
    if not joined:
        world = whole_number("WORLD_SIZE", 1, least=1)
        if world == 1:
            yield Processes()
            return
        whole_number("RANK", 0, below=world)  # torch itself says which variables are not set
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local)
        if not joined:  # nobody hangs up while another still reads what was last said
            with contextlib.suppress(RuntimeError):  # with the work done, who is gone may be
                dist.barrier()
    finally:
        if not joined:
            dist.destroy_process_group()


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes; itself where there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
