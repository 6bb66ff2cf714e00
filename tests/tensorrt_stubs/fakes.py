"""Stand-ins for the module tensorrt, in the shape of version 10 or 11, and for a GPU, on the CPU.

The fakes have exactly the members that xcos_ext/deploy/tensorrt/api.py lists (a test holds them to that), note what is
called, and do what a :class:`Script` says. An engine of theirs really reads and writes the memory it is given: every
output is the sum of its face's inputs.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import json
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from xcos_ext.deploy.tensorrt.gpu import Cuda, Gpu

VERSIONS = {10: "10.16.1.11", 11: "11.4.0.106"}
_ELEMENTS = {1: "FLOAT", 10: "HALF", 6: "INT32", 7: "INT64", 3: "INT8", 2: "UINT8", 9: "BOOL"}  # of ONNX
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8}


@dataclass
class Script:
    """How the fakes behave; everything succeeds by default.

    Attributes:
        parser_errors: (node, operator, message) of a parser that fails.
        messages: errors that the builder logs before it gives nothing; None to succeed.
        steps: steps that a build reports.
        until_cancelled: report steps until told to stop.
        on_step: called at every step, in the builder's thread.
        builder_starts, runtime_starts: whether these can be made.
        cache_fits: whether a timing cache that is not empty is taken.
        cache_damaged: making a timing cache raises.
        profile_index: what adding a profile gives.
        profile_error: what setting a shape raises.
        loads: whether a plan is loaded.
        contexts: execution contexts there is memory for.
        runs: whether launching succeeds.
        dynamic_output: an output whose shape is not known beforehand.
    """

    parser_errors: list[tuple[str, str, str]] = field(default_factory=list)
    messages: list[str] | None = None
    steps: int = 3
    until_cancelled: bool = False
    on_step: Callable[[], None] | None = None
    builder_starts: bool = True
    runtime_starts: bool = True
    cache_fits: bool = True
    cache_damaged: bool = False
    profile_index: int = 0
    profile_error: str | None = None
    loads: bool = True
    contexts: int = 100
    runs: bool = True
    dynamic_output: bool = False


class Memory(bytes):
    """IHostMemory: has Python's buffer protocol."""


class Dims(tuple):
    """A shape."""


def _enum(name: str, members: str) -> Any:
    return enum.IntEnum(name, {member: index for index, member in enumerate(members.split())})


