"""From an ONNX graph to a TensorRT plan, and a folder of plans that are built when they are first needed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch

from xcos_ext.io.atomic import StrPath, check_output, local_path, write_atomically
from xcos_ext.io.errors import ModelError
from xcos_ext.io.optional import need
from xcos_ext.io.several import several
from xcos_ext.onnx.files import metadata, onnx_hash, read_onnx

from . import plan as plans
from .plan import BatchProfile, EngineError, PlanCard, TensorCard, TensorRTError

__all__ = ["build_engine", "cached_engine"]

#: Kernels for one pair at a time, which is what a door or a phone asks for, and room for small batches.
_DEFAULT_PROFILES = (BatchProfile(1, 1, 32),)

Profiles = Sequence[BatchProfile | tuple[int, int, int]]
Progress = Callable[[int, int], None]


def build_engine(
    onnx: StrPath,
    plan: StrPath,
    *,
    profiles: Profiles | None = None,
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
        tf32: let fp32 products be rounded to TF32's 10 bits of mantissa. Off, unlike TensorRT's default.
        device: GPU to build on and for.
        progress: called with (done, total). An exception it raises, like Ctrl-C, ends the build at its next step.

    Returns:
        What was built, as the sidecar holds it.

    Raises:
        MissingPackageError: tensorrt or onnx is not installed.
        TensorRTError: no GPU, a TensorRT that is too old, or a build that failed, with TensorRT's last errors.
        ModelError: an ONNX file that is damaged, or a graph that TensorRT cannot take.
        OutputError, ValueError, TypeError: a file that cannot be written, or another argument that cannot be.
    """
    wanted, file = _checked(profiles), os.fspath(onnx)
    check_output(plan, (".plan", ".engine"))
    check_output(plans.sidecar(plan), (".json",))
    trt, gpu = plans.load_tensorrt(), plans.find_gpu(device)
    digest = onnx_hash(file)
    proto = read_onnx(file)
    try:
        graph = proto.SerializeToString()
    except Exception as error:  # protobuf's own types
        raise ModelError(f"{file}: expected a graph of less than 2 GiB with its weights ({error})") from error

    steps, log = _Steps(progress), plans.log_of(trt)
    with torch.cuda.device(gpu.device):
        builder = log.start(trt.Builder)
        network = _parsed(trt, builder, graph, file)
        inputs = tuple(TensorCard.of(network.get_input(i)) for i in range(network.num_inputs))
        outputs = tuple(TensorCard.of(network.get_output(i)) for i in range(network.num_outputs))
        fitting = _fitting(inputs, wanted, file)
        config = _config(trt, builder, inputs, fitting, tf32)
        config.progress_monitor = steps.monitor(trt)
        built = steps.run(lambda: builder.build_serialized_network(network, config), gpu.device)
    if steps.failure is not None:
        raise steps.failure
    if built is None:
        raise TensorRTError(f"{file}: TensorRT {trt.__version__} could not build an engine: {log.reason()}")
    place = (trt.__version__, gpu.sm, gpu.name, digest)
    with memoryview(built) as data:
        card = PlanCard(*place, data.nbytes, inputs, outputs, fitting, tf32, metadata(proto)).signed(data)
        # Whoever reads between the two finds a plan that is not the sidecar's, and refuses it.
        write_atomically(plan, methodcaller("write", data))
    text = json.dumps(asdict(card), indent=2) + "\n"
    write_atomically(plans.sidecar(plan), methodcaller("write", text.encode()))
    if progress is not None:
        progress(100, 100)
    return card


def cached_engine(
    onnx: StrPath,
    folder: StrPath,
    *,
    profiles: Profiles | None = None,
    tf32: bool = False,
    device: str | torch.device = "cuda",
    progress: Progress | None = None,
) -> Path:
    """The plan of a graph for this TensorRT and GPU: from a folder, or built and left there.

    A plan is found by the versions of TensorRT, the GPU, the ONNX file's hash and the options together, so a change of
    any of them builds another. One that is damaged or has lost its sidecar is built again. Processes that want the
    same plan build it once. Nothing in the folder is ever removed.

    Args:
        onnx: the graph.
        folder: made if it is not there. Plans are code: let nobody write into it whom you do not trust.
        profiles, tf32, device, progress: as :func:`build_engine` has them.

    Returns:
        The plan's absolute path, for :class:`~xcos_ext.deploy.tensorrt.TrtRunner`. Errors are :func:`build_engine`'s.
    """
    wanted = _checked(profiles)
    filelock = need("filelock", "a folder of TensorRT engines", extra="tensorrt")
    trt, gpu = plans.load_tensorrt(), plans.find_gpu(device)
    key = repr((trt.__version__, gpu.sm, gpu.name, onnx_hash(onnx), wanted, tf32))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(onnx).stem)[:60] or "engine"
    plan = local_path(folder).absolute() / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.plan"
    with contextlib.suppress(OSError):  # the next line says what is wrong
        plan.parent.mkdir(parents=True, exist_ok=True)
    check_output(plan, (".plan",))
    with filelock.FileLock(plan.with_suffix(".lock")):
        try:
            plans.load_plan(plan)
        except EngineError:
            build_engine(onnx, plan, profiles=wanted, tf32=tf32, device=gpu.device, progress=progress)
    return plan


