"""An engine loaded from its plan: its tensors, its profiles, and execution contexts that share one scratch memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from xcos_ext.io.atomic import StrPath

from .api import ICudaEngine, IExecutionContext, TensorRT
from .gpu import Gpu
from .package import EngineError, Log, TensorRTError
from .plan import PlanCard, TensorCard, torch_names
from .profiles import BatchProfile

__all__ = ["Context", "Engine", "torch_dtype"]


class Engine:
    """An engine on a GPU.

    Args:
        trt: the module.
        log: its messages.
        gpu: the card, which is current.
        plan: the file, for messages.
        data: its bytes, whose hash has been checked.
        card: its sidecar.

    Attributes:
        inputs, outputs: by name.
        profiles: batch sizes; none where the batch is fixed.
        scratch: memory of every context, so that only one may be at work at a time.

    Raises:
        EngineError: TensorRT does not load it, or it is not what the sidecar says.
        TensorRTError: TensorRT cannot start.
    """

    def __init__(self, trt: TensorRT, log: Log, gpu: Gpu, plan: StrPath, data: bytes, card: PlanCard) -> None:
        self._trt = trt
        self._log = log
        mark = log.mark()
        try:
            self._runtime = trt.Runtime(log.logger)
        except (TypeError, RuntimeError) as error:  # a null pointer, as pybind11 sees it
            raise TensorRTError(f"TensorRT {trt.__version__} cannot start: {log.errors(mark)}") from error
        if card.version_compatible:  # such a plan brings its own runtime
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineError(f"{plan}: TensorRT {trt.__version__} cannot load it: {log.errors(mark)}")
        self._engine = engine
        tensors = _tensors(engine, trt)
        self.inputs = {t.name: t for mode, t in tensors if mode == trt.TensorIOMode.INPUT}
        self.outputs = {t.name: t for mode, t in tensors if mode == trt.TensorIOMode.OUTPUT}
        self.profiles = self._profiles()
        # The shapes of outputs are the engine's: it knows axes that the network did not.
        said = (set(card.inputs), {(t.name, t.dtype) for t in card.outputs}, card.profiles)
        if said != (set(self.inputs.values()), {(t.name, t.dtype) for t in self.outputs.values()}, self.profiles):
            found = ", ".join(str(t) for _, t in tensors)
            raise EngineError(f"{plan}: not what its sidecar says: the engine has {found}; build it again")
        self.scratch = torch.empty(max(engine.device_memory_size_v2, 1), dtype=torch.uint8, device=gpu.device)

    def _profiles(self) -> tuple[BatchProfile, ...]:
        dynamic = [t.name for t in self.inputs.values() if t.shape[:1] == (-1,)]
        if not dynamic:
            return ()
        count = self._engine.num_optimization_profiles
        shapes = (self._engine.get_tensor_profile_shape(dynamic[0], index) for index in range(count))
        return tuple(BatchProfile(*(int(next(iter(shape))) for shape in three)) for three in shapes)

    def profile_of(self, batch: int) -> int | None:
        """Of the profiles that take a batch, the one whose kernels were chosen for the nearest size."""
        fitting = [index for index, profile in enumerate(self.profiles) if profile.holds(batch)]
        return min(fitting, key=lambda index: abs(self.profiles[index].opt - batch), default=None)

    def context(self, profile: int, stream: int) -> Context:
        """A new execution context for a profile, set up on a stream given by its handle.

        Raises:
            TensorRTError: TensorRT makes none.
        """
        mark = self._log.mark()
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise TensorRTError(f"TensorRT makes no execution context: {self._log.errors(mark)}")
        context.set_device_memory(self.scratch.data_ptr(), self.scratch.numel())
        if self.profiles and not context.set_optimization_profile_async(profile, stream):
            raise TensorRTError(f"TensorRT refuses profile {profile}: {self._log.errors(mark)}")
        return Context(self, context, self._log)


class Context:
    """An engine with shapes and addresses, ready to be launched.

    Attributes:
        batch: that its shapes are set for; None at first.
        output_shapes: for that batch.
    """

    def __init__(self, engine: Engine, context: IExecutionContext, log: Log) -> None:
        self._engine = engine
        self._context = context
        self._log = log
        self.batch: int | None = None
        self.output_shapes: dict[str, tuple[int, ...]] = {}

    def set_batch(self, batch: int) -> None:
        """Set the shapes, unless they are set already.

        Raises:
            TensorRTError: TensorRT refuses them, or cannot tell the outputs' shapes.
        """
        if self.batch == batch:
            return
        self.batch = None
        mark = self._log.mark()
        for name, card in self._engine.inputs.items():
            shape = card.shape_for(batch)
            if -1 in card.shape and not self._context.set_input_shape(name, shape):
                raise TensorRTError(f"{name}: TensorRT refuses the shape {list(shape)}: {self._log.errors(mark)}")
        for name in self._engine.outputs:
            shape = tuple(int(n) for n in self._context.get_tensor_shape(name))
            if any(n < 0 for n in shape):
                raise TensorRTError(
                    f"{name}: expected an output whose shape follows from the inputs', got {list(shape)}"
                )
            self.output_shapes[name] = shape
        self.batch = batch

    def launch(self, addresses: Mapping[str, int], stream: int) -> None:
        """Enqueue the engine on a stream given by its handle, with the addresses of all tensors.

        Raises:
            TensorRTError: TensorRT reports an error.
        """
        mark = self._log.mark()
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise TensorRTError(f"{name}: TensorRT refuses the tensor's memory: {self._log.errors(mark)}")
        if not self._context.execute_async_v3(stream):
            raise TensorRTError(f"TensorRT could not run the engine: {self._log.errors(mark)}")


def _tensors(engine: ICudaEngine, trt: TensorRT) -> list[tuple[object, TensorCard]]:
    """The engine's inputs and outputs."""
    names = torch_names(trt.DataType)
    found: list[tuple[object, TensorCard]] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name)
        shape = tuple(int(n) for n in engine.get_tensor_shape(name))
        found.append((engine.get_tensor_mode(name), TensorCard(name, shape, names.get(dtype, dtype.name))))
    return found


def torch_dtype(card: TensorCard) -> torch.dtype:
    """Of a tensor."""
    dtype: torch.dtype = getattr(torch, card.dtype)
    return dtype
