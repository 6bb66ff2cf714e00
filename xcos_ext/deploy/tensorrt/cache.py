"""Plans that are built when they are first needed, and again when what they were built for has changed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from xcos_ext.io.atomic import OutputError, StrPath
from xcos_ext.onnx.files import onnx_hash

from . import gpu as gpus
from .build import DEFAULT_WORKSPACE, BuildOptions, Progress, build_engine
from .package import EngineError, load_tensorrt
from .plan import load_plan
from .profiles import BatchProfile

__all__ = ["cached_engine"]


def cached_engine(
    onnx: StrPath,
    folder: StrPath,
    *,
    profiles: Sequence[BatchProfile | tuple[int, int, int]] | None = None,
    workspace: int | None = DEFAULT_WORKSPACE,
    version_compatible: bool = False,
    refit: bool = False,
    tf32: bool = False,
    device: str | torch.device = "cuda",
    progress: Progress | None = None,
) -> Path:
    """The plan of a graph for this TensorRT and GPU: from a folder, or built and left there.

    A plan is found by the versions of TensorRT, the GPU, the ONNX file's hash and the options together, so a change of
    any of them builds another. One that is damaged or has lost its sidecar is built again. Processes that want the
    same plan build it once. Timing caches lie in the folder too; nothing in it is ever removed.

    Args:
        onnx: the graph.
        folder: made if it is not there. Plans are code: let nobody write into it whom you do not trust.
        profiles, workspace, version_compatible, refit, tf32, device, progress: as
            :func:`~xcos_ext.deploy.tensorrt.build_engine` has them.

    Returns:
        The plan's path, for :class:`~xcos_ext.deploy.tensorrt.TrtRunner`.

    Raises:
        As :func:`~xcos_ext.deploy.tensorrt.build_engine`.
    """
    options = BuildOptions.checked(profiles, workspace, version_compatible, refit, tf32)
    trt = load_tensorrt()
    gpu = gpus.CUDA.find(device)
    digest = onnx_hash(onnx)
    place = {"tensorrt": trt.__version__, "sm": gpu.sm, "gpu": gpu.name}
    key = hashlib.sha256(json.dumps({**place, "onnx": digest, **asdict(options)}, sort_keys=True).encode()).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(onnx).stem)[:60] or "engine"
    base = Path(folder)
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{base}: cannot be made a folder: {error.strerror or error}") from error
    plan = base / f"{stem}-{key[:20]}.plan"
    with _alone(plan.with_suffix(".lock")):
        with contextlib.suppress(EngineError):
            card, _ = load_plan(plan)
            here = {"tensorrt": card.tensorrt, "sm": card.sm, "gpu": card.gpu}
            if here == place and card.onnx_sha256 == digest:
                return plan
        times = hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()[:20]
        build_engine(
            onnx,
            plan,
            profiles=options.profiles,
            workspace=options.workspace,
            timing_cache=base / f"timing-{times}.cache",
            version_compatible=options.version_compatible,
            refit=options.refit,
            tf32=options.tf32,
            device=gpu.device,
            progress=progress,
        )
    return plan


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process; others wait for it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
