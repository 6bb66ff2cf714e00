"""From an ONNX graph to a TensorRT plan."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from xcos_ext.io.atomic import StrPath, check_output
from xcos_ext.io.errors import ModelError
from xcos_ext.onnx.files import metadata, onnx_hash, read_onnx

from . import gpu as gpus
from .api import Builder, IBuilderConfig, IHostMemory, INetworkDefinition, ITensor, TensorRT
from .package import Log, TensorRTError, load_tensorrt, log_of
from .plan import PlanCard, TensorCard, check_plan_path, torch_names, write_bytes, write_plan
from .profiles import BatchProfile, GraphInput, as_profiles, graph_inputs, profiles_for
from .supervise import Cancelled, Steps, supervise

__all__ = ["DEFAULT_WORKSPACE", "BuildOptions", "Progress", "build_engine"]

#: Bytes of scratch memory a kernel may ask for; face networks need far less.
DEFAULT_WORKSPACE = 1 << 30

_MOST_PARSER_ERRORS = 3

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """What shapes an engine beside its graph; checked.

    Attributes:
        profiles: batch sizes; None for the default.
        workspace: bytes; None leaves TensorRT's own bound.
        version_compatible: later versions of TensorRT may load the plan.
        refit: the weights can be replaced.
        tf32: fp32 products may be rounded to TF32.
    """

    profiles: tuple[BatchProfile, ...] | None = None
    workspace: int | None = DEFAULT_WORKSPACE
    version_compatible: bool = False
    refit: bool = False
    tf32: bool = False

    @classmethod
    def checked(
        cls,
        profiles: Sequence[BatchProfile | tuple[int, int, int]] | None,
        workspace: int | None,
        version_compatible: bool,
        refit: bool,
        tf32: bool,
    ) -> BuildOptions:
        """The options as given by a caller.

        Raises:
            ValueError, TypeError: a value that is none; the message says which.
        """
        if workspace is not None and (isinstance(workspace, bool) or not isinstance(workspace, int)):
            raise TypeError(f"workspace: expected bytes as int, or None, got {type(workspace).__name__}")
        if workspace is not None and workspace < 1:
            raise ValueError(f"workspace: expected at least 1 byte, got {workspace}")
        return cls(as_profiles(profiles), workspace, bool(version_compatible), bool(refit), bool(tf32))


def build_engine(
    onnx: StrPath,
    plan: StrPath,
    *,
    profiles: Sequence[BatchProfile | tuple[int, int, int]] | None = None,
    workspace: int | None = DEFAULT_WORKSPACE,
    timing_cache: StrPath | None = None,
    version_compatible: bool = False,
    refit: bool = False,
    tf32: bool = False,
    device: str | torch.device = "cuda",
    progress: Progress | None = None,
) -> PlanCard:
    """Build a TensorRT engine and write its plan, with a JSON sidecar ``<plan>.json`` that says what it is.

    The network is strongly typed: the precision of every layer is that of the ONNX graph, so export with
    ``dtype=torch.float16`` for a half-precision backbone. Files appear whole or not at all.

    Args:
        onnx: the graph; weights beside it are found in its own folder only.
        plan: the file to write, ``.plan`` or ``.engine``.
        profiles: batch sizes (min, opt, max) to build for, one or several; kernels are chosen for ``opt``. By default
            one profile (1, 1, 32). None for a graph of a fixed batch.
        workspace: bytes of scratch memory a kernel may ask for; None for TensorRT's own bound.
        timing_cache: ``.cache`` file of measured kernel times, used if it fits and brought up to date; makes the next
            build faster.
        version_compatible: let later versions of TensorRT load the plan (of the same major version; a plan of 10 also
            in 11); such a plan carries code for the host and may be slower.
        refit: let the weights be replaced.
        tf32: let fp32 products be rounded to TF32's 10 bits of mantissa. Off, unlike TensorRT's default.
        device: GPU to build on and for.
        progress: called with (done, total) in this thread. An exception it raises, like Ctrl-C, ends the build.

    Returns:
        What was built, as the sidecar holds it.

    Raises:
        MissingPackageError: tensorrt or onnx is not installed.
        TensorRTError: no GPU, a TensorRT that is too old, or a build that failed, with TensorRT's last errors.
        ModelError: an ONNX file that is damaged, or a graph that TensorRT cannot take.
        OutputError: a file that cannot be written.
        ValueError, TypeError: another argument that cannot be.
    """
    options = BuildOptions.checked(profiles, workspace, version_compatible, refit, tf32)
    check_plan_path(plan)
    if timing_cache is not None:
        check_output(timing_cache, (".cache",))
    trt = load_tensorrt()
    gpu = gpus.CUDA.find(device)
    file = os.fspath(onnx)
    digest = onnx_hash(file)
    proto = read_onnx(file)
    inputs = graph_inputs(proto)
    chosen = profiles_for(inputs, options.profiles, file)
    try:
        graph = proto.SerializeToString()
    except Exception as error:  # protobuf's own types
        raise ModelError(f"{file}: expected a graph of less than 2 GiB with its weights ({error})") from error
    notes = metadata(proto)
    del proto
    times = _read_times(timing_cache)

    def work(steps: Steps) -> _Built:
        with gpus.CUDA.using(gpu):
            return _build(trt, graph, file, inputs, chosen, options, times, steps)

    built = supervise(work, progress)
    if not built.times_fit:
        warnings.warn(
            f"{timing_cache}: made by another TensorRT or GPU, or damaged; an empty one takes its place",
            UserWarning,
            stacklevel=2,
        )
    with memoryview(built.plan) as data:
        card = PlanCard(
            tensorrt=trt.__version__,
            sm=gpu.sm,
            gpu=gpu.name,
            onnx_sha256=digest,
            plan_sha256=hashlib.sha256(data).hexdigest(),
            plan_bytes=data.nbytes,
            inputs=built.inputs,
            outputs=built.outputs,
            profiles=chosen,
            workspace=options.workspace,
            version_compatible=options.version_compatible,
            refit=options.refit,
            tf32=options.tf32,
            metadata=notes,
        )
        write_plan(plan, data, card)
    if timing_cache is not None and built.times is not None and built.times != times:
        write_bytes(timing_cache, built.times)
    return card


@dataclass(frozen=True)
class _Built:
    plan: IHostMemory
    inputs: tuple[TensorCard, ...]
    outputs: tuple[TensorCard, ...]
    times: bytes | None
    times_fit: bool


def _build(
    trt: TensorRT,
    graph: bytes,
    file: str,
    inputs: tuple[GraphInput, ...],
    profiles: tuple[BatchProfile, ...],
    options: BuildOptions,
    times: bytes,
    steps: Steps,
) -> _Built:
    log = log_of(trt)
    mark = log.mark()
    try:
        builder = trt.Builder(log.logger)
    except (TypeError, RuntimeError) as error:  # a null pointer, as pybind11 sees it
        raise TensorRTError(f"TensorRT {trt.__version__} cannot start: {log.errors(mark)}") from error
    network = _parsed(trt, builder, log, graph, file)
    config = builder.create_builder_config()
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    _add_profiles(builder, config, log, inputs, profiles)
    monitor = steps.monitor(trt)
    if monitor is not None:
        config.progress_monitor = monitor
    times_fit = _attach_times(config, times)
    mark = log.mark()
    serialized = builder.build_serialized_network(network, config)
    if steps.cancelled.is_set():
        raise Cancelled
    if serialized is None:
        raise TensorRTError(f"{file}: TensorRT {trt.__version__} could not build an engine: {log.errors(mark)}")
    cache = config.get_timing_cache()
    return _Built(
        serialized,
        tuple(_card(network.get_input(i), trt) for i in range(network.num_inputs)),
        tuple(_card(network.get_output(i), trt) for i in range(network.num_outputs)),
        None if cache is None else bytes(cache.serialize()),
        times_fit,
    )


def _parsed(trt: TensorRT, builder: Builder, log: Log, graph: bytes, file: str) -> INetworkDefinition:
    """The strongly typed network of a graph."""
    kinds = trt.NetworkDefinitionCreationFlag
    flags = 0
    # In TensorRT 10 a network is weakly typed unless asked; later there is nothing else. An explicit batch goes without
    # saying where the flag is gone.
    for flag in (getattr(kinds, "STRONGLY_TYPED", None), getattr(kinds, "EXPLICIT_BATCH", None)):
        if flag is not None:
            flags |= 1 << int(flag)
    network = builder.create_network(flags)
    mark = log.mark()
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(graph):
        count = parser.num_errors
        found = []
        for index in range(min(count, _MOST_PARSER_ERRORS)):
            error = parser.get_error(index)
            where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
            found.append(where + " ".join(error.desc().split())[:300])
        if count > len(found):
            found.append(f"and {count - len(found)} more")
        raise ModelError(
            f"{file}: TensorRT {trt.__version__} cannot take this graph: {'; '.join(found) or log.errors(mark)}"
        )
    return network


def _add_profiles(
    builder: Builder,
    config: IBuilderConfig,
    log: Log,
    inputs: tuple[GraphInput, ...],
    profiles: tuple[BatchProfile, ...],
) -> None:
    for batch in profiles:
        mark = log.mark()
        profile = builder.create_optimization_profile()
        try:
            for value in inputs:
                if value.dynamic:
                    least, usual, most = ((n, *value.shape[1:]) for n in (batch.min, batch.opt, batch.max))
                    profile.set_shape(value.name, least, usual, most)
            index = config.add_optimization_profile(profile)
        except ValueError as error:
            raise TensorRTError(f"profiles: TensorRT refuses a batch of {batch} ({error})") from error
        if index < 0:
            raise TensorRTError(f"profiles: TensorRT refuses a batch of {batch}: {log.errors(mark)}")


def _read_times(timing_cache: StrPath | None) -> bytes:
    """The content of a timing cache; nothing where there is none yet."""
    if timing_cache is None:
        return b""
    try:
        return Path(timing_cache).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ModelError(f"{os.fspath(timing_cache)}: cannot be read: {error.strerror or error}") from error


def _attach_times(config: IBuilderConfig, times: bytes) -> bool:
    """Use measured times, and say whether they are of this TensorRT and GPU; start anew if not."""
    if times:
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            cache = config.create_timing_cache(times)
            if cache is not None and config.set_timing_cache(cache, False):
                return True
    cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, False)
    return not times


def _card(tensor: ITensor, trt: TensorRT) -> TensorCard:
    dtype = torch_names(trt.DataType).get(tensor.dtype)
    if dtype is None:
        raise ModelError(f"{tensor.name}: expected a tensor of a type that torch has, got {tensor.dtype.name}")
    return TensorCard(tensor.name, tuple(int(n) for n in tensor.shape), dtype)
