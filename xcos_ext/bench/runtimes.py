"""Runtimes that run a model: what makes ready what one case calls.

What cannot be made ready raises :class:`Unavailable` with the reason, or any other error, and the case is listed with
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.card.card import INPUTS
from xcos_ext.io.text import counted

from .cases import Key
from .workload import Workload

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Ready", "Unavailable", "make_ready"]

_TOP = 10
#: The exported graph of a stage.
_KINDS = {"backbone": "template", "head": "score", "pair": "pair"}


class Unavailable(Exception):
    """A case that this machine, this installation or this model cannot run; the message says why."""


@dataclass
class Ready:
    """A case that can be called.

    Attributes:
        call: does it once, with inputs that are there already; on a GPU it may return before the work is done.
        on_device: whether its work lies on torch's current CUDA stream; else the call returns when it is done.
        items: units of the stage that one call does.
        detail: how the runtime does it, where it has a choice.
        scores: of the case's pairs [N], to be held against the eager model's; None: it has none.
    """

    call: Callable[[], Any]
    on_device: bool
    items: int
    detail: str = ""
    scores: Callable[[], Tensor | np.ndarray] | None = None


def make_ready(key: Key, workload: Workload, *, seconds: float = 10.0) -> Ready:
    """What a case calls.

    Args:
        key: the case.
        workload: model and inputs.
        seconds: that a runtime may spend on measuring its own choices.

    Raises:
        Unavailable: it cannot be run here.
        Exception: whatever a runtime raises.
    """
    if key.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("this torch sees no GPU")
    if key.runtime == "native":
        return _native(key, workload)
    if key.runtime in ("onnxruntime", "tensorrt"):
        return _exported(key, workload)
    return _in_torch(key, workload, seconds)


def _native(key: Key, workload: Workload) -> Ready:
    """Stages with one implementation."""
    from xcos_ext.faces import align_face, read_picture
    from xcos_ext.ops import xcos_topk

    if key.stage == "search":
        probes = workload.templates(key.batch, key.device, key.dtype, "probe")
        gallery = workload.templates(workload.gallery_size, key.device, key.dtype, "gallery")
        detail = f"{counted(len(gallery), 'face')}, {gallery.nbytes / 2**20:.0f} MiB"
        call = _without_gradients(lambda: xcos_topk(probes, gallery, k=min(_TOP, len(gallery))))
        return Ready(call, key.device == "cuda", key.batch * len(gallery), detail)
    pixels, path = workload.pixels(), workload.picture
    if key.stage == "decode":
        assert path is not None
        return Ready(lambda: read_picture(path), False, 1, f"{pixels.shape[1]} x {pixels.shape[0]} pixels")
    if key.stage == "detect":
        detector, name = workload.detector(), "small" if workload.detector_name == "small" else "YuNet"
        return Ready(lambda: detector.detect(pixels), False, 1, name)
    landmarks, size = workload.landmarks(), workload.model.preprocessing.size
    return Ready(lambda: align_face(pixels, landmarks, size), False, 1)


def _without_gradients(step: Callable[[], Any]) -> Callable[[], Any]:
    return torch.inference_mode()(step)


def _torch_step(key: Key, workload: Workload, model: Any) -> Callable[[], Any]:
    """A stage of a model in torch, without arguments."""
    batch, device = key.batch, key.device
    if key.stage == "head":
        a, b = (workload.features(batch, device, side) for side in (0, 1))
        return lambda: model.score(a, b, return_maps=True)
    images_a = workload.images(batch, device)
    if key.stage == "backbone":
        return lambda: model.features(images_a)
    if key.stage == "pair":
        images_b = workload.images(batch, device, 1)
        return lambda: model(images_a, images_b)
    backbone = model.backbone
    with torch.inference_mode():
        grid = backbone.grid(images_a) if isinstance(backbone, Recogniser) else backbone(images_a)
    return lambda: model.head.features(grid)


def _in_torch(key: Key, workload: Workload, seconds: float) -> Ready:
    if key.runtime == "graph" and key.device != "cuda":
        raise Unavailable("CUDA graphs need a GPU (--device cuda)")
    detail = ""
    if key.runtime == "compiled":
        # Faces of a pair go through as one batch, so a backbone alone is compiled for another shape.
        model = workload.compiled(key.device, key.dtype, key.batch, key.stage != "backbone", seconds)
        # It looks after gradients itself, and has the model's own head.
        call, detail = _torch_step(key, workload, model), "" if key.stage == "head" else str(model.chosen)
    else:
        make = workload.eager if key.runtime == "eager" else workload.folded
        call = _without_gradients(_torch_step(key, workload, make(key.device, key.dtype)))
    if key.runtime == "graph":
        call = _captured(call)
    scores = (lambda: call().score) if key.stage in ("head", "pair") else None
    return Ready(call, key.device == "cuda", key.batch, detail, scores)


def _captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a step: one launch for all its kernels; its inputs stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    # The graph owns its output's memory, which lasts as long as the call does.
    def call() -> Any:
        graph.replay()
        return output

    return call


def _graph_inputs(key: Key, workload: Workload) -> dict[str, Tensor]:
    """The graph's inputs by name, on the CPU: crops, or flat templates [N, T] of them for the head."""
    sides = [workload.images(key.batch, "cpu", side) for side in (0, 1)]
    if key.stage == "head":
        model = workload.session("template", "fp32", "cpu")
        sides = [torch.from_numpy(model.templates(side.numpy())) for side in sides]
    return dict(zip(INPUTS[_KINDS[key.stage]], sides, strict=False))


def _exported(key: Key, workload: Workload) -> Ready:
    """The stage's ONNX graph in onnxruntime or TensorRT."""
    if key.runtime == "tensorrt" and key.device != "cuda":
        raise Unavailable("TensorRT needs a GPU (--device cuda)")
    if key.dtype == "bf16":
        raise Unavailable("graphs are written in fp32 and fp16")
    # The head computes in fp32 whatever the backbone does.
    kind, dtype = _KINDS[key.stage], "fp32" if key.stage == "head" else key.dtype
    if key.runtime == "tensorrt":
        runner = workload.engine(kind, dtype, key.device, key.batch)
        on_device = {name: value.to(key.device) for name, value in _graph_inputs(key, workload).items()}
        scores = (lambda: runner.run(on_device)["score"]) if key.stage != "backbone" else None
        return Ready(lambda: runner.run(on_device), True, key.batch, scores=scores)
    if key.device == "cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise Unavailable("this onnxruntime has no CUDA provider: pip install onnxruntime-gpu")
    model = workload.session(kind, dtype, key.device)
    inputs = [value.numpy() for value in _graph_inputs(key, workload).values()]
    run = {"backbone": model.templates, "head": model.score, "pair": model.pair}[key.stage]
    scores = (lambda: run(*inputs).score) if key.stage != "backbone" else None
    # Host arrays in and out: on a GPU the copies are part of the call.
    return Ready(lambda: run(*inputs), False, key.batch, "host arrays" if key.device == "cuda" else "", scores)
