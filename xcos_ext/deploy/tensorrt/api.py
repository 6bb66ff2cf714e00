"""The part of TensorRT's Python API that is used here, written as types.

TensorRT comes without type information. These protocols carry the names, methods and arguments of its classes, so that
mypy holds our code to them; tests/test_tensorrt_bindings.py holds them to the real bindings of TensorRT 10 and 11.

A protocol has the name of TensorRT's class; ``BuilderFlagEnum`` stands for the enumeration ``BuilderFlag``, and so on.
Members that only some versions have are not listed: code asks for those with ``getattr``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

__all__ = [
    "Builder",
    "DataTypeEnum",
    "EnumMember",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "INetworkDefinition",
    "IOptimizationProfile",
    "ITensor",
    "ITimingCache",
    "OnnxParser",
    "Runtime",
    "TensorRT",
]


class EnumMember(Protocol):
    """A member of any of TensorRT's enumerations."""

    @property
    def name(self) -> str: ...

    def __int__(self) -> int: ...


class NetworkDefinitionCreationFlagEnum(Protocol):
    """Kinds of networks; STRONGLY_TYPED and EXPLICIT_BATCH come and go with the version."""


class BuilderFlagEnum(Protocol):
    """What the builder may do; there is no precision among it any more."""

    REFIT: EnumMember
    TF32: EnumMember
    VERSION_COMPATIBLE: EnumMember


class MemoryPoolTypeEnum(Protocol):
    """Kinds of memory whose use can be bounded."""

    WORKSPACE: EnumMember


class DataTypeEnum(Protocol):
    """Element types of tensors."""

    FLOAT: EnumMember
    HALF: EnumMember
    BF16: EnumMember
    INT8: EnumMember
    INT32: EnumMember
    INT64: EnumMember
    BOOL: EnumMember
    UINT8: EnumMember


class TensorIOModeEnum(Protocol):
    """Whether a tensor goes in or comes out."""

    INPUT: EnumMember
    OUTPUT: EnumMember


class ExecutionContextAllocationStrategyEnum(Protocol):
    """Who provides a context's scratch memory."""

    USER_MANAGED: EnumMember


class SeverityEnum(Protocol):
    """How serious a message is."""

    INTERNAL_ERROR: EnumMember
    ERROR: EnumMember
    WARNING: EnumMember
    INFO: EnumMember


class LoggerClass(Protocol):
    """The class ``ILogger``, to be derived from."""

    Severity: SeverityEnum


class Dims(Protocol):
    """A shape; -1 stands for an axis that is not fixed."""

    def __iter__(self) -> Iterator[int]: ...

    def __len__(self) -> int: ...


class IHostMemory(Protocol):
    """Bytes that TensorRT holds, readable through Python's buffer protocol."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class ITensor(Protocol):
    """An input or output of a network."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Dims: ...

    @property
    def dtype(self) -> EnumMember: ...


class INetworkDefinition(Protocol):
    """A network that is being put together."""

    @property
    def num_inputs(self) -> int: ...

    @property
    def num_outputs(self) -> int: ...

    def get_input(self, index: int) -> ITensor: ...

    def get_output(self, index: int) -> ITensor: ...


class IOptimizationProfile(Protocol):
    """The range of shapes that an engine is built for."""

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None: ...


class ITimingCache(Protocol):
    """Measured times of kernels."""

    def serialize(self) -> IHostMemory: ...


class IBuilderConfig(Protocol):
    """How an engine is to be built."""

    progress_monitor: Any

    def set_flag(self, flag: EnumMember) -> None: ...

    def clear_flag(self, flag: EnumMember) -> None: ...

    def set_memory_pool_limit(self, pool: EnumMember, pool_size: int) -> None: ...

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None: ...

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...

    def get_timing_cache(self) -> ITimingCache | None: ...


class Builder(Protocol):
    """Makes engines of networks."""

    def __init__(self, logger: Any) -> None: ...

    def create_network(self, flags: int) -> INetworkDefinition: ...

    def create_builder_config(self) -> IBuilderConfig: ...

    def create_optimization_profile(self) -> IOptimizationProfile: ...

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None: ...


class ParserError(Protocol):
    """What is wrong with a graph, and where."""

    def desc(self) -> str: ...

    def node_name(self) -> str: ...

    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    """Fills a network from an ONNX graph."""

    def __init__(self, network: INetworkDefinition, logger: Any) -> None: ...

    @property
    def num_errors(self) -> int: ...

    def parse(self, model: bytes) -> bool: ...

    def get_error(self, index: int) -> ParserError: ...


class IExecutionContext(Protocol):
    """One engine at work: its shapes, addresses and scratch memory."""

    def set_device_memory(self, memory: int, size: int) -> None: ...

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...

    def get_tensor_shape(self, name: str) -> Dims: ...

    def set_tensor_address(self, name: str, memory: int) -> bool: ...

    def execute_async_v3(self, stream_handle: int) -> bool: ...


class ICudaEngine(Protocol):
    """An engine that has been loaded."""

    @property
    def num_io_tensors(self) -> int: ...

    @property
    def num_optimization_profiles(self) -> int: ...

    @property
    def device_memory_size_v2(self) -> int: ...

    def get_tensor_name(self, index: int) -> str: ...

    def get_tensor_mode(self, name: str) -> EnumMember: ...

    def get_tensor_dtype(self, name: str) -> EnumMember: ...

    def get_tensor_shape(self, name: str) -> Dims: ...

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]: ...

    def create_execution_context(self, strategy: EnumMember) -> IExecutionContext | None: ...


class Runtime(Protocol):
    """Loads engines."""

    engine_host_code_allowed: bool

    def __init__(self, logger: Any) -> None: ...

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None: ...


class TensorRT(Protocol):
    """The module ``tensorrt``."""

    __version__: str

    @property
    def Builder(self) -> type[Builder]: ...

    @property
    def OnnxParser(self) -> type[OnnxParser]: ...

    @property
    def Runtime(self) -> type[Runtime]: ...

    ILogger: LoggerClass

    NetworkDefinitionCreationFlag: NetworkDefinitionCreationFlagEnum
    BuilderFlag: BuilderFlagEnum
    MemoryPoolType: MemoryPoolTypeEnum
    DataType: DataTypeEnum
    TensorIOMode: TensorIOModeEnum
    ExecutionContextAllocationStrategy: ExecutionContextAllocationStrategyEnum
