"""CUDA graphs of a function of tensors, one for each shape of its inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["MOST_GRAPHS", "CudaGraphs"]

#: Shapes that are captured; further ones are computed without a graph. Each graph holds its own memory.
MOST_GRAPHS = 8
# Before a capture: libraries choose their kernels and allocate their workspaces in the first calls.
_WARM_UP = 3

Tensors = tuple[Tensor, ...]


class _Graph:
    """A captured call with its inputs and outputs, which stay where they are."""

    def __init__(self, function: Callable[..., Tensors], inputs: Tensors, cuda: Any) -> None:
        self.inputs = tuple(tensor.detach().clone() for tensor in inputs)
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(_WARM_UP):
                function(*self.inputs)
        cuda.current_stream().wait_stream(side)
        self.graph = cuda.CUDAGraph()
        # thread_local: what other threads do on the GPU meanwhile does not break the capture.
        with cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)
        self.done = cuda.Event()
        self.done.record()

    def __call__(self, inputs: Tensors, cuda: Any) -> Tensors:
        # The caller before may have used another stream: its replay ends before the inputs are written again.
        cuda.current_stream().wait_event(self.done)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        found = tuple(output.clone() for output in self.outputs)
        self.done.record()
        return found


class CudaGraphs:
    """A function whose calls are replayed: its kernels are launched all at once.

    A graph is captured at the first call with inputs of a new shape (not while another capture is under way), on a
    stream of its own; later calls copy the inputs in and the outputs out, on the caller's current stream. Results are
    new tensors. Threads may share one object: a lock is held while work is queued, and an event keeps calls on
    different streams in order.

    Args:
        function: of tensors on one CUDA device, to a tuple of tensors; without synchronisation, alike every time.
        cuda: stands in for ``torch.cuda`` in tests.

    >>> CudaGraphs(lambda x: (x * 2,)).shapes  # nothing is captured before the first call
    ()
    """

    def __init__(self, function: Callable[..., Tensors], *, cuda: Any = None) -> None:
        self._function = function
        self._cuda = torch.cuda if cuda is None else cuda
        self._lock = threading.Lock()
        self._graphs: dict[tuple[Any, ...], _Graph] = {}

    @property
    def shapes(self) -> tuple[tuple[Any, ...], ...]:
        """Shapes and dtypes of the inputs that are captured."""
        return tuple(self._graphs)

    def __call__(self, *inputs: Tensor) -> Tensors:
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        with self._lock, self._cuda.device(inputs[0].device):
            graph = self._graphs.get(key)
            if graph is None:
                if len(self._graphs) >= MOST_GRAPHS or any(tensor.numel() == 0 for tensor in inputs):
                    return self._function(*inputs)
                graph = self._graphs[key] = _Graph(self._function, inputs, self._cuda)
            return graph(inputs, self._cuda)
