"""What engines need of torch's CUDA side, in one place: the card, streams and graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .package import TensorRTError

__all__ = ["CUDA", "Cuda", "Gpu"]


@dataclass(frozen=True)
class Gpu:
    """A graphics card.

    Attributes:
        device: with its index.
        name: as the driver calls it.
        sm: compute capability, e.g. ``"9.0"``.
    """

    device: torch.device
    name: str
    sm: str


class Cuda:
    """Cards, streams and graphs of torch; tests put a stand-in on the CPU in its place.

    Attributes:
        alignment: TensorRT's demand on addresses, in bytes. Torch allocates so; a view may begin elsewhere.
    """

    alignment = 256

    def find(self, device: str | torch.device) -> Gpu:
        """The card of a device.

        Raises:
            TensorRTError: there is no GPU, or not this one.
            ValueError: not a CUDA device.
        """
        try:
            wanted = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device: expected cuda or cuda:N, got {device!r}") from error
        if wanted.type != "cuda":
            raise ValueError(f"device: expected cuda or cuda:N, got {wanted}")
        if not torch.cuda.is_available():
            raise TensorRTError(
                f"device: a TensorRT engine needs an NVIDIA GPU, and torch {torch.__version__} sees none"
            )
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index >= torch.cuda.device_count():
            raise TensorRTError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {wanted}")
        major, minor = torch.cuda.get_device_capability(index)
        return Gpu(torch.device("cuda", index), torch.cuda.get_device_name(index), f"{major}.{minor}")

    def using(self, gpu: Gpu) -> contextlib.AbstractContextManager[Any]:
        """Makes a card this thread's current one."""
        return torch.cuda.device(gpu.device)

    def current_stream(self, gpu: Gpu) -> Any:
        """Torch's current stream; its ``cuda_stream`` is the handle, 0 for the default stream."""
        return torch.cuda.current_stream(gpu.device)

    def new_stream(self, gpu: Gpu) -> Any:
        """A stream that is not the default one."""
        return torch.cuda.Stream(gpu.device)

    def capturing(self) -> bool:
        """Whether the current stream is being captured into somebody's graph."""
        return torch.cuda.is_current_stream_capturing()

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Keeps a tensor's memory from being handed out again before a stream is done with it."""
        tensor.record_stream(stream)

    def record(self, gpu: Gpu, enqueue: Callable[[int], None]) -> Callable[[], None]:
        """Capture what is enqueued into a graph.

        Args:
            gpu: the card, which is current.
            enqueue: puts the work on a stream, given its handle. Called twice: TensorRT does what is left of its
                setting up in the first launch, which must not be captured.

        Returns:
            Launches the graph on torch's current stream.

        Raises:
            TensorRTError: the work cannot be captured.
        """
        current = torch.cuda.current_stream(gpu.device)
        stream = torch.cuda.Stream(gpu.device)
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            enqueue(stream.cuda_stream)
            stream.synchronize()
            # Other threads go on: an ordinary capture would make their calls fail.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                enqueue(stream.cuda_stream)
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            try:
                graph.capture_end()
            except RuntimeError as error:
                raise TensorRTError(
                    f"the engine cannot be captured into a CUDA graph ({error}); use graph=False"
                ) from error
        current.wait_stream(stream)
        return graph.replay


#: The one in use.
CUDA = Cuda()