def _checked(profiles: Profiles | None) -> tuple[BatchProfile, ...] | None:
    """Profiles as given by a caller; None stays None."""
    if profiles is None:
        return None
    several(profiles, "profiles", "(min, opt, max)")
    if not profiles:
        raise ValueError("profiles: expected at least one, got none")
    try:
        return tuple(p if isinstance(p, BatchProfile) else BatchProfile(*p) for p in profiles)
    except TypeError as error:
        raise TypeError(f"profiles: expected (min, opt, max) each, got {profiles!r}") from error


def _parsed(trt: Any, builder: Any, graph: bytes, file: str) -> Any:
    """The strongly typed network of a graph."""
    kinds = trt.NetworkDefinitionCreationFlag
    # In TensorRT 10 a network is weakly typed unless asked; later there is nothing else. An explicit batch goes without
    # saying where the flag is gone.
    flags = [kinds.STRONGLY_TYPED, *([kinds.EXPLICIT_BATCH] if hasattr(kinds, "EXPLICIT_BATCH") else [])]
    network = builder.create_network(sum(1 << int(flag) for flag in flags))
    parser = trt.OnnxParser(network, plans.log_of(trt).logger)
    if parser.parse(graph):
        return network
    found = []
    for error in map(parser.get_error, range(min(parser.num_errors, 3))):
        where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
        found.append(where + " ".join(error.desc().split())[:300])
    if parser.num_errors > len(found):
        found.append(f"and {parser.num_errors - len(found)} more")
    raise ModelError(f"{file}: TensorRT {trt.__version__} cannot take this graph: {'; '.join(found)}")


def _fitting(
    inputs: Sequence[TensorCard], wanted: tuple[BatchProfile, ...] | None, file: str
) -> tuple[BatchProfile, ...]:
    """The profiles to build a graph with: none for a graph of a fixed batch."""
    for card in inputs:
        if -1 in card.shape[1:]:
            shape = list(card.shape)
            raise ModelError(
                f"{file}: input {card.name!r}: expected only the batch, its first axis, to vary, got {shape}"
            )
    if any(-1 in card.shape for card in inputs):
        return _DEFAULT_PROFILES if wanted is None else wanted
    fixed = {card.shape[0] for card in inputs if card.shape}
    for profile in wanted or ():
        if fixed != {profile.min} or profile.min != profile.max:
            batch = ", ".join(map(str, sorted(fixed))) or "none"
            raise ValueError(f"profiles: expected none, because the graph's batch is fixed ({batch}); got {profile}")
    return ()


def _config(trt: Any, builder: Any, inputs: Sequence[TensorCard], profiles: Sequence[BatchProfile], tf32: bool) -> Any:
    """How the engine is built."""
    config = builder.create_builder_config()
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    for batch in profiles:
        profile = builder.create_optimization_profile()
        for card in inputs:
            if -1 in card.shape:
                profile.set_shape(card.name, *((n, *card.shape[1:]) for n in (batch.min, batch.opt, batch.max)))
        if config.add_optimization_profile(profile) < 0:
            raise TensorRTError(f"profiles: TensorRT refuses a batch of {batch}: {plans.log_of(trt).reason()}")
    return config


class _Steps:
    """How far TensorRT is, phase within phase; and what Ctrl-C or ``progress`` raised, which ends the build."""

    def __init__(self, progress: Progress | None) -> None:
        self.failure: BaseException | None = None
        self._progress, self._percent = progress, -1
        self._phases: dict[str, list[int]] = {}  # steps and those done; outer phases first

    def run(self, build: Callable[[], Any], device: torch.device) -> Any:
        """Build in a thread of its own: one that is in TensorRT cannot take a Ctrl-C, and TensorRT swallows it."""

        built: Future[Any] = Future()

        def work() -> None:
            try:
                with torch.cuda.device(device):
                    built.set_result(build())
            except BaseException as error:
                built.set_exception(error)

        try:
            threading.Thread(target=work, name="xcos-tensorrt").start()
            while not wait([built], timeout=0.1).done:  # again and again: a signal may meet another thread
                pass
        except KeyboardInterrupt as error:
            self.failure = error
            wait([built])
            raise
        return built.result()

    def note(self, phase: str, total: int | None, done: int) -> bool:
        """A phase begins with a total, goes on without, and ends with 0; gives whether to go on."""
        try:
            if total == 0:
                self._phases.pop(phase, None)
            elif total or phase in self._phases:
                self._phases[phase] = [total or self._phases[phase][0], done]
            share, scale = 0.0, 100.0
            for steps, finished in self._phases.values():
                share += scale * min(finished, steps) / steps
                scale /= steps
            if self._progress is not None and self._percent < int(share) < 100:
                self._percent = int(share)
                self._progress(self._percent, 100)
        except BaseException as error:  # must not go through TensorRT
            self.failure = self.failure or error
        return self.failure is None

    def monitor(self, trt: Any) -> Any:
        """The object that TensorRT tells."""
        note = self.note

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)  # pybind11 does not accept super()

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                note(phase_name, max(num_steps, 1), 0)

            def step_complete(self, phase_name: str, step: int) -> bool:
                return note(phase_name, None, step + 1)

            def phase_finish(self, phase_name: str) -> None:
                note(phase_name, 0, 0)

        return Monitor()
