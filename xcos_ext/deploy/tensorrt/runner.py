"""Running a plan on torch's tensors and streams."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xcos_ext.deploy.cuda_graphs import CudaGraphs
from xcos_ext.io.atomic import StrPath

from . import plan as plans
from .plan import EngineError, TensorRTError

__all__ = ["TrtRunner"]

_MOST_CONTEXTS = 32  # of batch sizes of their own, more than are captured as graphs; the rest share one of a profile
_ALIGNMENT = 256  # TensorRT's demand on addresses, in bytes; torch allocates so, a view may begin elsewhere


class TrtRunner:
    """A TensorRT engine that takes and gives torch tensors.

    Work goes to torch's current stream; no call waits for the GPU, except the first of a batch size. Calls from several
    threads or streams follow one another: they share one scratch memory. :meth:`run` can be captured into a larger
    graph, after one call of that batch size; the runner has to outlive such a graph, and must not run while it does.

    A plan is code. It is loaded only if its hash is the one in its sidecar, which finds damage but not malice: run
    plans that you built or whose origin you trust.

    Args:
        plan: from :func:`~xcos_ext.deploy.tensorrt.build_engine`, with its sidecar beside it.
        device: the GPU.
        graph: capture each of the first batch sizes as a CUDA graph, with inputs copied in and outputs out.

    Attributes:
        card: the sidecar's content (:class:`~xcos_ext.deploy.tensorrt.PlanCard`).

    Raises:
        EngineError: the plan is missing, cut off, changed, without its sidecar, or for another TensorRT or GPU.
        MissingPackageError, TensorRTError: tensorrt is not installed or cannot start, or there is no GPU.
    """

    def __init__(self, plan: StrPath, *, device: str | torch.device = "cuda", graph: bool = True) -> None:
        self.card, data = plans.load_plan(plan)
        self._trt = trt = plans.load_tensorrt()
        gpu = plans.find_gpu(device)
        self.card.check_fits(trt.__version__, gpu, plan)
        if gpu.name != self.card.gpu:
            warnings.warn(
                f"{plan}: its kernels were chosen on {self.card.gpu}, this is {gpu.name}: built here it may be faster",
                stacklevel=2,
            )
        self._device, self._log, self._lock = gpu.device, plans.log_of(trt), threading.Lock()
        with torch.cuda.device(self._device):
            self._runtime = self._log.start(trt.Runtime)
            self._engine = self._runtime.deserialize_cuda_engine(data)
            if self._engine is None:
                raise EngineError(f"{plan}: TensorRT {trt.__version__} cannot load it: {self._log.reason()}")
            scratch = max(self._engine.device_memory_size_v2, 1)
            self._scratch = torch.empty(scratch, dtype=torch.uint8, device=self._device)
            self._own_stream, self._done = torch.cuda.Stream(), torch.cuda.Event()
        self._contexts: dict[Any, Any] = {}  # by shapes; beyond the most, by profile
        self._call = CudaGraphs(self._launch) if graph else self._launch

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the engine.

        Args:
            inputs: all of the engine's, by name: contiguous tensors on its GPU with the shapes and dtypes of
                ``card.inputs``, the same batch in each. Without graphs their memory starts at a multiple of 256 bytes.

        Returns:
            Output name -> new tensor.

        Raises:
            ValueError, TypeError: an input that is missing, unknown, no tensor, of another shape, dtype or device, not
                contiguous, or of a batch outside the plan's profiles; the message names it.
            TensorRTError: TensorRT reports an error.
        """
        values = self._checked(inputs)
        with self._lock, torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                if tuple(tuple(value.shape) for value in values) not in self._contexts:
                    raise TensorRTError(
                        f"run a batch of {len(values[0])} once before capturing it: TensorRT has to set up"
                    )
                outputs = self._launch(*values)
            else:
                stream = torch.cuda.current_stream()
                stream.wait_event(self._done)  # the scratch memory is one call's at a time
                outputs = self._call(*values)
                self._done.record(stream)
                self._scratch.record_stream(stream)
        return {tensor.name: value for tensor, value in zip(self.card.outputs, outputs, strict=True)}

    def _checked(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The inputs in the engine's order, once everything is as it needs it."""
        names = [card.name for card in self.card.inputs]
        if inputs.keys() != set(names):
            raise ValueError(f"inputs: expected {', '.join(names)}, got {', '.join(map(str, inputs)) or 'none'}")
        batch: Any = None
        for card in self.card.inputs:
            name, value = card.name, inputs[card.name]
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a torch tensor, got {type(value).__name__}")
            if batch is None and card.shape[:1] == (-1,):
                batch = value.shape[0] if value.ndim else "none"
                if value.ndim == 0 or not any(p.min <= batch <= p.max for p in self.card.profiles):
                    batches = " or ".join(map(str, self.card.profiles))
                    raise ValueError(f"{name}: expected a batch of {batches} (the plan's profile), got {batch}")
            shape = [batch if n == -1 else n for n in card.shape]
            if (value.dtype, value.device, [*value.shape]) != (getattr(torch, card.dtype), self._device, shape):
                got = f"{str(value.dtype).removeprefix('torch.')} {[*value.shape]} on {value.device}"
                raise ValueError(f"{name}: expected {card.dtype} {shape} on {self._device}, got {got}")
            if not value.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(value.stride())}")
        return [inputs[name].detach() for name in names]

    def _launch(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Enqueue the engine on the current stream; CUDA graphs record this."""
        self._log.errors.clear()
        shapes, stream = tuple(tuple(value.shape) for value in inputs), torch.cuda.current_stream()
        context = self._contexts.get(shapes) or self._context(shapes, stream.cuda_stream)
        outputs = []
        for card in self.card.outputs:
            shape = tuple(int(n) for n in context.get_tensor_shape(card.name))
            if min(shape, default=0) < 0:
                raise TensorRTError(f"{card.name}: expected a shape that follows from the inputs', got {list(shape)}")
            outputs.append(torch.empty(shape, dtype=getattr(torch, card.dtype), device=self._device))
        for card, value in zip((*self.card.inputs, *self.card.outputs), (*inputs, *outputs), strict=True):
            if off := value.data_ptr() % _ALIGNMENT:
                where = f"a multiple of {_ALIGNMENT} bytes, got a view that starts {off} bytes behind one; clone it"
                raise ValueError(f"{card.name}: expected memory that starts at {where}")
            if not context.set_tensor_address(card.name, value.data_ptr()):
                raise TensorRTError(f"{card.name}: TensorRT refuses the tensor's memory: {self._log.reason()}")
        # On the default stream TensorRT would synchronise.
        target = stream if stream.cuda_stream else self._own_stream
        if target is not stream:
            target.wait_stream(stream)
        if not context.execute_async_v3(target.cuda_stream):
            raise TensorRTError(f"TensorRT could not run the engine: {self._log.reason()}")
        if target is not stream:
            stream.wait_stream(target)
        return tuple(outputs)

    def _context(self, shapes: tuple[tuple[int, ...], ...], stream: int) -> Any:
        """A context set to inputs of these shapes: their own, which CUDA graphs need, or the nearest profile's."""
        varying = [(c.name, shape) for c, shape in zip(self.card.inputs, shapes, strict=True) if -1 in c.shape]
        nearest = 0
        if varying:
            batch, profiles = varying[0][1][0], self.card.profiles
            fitting = [index for index, profile in enumerate(profiles) if profile.min <= batch <= profile.max]
            nearest = min(fitting, key=lambda index: abs(profiles[index].opt - batch))
        key = shapes if len(self._contexts) < _MOST_CONTEXTS else nearest
        context = self._contexts.get(key)
        if context is None:
            context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None:
                raise TensorRTError(f"TensorRT makes no execution context: {self._log.reason()}")
            context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
            if varying and not context.set_optimization_profile_async(nearest, stream):
                raise TensorRTError(f"TensorRT refuses its profile {nearest}: {self._log.reason()}")
        for name, shape in varying:
            if not context.set_input_shape(name, shape):
                raise TensorRTError(f"{name}: TensorRT refuses the shape {list(shape)}: {self._log.reason()}")
        self._contexts[key] = context
        return context
