"""Batches prepared ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["prefetch"]

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
