"""CUDA graphs on the CPU: a stand-in for ``torch.cuda`` that records a function's operations and repeats them in place.

Like the real thing it knows nothing of shapes or values: a replay reads the captured inputs and writes the captured
outputs, and what the function did beside its operations is not done again. Streams and events only write a log.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """Recorded operations."""

    def __init__(self, log: list[str]) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._log = log

    def replay(self) -> None:
        """Do them again, into the memory of the first time."""
        self._log.append("replay")
        for function, arguments, options, made in self.calls:
            again = function(*arguments, **options)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._graph.calls.append((func, args, kwargs or {}, made))
        return made


class _Named:
    """A stream or an event."""

    def __init__(self, name: str, log: list[str], handle: int = 0) -> None:
        self._name, self._log, self.cuda_stream = name, log, handle

    def wait_stream(self, other: _Named) -> None:
        self._log.append(f"{self._name} waits for {other._name}")

    def wait_event(self, event: _Named) -> None:
        self._log.append(f"{self._name} waits for {event._name}")

    def record(self, stream: _Named | None = None) -> None:
        self._log.append(f"record {self._name}")


class FakeCuda:
    """What :class:`xcos_ext.deploy.cuda_graphs.CudaGraphs` and TensorRT's runner need of ``torch.cuda``.

    Attributes:
        log: what happened, in order.
        captures: graphs that were captured.
        fail: raised by the next capture.
        now: the current stream.
        capturing: whether somebody else captures it.
        kept: streams that tensors were held for.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.captures: list[Graph] = []
        self.fail: Exception | None = None
        self.now = _Named("current", self.log)
        self.capturing = False
        self.kept: list[Any] = []
        self._handles = itertools.count(100)

    def Stream(self, name: str = "side") -> _Named:
        return _Named(name, self.log, next(self._handles))

    def Event(self) -> _Named:
        return _Named("done", self.log)

    def current_stream(self) -> _Named:
        return self.now

    @contextlib.contextmanager
    def stream(self, stream: _Named) -> Iterator[None]:
        self.log.append(f"on {stream._name}")
        before, self.now = self.now, stream
        yield
        self.now = before

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    def CUDAGraph(self) -> Graph:
        return Graph(self.log)

    @contextlib.contextmanager
    def graph(self, graph: Graph, *, stream: _Named, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"capture on {stream._name}, {capture_error_mode}")
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure
        before, self.now = self.now, stream
        with _Recorder(graph):
            yield
        self.now = before
        self.captures.append(graph)