def fake_tensorrt(major: int) -> Any:
    """A module like tensorrt, with ``script`` and ``calls`` (names and arguments) in addition."""
    trt: Any = types.ModuleType("tensorrt")
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)  # torch asks whether there is a tensorrt
    trt.__version__ = VERSIONS[major]
    trt.script = script = Script()
    trt.calls = calls = []

    def note(name: str, *arguments: Any) -> None:
        calls.append((name, *arguments))

    flags = "EXPLICIT_BATCH STRONGLY_TYPED" if major == 10 else "STRONGLY_TYPED"
    trt.NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", flags)
    weak = "FP16 BF16 INT8 FP8 " if major == 10 else ""
    trt.BuilderFlag = _enum("BuilderFlag", weak + "REFIT TF32 VERSION_COMPATIBLE")
    trt.MemoryPoolType = _enum("MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM")
    trt.DataType = _enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8 FP8")
    trt.TensorIOMode = _enum("TensorIOMode", "NONE INPUT OUTPUT")
    trt.ExecutionContextAllocationStrategy = _enum(
        "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
    )

    class ILogger:
        Severity = _enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    class IProgressMonitor:
        pass

    class ITensor:
        def __init__(self, name: str, shape: Dims, dtype: Any) -> None:
            self.name, self.shape, self.dtype = name, shape, dtype

    class INetworkDefinition:
        def __init__(self) -> None:
            self._inputs: list[ITensor] = []
            self._outputs: list[ITensor] = []

        @property
        def num_inputs(self) -> int:
            return len(self._inputs)

        @property
        def num_outputs(self) -> int:
            return len(self._outputs)

        def get_input(self, index: int) -> ITensor:
            return self._inputs[index]

        def get_output(self, index: int) -> ITensor:
            return self._outputs[index]

    class ParserError:
        def __init__(self, node: str, operator: str, message: str) -> None:
            self._parts = node, operator, message

        def node_name(self) -> str:
            return self._parts[0]

        def node_operator(self) -> str:
            return self._parts[1]

        def desc(self) -> str:
            return self._parts[2]

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            assert isinstance(logger, ILogger)
            self._network = network

        @property
        def num_errors(self) -> int:
            return len(script.parser_errors)

        def get_error(self, index: int) -> ParserError:
            return ParserError(*script.parser_errors[index])

        def parse(self, model: bytes) -> bool:
            note("parse", len(model))
            if script.parser_errors:
                return False
            import onnx

            graph = onnx.load_model_from_string(model).graph
            weights = {tensor.name for tensor in graph.initializer}
            self._network._inputs = [_tensor(v) for v in graph.input if v.name not in weights]
            self._network._outputs = [_tensor(v) for v in graph.output]
            return True

    def _tensor(value: Any) -> ITensor:
        kind = value.type.tensor_type
        shape = Dims(d.dim_value if d.WhichOneof("value") == "dim_value" else -1 for d in kind.shape.dim)
        return ITensor(value.name, shape, trt.DataType[_ELEMENTS[kind.elem_type]])

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

        def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
            if script.profile_error:
                raise ValueError(script.profile_error)
            note("set_shape", input, min, opt, max)
            self._shapes[input] = (min, opt, max)

    class ITimingCache:
        def __init__(self, data: bytes) -> None:
            self._data = data

        def serialize(self) -> Memory:
            return Memory(self._data)

    class IBuilderConfig:
        def __init__(self) -> None:
            self.progress_monitor: Any = None
            self._flags = {trt.BuilderFlag.TF32}
            self._profiles: list[IOptimizationProfile] = []
            self._cache: ITimingCache | None = None

        def set_flag(self, flag: Any) -> None:
            note("set_flag", flag.name)
            self._flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            note("clear_flag", flag.name)
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            note("set_memory_pool_limit", pool.name, pool_size)

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1 if script.profile_index == 0 else script.profile_index

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            if script.cache_damaged and serialized_timing_cache:
                raise RuntimeError("not a timing cache")
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            assert ignore_mismatch is False
            if cache._data and not script.cache_fits:
                return False
            note("set_timing_cache", cache._data)
            self._cache = cache
            return True

        def get_timing_cache(self) -> ITimingCache | None:
            return self._cache

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            if not script.builder_starts:
                logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")  # type: ignore[attr-defined]
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._logger: Any = logger

        def create_network(self, flags: int) -> INetworkDefinition:
            note("create_network", sorted(f.name for f in trt.NetworkDefinitionCreationFlag if flags >> f & 1))
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Memory | None:
            note("build", threading.current_thread() is threading.main_thread())
            monitor = config.progress_monitor
            monitor.phase_start("build", None, max(script.steps, 1))
            step = 0
            while script.until_cancelled or step < script.steps:
                if script.on_step is not None:
                    script.on_step()
                monitor.phase_start("inner", "build", 2)
                monitor.step_complete("inner", 0)
                monitor.phase_finish("inner")
                if not monitor.step_complete("build", min(step, script.steps - 1)):
                    note("stopped")
                    return None
                step += 1
            monitor.phase_finish("build")
            if script.messages is not None:
                for message in script.messages:
                    self._logger.log(ILogger.Severity.ERROR, message)
                return None
            if config._cache is not None:
                config._cache._data += b"times"
            ranges = [[[s[0] for s in shapes] for shapes in p._shapes.values()] for p in config._profiles]
            described = {
                "inputs": [(t.name, list(t.shape), t.dtype.name) for t in network._inputs],
                "outputs": [(t.name, list(t.shape), t.dtype.name) for t in network._outputs],
                "profiles": [each[0] for each in ranges],
                "flags": sorted(flag.name for flag in config._flags),
            }
            return Memory(json.dumps(described).encode())

    class IExecutionContext:
        def __init__(self, plan: dict[str, Any]) -> None:
            self._plan = plan
            self._shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s, _ in plan["inputs"]}
            self._addresses: dict[str, int] = {}
            self._profile = 0
            self._memory: tuple[int, int] | None = None

        def set_device_memory(self, memory: int, size: int) -> None:
            self._memory = (memory, size)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            note("set_optimization_profile_async", profile_index, stream_handle)
            self._profile = profile_index
            return profile_index < len(self._plan["profiles"])

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            note("set_input_shape", name, shape)
            least, _, most = self._plan["profiles"][self._profile]
            self._shapes[name] = shape
            return least <= shape[0] <= most

        def get_tensor_shape(self, name: str) -> Dims:
            if script.dynamic_output:
                return Dims((-1,))
            batch = next(iter(self._shapes.values()))[0]
            (shape,) = (s for n, s, _ in self._plan["outputs"] if n == name)
            return Dims(batch if n == -1 else n for n in shape)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return memory != 0

        def execute_async_v3(self, stream_handle: int) -> bool:
            note("execute_async_v3", stream_handle)
            if not script.runs:
                return False
            assert self._memory is not None and self._memory[1] >= 64
            total = sum(
                self._array(n, self._shapes[n], kind).astype(np.float64).reshape(self._shapes[n][0], -1).sum(1)
                for n, _, kind in self._plan["inputs"]
            )
            for name, _, kind in self._plan["outputs"]:
                shape = self.get_tensor_shape(name)
                self._array(name, shape, kind)[...] = total.reshape(-1, *[1] * (len(shape) - 1))
            return True

        def _array(self, name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
            element = np.dtype(_NUMPY[kind])
            size = int(np.prod(shape)) * element.itemsize
            buffer = (ctypes.c_uint8 * size).from_address(self._addresses[name])
            return np.frombuffer(buffer, element).reshape(shape)

    class ICudaEngine:
        device_memory_size_v2 = 64

        def __init__(self, plan: dict[str, Any]) -> None:
            self._plan = plan
            self._tensors = [*plan["inputs"], *plan["outputs"]]

        @property
        def num_io_tensors(self) -> int:
            return len(self._tensors)

        @property
        def num_optimization_profiles(self) -> int:
            return max(len(self._plan["profiles"]), 1)

        def get_tensor_name(self, index: int) -> str:
            return self._tensors[index][0]

        def _of(self, name: str) -> Any:
            return next(t for t in self._tensors if t[0] == name)

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if self._of(name) in self._plan["inputs"] else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType[self._of(name)[2]]

        def get_tensor_shape(self, name: str) -> Dims:
            return Dims(self._of(name)[1])

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
            return [Dims((n, *self._of(name)[1][1:])) for n in self._plan["profiles"][profile_index]]

        def create_execution_context(self, strategy: Any) -> IExecutionContext | None:
            assert strategy is trt.ExecutionContextAllocationStrategy.USER_MANAGED
            if script.contexts == 0:
                return None
            script.contexts -= 1
            return IExecutionContext(self._plan)

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            if not script.runtime_starts:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self.engine_host_code_allowed = False
            self._logger: Any = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            note("deserialize", self.engine_host_code_allowed)
            if not script.loads:
                self._logger.log(ILogger.Severity.ERROR, "Serialization assertion failed")
                return None
            return ICudaEngine(json.loads(serialized_engine))

    for kind in (ILogger, IProgressMonitor, ITensor, INetworkDefinition, ParserError, OnnxParser):
        setattr(trt, kind.__name__, kind)
    for kind in (IOptimizationProfile, ITimingCache, IBuilderConfig, Builder, IExecutionContext, ICudaEngine, Runtime):
        setattr(trt, kind.__name__, kind)
    return trt


class FakeStream:
    """A stream that notes what it waits for."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.waited: list[int] = []
        self.synchronised = 0

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other.cuda_stream)

    def synchronize(self) -> None:
        self.synchronised += 1


@dataclass
class HostCuda(Cuda):
    """The CPU in a GPU's place.

    Attributes:
        name, sm: of the card.
        stream: torch's current one.
        in_capture: whether it is being captured.
        replays: graphs launched.
        kept: tensors held for another stream.
    """

    name: str = "Stand-in"
    sm: str = "9.0"
    stream: FakeStream = field(default_factory=lambda: FakeStream(0))
    in_capture: bool = False
    replays: int = 0
    kept: list[int] = field(default_factory=list)
    made: Iterator[int] = field(default_factory=lambda: iter(range(100, 1000)))

    alignment = 16  # torch allocates for the CPU at multiples of 64 bytes

    def find(self, device: str | torch.device) -> Gpu:
        return Gpu(torch.device("cpu"), self.name, self.sm)

    def using(self, gpu: Gpu) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def current_stream(self, gpu: Gpu) -> Any:
        return self.stream

    def new_stream(self, gpu: Gpu) -> Any:
        return FakeStream(next(self.made))

    def capturing(self) -> bool:
        return self.in_capture

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        self.kept.append(stream.cuda_stream)

    def record(self, gpu: Gpu, enqueue: Callable[[int], None]) -> Callable[[], None]:
        handle = next(self.made)
        enqueue(handle)

        def replay() -> None:
            self.replays += 1
            enqueue(handle)

        return replay
