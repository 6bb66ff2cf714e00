"""Stand-ins for the module tensorrt, in the shape of version 10 or 11, and a small graph for them.

The fakes have nothing that the real bindings lack: test_tensorrt_bindings.py compares every member, argument and type.
So code that runs on them uses only what is there. They note what is called and do what a :class:`Script` says. Their
engine really reads and writes the memory it is given: its output is the sum of each face's inputs.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fake_cuda import FakeCuda
from onnx import TensorProto, helper, numpy_helper

from xcos_ext.deploy.tensorrt import plan as plans
from xcos_ext.deploy.tensorrt import runner

VERSIONS = {10: "10.16.1.11", 11: "11.4.0.106"}


@dataclass
class Script:
    """How the fakes behave; everything succeeds by default.

    Attributes:
        parser_errors: (node, operator, message) of a parser that fails.
        messages: errors that the builder logs before it gives nothing; None to succeed.
        until_cancelled: a build reports steps until told to stop.
        on_step: called at every step.
        starts: whether builder and runtime can be made.
        profile_index: what adding a profile gives.
        loads: whether a plan is loaded.
        contexts: execution contexts there is memory for.
        runs: whether launching succeeds.
        dynamic_output: an output whose shape is not known beforehand.
    """

    parser_errors: list[tuple[str, str, str]] = field(default_factory=list)
    messages: list[str] | None = None
    until_cancelled: bool = False
    on_step: Callable[[], None] = lambda: None
    starts: bool = True
    profile_index: int = 0
    loads: bool = True
    contexts: int = 100
    runs: bool = True
    dynamic_output: bool = False


class IHostMemory(bytes):
    """Has Python's buffer protocol."""


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
    trt.calls = []

    def note(name: str, *arguments: Any) -> None:
        trt.calls.append((name, *arguments))

    weak = "EXPLICIT_BATCH " if major == 10 else ""
    trt.NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", weak + "STRONGLY_TYPED")
    trt.BuilderFlag = _enum("BuilderFlag", "TF32")
    trt.DataType = _enum("DataType", "FLOAT HALF INT8 INT32 INT64")
    trt.ExecutionContextAllocationStrategy = _enum("ExecutionContextAllocationStrategy", "STATIC USER_MANAGED")
    types_of = {TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF", TensorProto.INT8: "INT8"}

    class ILogger:
        Severity = _enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    class IProgressMonitor:
        pass

    def made(logger: Any) -> Any:
        assert isinstance(logger, ILogger)
        if not script.starts:
            logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")  # type: ignore[attr-defined]
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return logger

    class ITensor:
        def __init__(self, value: Any) -> None:
            kind = value.type.tensor_type
            axes = (d.dim_value if d.WhichOneof("value") == "dim_value" else -1 for d in kind.shape.dim)
            self._name, self._shape, self._dtype = value.name, Dims(axes), trt.DataType[types_of[kind.elem_type]]

        name = property(lambda self: self._name)
        shape = property(lambda self: self._shape)
        dtype = property(lambda self: self._dtype)

    class INetworkDefinition:
        def __init__(self) -> None:
            self._ends: list[list[ITensor]] = [[], []]

        num_inputs = property(lambda self: len(self._ends[0]))
        num_outputs = property(lambda self: len(self._ends[1]))

        def get_input(self, index: int) -> ITensor:
            return self._ends[0][index]

        def get_output(self, index: int) -> ITensor:
            return self._ends[1][index]

    class ParserError:
        def __init__(self, *parts: str) -> None:
            self._parts = parts

        def node_name(self) -> str:
            return self._parts[0]

        def node_operator(self) -> str:
            return self._parts[1]

        def desc(self) -> str:
            return self._parts[2]

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self._network = network
            made(logger)

        num_errors = property(lambda self: len(script.parser_errors))

        def get_error(self, index: int) -> ParserError:
            return ParserError(*script.parser_errors[index])

        def parse(self, model: bytes) -> bool:
            note("parse", len(model))
            graph = onnx.load_model_from_string(model).graph
            weights = {tensor.name for tensor in graph.initializer}
            inputs = [ITensor(value) for value in graph.input if value.name not in weights]
            self._network._ends = [inputs, [ITensor(value) for value in graph.output]]
            return not script.parser_errors

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._batches: list[int] = []

        def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
            note("set_shape", input, min, opt, max)
            self._batches = [min[0], opt[0], max[0]]

    class IBuilderConfig:
        progress_monitor: Any = None

        def __init__(self) -> None:
            self._profiles: list[IOptimizationProfile] = []

        def set_flag(self, flag: Any) -> None:
            note("set_flag", flag.name)

        def clear_flag(self, flag: Any) -> None:
            note("clear_flag", flag.name)

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self._profiles.append(profile)
            return script.profile_index

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self._logger = made(logger)

        def create_network(self, flags: int) -> INetworkDefinition:
            note("create_network", sorted(f.name for f in trt.NetworkDefinitionCreationFlag if flags >> f & 1))
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
            note("build")
            monitor, step = config.progress_monitor, 0
            monitor.phase_start("build", None, 3)
            while script.until_cancelled or step < 3:
                script.on_step()
                monitor.phase_start("inner", "build", 2)
                monitor.step_complete("inner", 0)
                monitor.phase_finish("inner")
                if not monitor.step_complete("build", min(step, 2)):
                    note("stopped")
                    return None
                step += 1
            monitor.phase_finish("build")
            for message in script.messages or ():
                self._logger.log(ILogger.Severity.ERROR, message)
            if script.messages is not None:
                return None
            ends = [[(t.name, list(t.shape), t.dtype.name) for t in end] for end in network._ends]
            return IHostMemory(json.dumps([*ends, [p._batches for p in config._profiles]]).encode())

    class IExecutionContext:
        def __init__(self, plan: list[Any]) -> None:
            self._inputs, self._outputs, self._profiles = plan
            self._shapes = {name: tuple(shape) for name, shape, _ in self._inputs}
            self._addresses: dict[str, int] = {}
            self._profile, self._memory = 0, (0, 0)

        def set_device_memory(self, memory: int, size: int) -> None:
            self._memory = (memory, size)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            note("set_optimization_profile_async", profile_index)
            self._profile = profile_index
            return profile_index < len(self._profiles)

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            note("set_input_shape", name, shape)
            least, _, most = self._profiles[self._profile]
            self._shapes[name] = shape
            return least <= shape[0] <= most

        def get_tensor_shape(self, name: str) -> Dims:
            if script.dynamic_output:
                return Dims((-1,))
            batch = next(iter(self._shapes.values()))[0]
            (shape,) = (s for n, s, _ in self._outputs if n == name)
            return Dims(batch if n == -1 else n for n in shape)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return memory != 0

        def execute_async_v3(self, stream_handle: int) -> bool:
            note("execute_async_v3", stream_handle, self._memory)
            if not script.runs:
                return False
            # In torch's operators, so that a stand-in for CUDA graphs can record them.
            inputs = [self._tensor(name, shape) for name, shape in self._shapes.items()]
            total = torch.stack([value.double().flatten(1).sum(1) for value in inputs]).sum(0)
            for name, _, _ in self._outputs:
                output = self._tensor(name, self.get_tensor_shape(name))
                output.copy_(total.reshape(-1, *[1] * (output.ndim - 1)).expand_as(output))
            return True

        def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
            count = int(np.prod(shape))
            buffer = (ctypes.c_float * count).from_address(self._addresses[name])
            return torch.from_numpy(np.frombuffer(buffer, np.float32)).view(tuple(shape))

    class ICudaEngine:
        device_memory_size_v2 = property(lambda self: 64)

        def __init__(self, plan: list[Any]) -> None:
            self._plan = plan

        def create_execution_context(self, strategy: Any) -> IExecutionContext | None:
            assert strategy is trt.ExecutionContextAllocationStrategy.USER_MANAGED
            script.contexts -= 1
            return IExecutionContext(self._plan) if script.contexts >= 0 else None

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = made(logger)

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            note("deserialize")
            if not script.loads:
                self._logger.log(ILogger.Severity.ERROR, "Serialization assertion failed")
                return None
            return ICudaEngine(json.loads(serialized_engine))

    for kind in (ILogger, IProgressMonitor, ITensor, INetworkDefinition, ParserError, OnnxParser):
        setattr(trt, kind.__name__, kind)
    for kind in (IOptimizationProfile, IBuilderConfig, Builder, IExecutionContext, ICudaEngine, Runtime):
        setattr(trt, kind.__name__, kind)
    return trt


def install(monkeypatch: pytest.MonkeyPatch, major: int) -> Any:
    """Puts the fakes in place of tensorrt and of a GPU; ``cuda`` and ``gpu`` of the module are the GPU's."""
    trt = fake_tensorrt(major)
    trt.cuda, trt.gpu = FakeCuda(), plans.Gpu(torch.device("cpu"), "Stand-in", "9.0")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(plans, "find_gpu", lambda device: trt.gpu)
    monkeypatch.setattr(runner, "_ALIGNMENT", 16)  # torch allocates for the CPU at multiples of 64 bytes
    for name in ("device", "current_stream", "stream", "Stream", "Event", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(trt.cuda, name))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: trt.cuda.capturing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: trt.cuda.kept.append(stream))
    return trt


def sum_graph(path: Path, *, batch: int | str = "batch", width: int | str = 4, listed: bool = False) -> Path:
    """``total [batch] = sum of a and b [batch, width] * scale``; with ``listed`` the weight is an input too."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, width]) for name in ("a", "b")]
    if listed:
        inputs.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1]))
    nodes = [
        helper.make_node("Sum", ["a", "b"], ["added"], name="add"),
        helper.make_node("Mul", ["added", "scale"], ["scaled"], name="scale_it"),
        helper.make_node("ReduceSum", ["scaled", "axes"], ["total"], name="reduce", keepdims=0),
    ]
    weights = [numpy_helper.from_array(np.ones(1, np.float32), "scale"), numpy_helper.from_array(np.array([1]), "axes")]
    total = helper.make_tensor_value_info("total", TensorProto.FLOAT, [batch])
    graph = helper.make_graph(nodes, "sum", inputs, [total], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"xcos": '{"fingerprint": "0123456789abcdef"}'})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path
