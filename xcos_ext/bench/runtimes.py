"""Ways to run a model, each behind a small adapter that is loaded when it is asked for.

An adapter makes ready what one case calls. What cannot be made ready raises :class:`Unavailable` with the reason, or
any other error, and the case is listed with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.model import XCosModel

from .cases import Key
from .subject import TORCH_DTYPES, Subject

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Ready", "Unavailable", "make_ready"]

_TOP = 10


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


def make_ready(key: Key, subject: Subject, *, threads: int | None = None, seconds: float = 10.0) -> Ready:
    """What a case calls.

    Args:
        key: the case.
        subject: model and inputs.
        threads: of runtimes with threads of their own; None: as torch has.
        seconds: that a runtime may spend on measuring its own choices.

    Raises:
        Unavailable: it cannot be run here.
        Exception: whatever a runtime raises.
    """
    if key.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("this torch sees no GPU")
    if key.runtime == "native":
        return _NATIVE[key.stage](key, subject)
    if key.runtime == "compiled":
        return _compiled(key, subject, seconds)
    if key.runtime == "onnxruntime":
        return _onnxruntime(key, subject, threads or torch.get_num_threads())
    return _ADAPTERS[key.runtime](key, subject)


# --- stages with one implementation


def _decode(key: Key, subject: Subject) -> Ready:
    from xcos_ext.faces import read_picture

    pixels, path = subject.pixels, subject.picture
    assert path is not None
    size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
    return Ready(lambda: read_picture(path), False, 1, size)


def _detect(key: Key, subject: Subject) -> Ready:
    detector, pixels = subject.detector, subject.pixels
    name = "cascade" if subject.detector_name == "cascade" else "YuNet"
    return Ready(lambda: detector.detect(pixels), False, 1, name)


def _align(key: Key, subject: Subject) -> Ready:
    from xcos_ext.faces import align_face

    pixels, landmarks, size = subject.pixels, subject.landmarks, subject.model.preprocessing.size
    return Ready(lambda: align_face(pixels, landmarks, size), False, 1)


def _search(key: Key, subject: Subject) -> Ready:
    from xcos_ext.ops import xcos_topk

    probes = subject.templates(key.batch, key.device, key.dtype, "probe")
    gallery = subject.templates(subject.gallery_size, key.device, key.dtype, "gallery")
    best = min(_TOP, len(gallery))
    detail = f"{len(gallery):,} faces, {gallery.nbytes / 2**20:.0f} MiB"
    call = _without_gradients(lambda: xcos_topk(probes, gallery, k=best))
    return Ready(call, key.device == "cuda", key.batch * len(gallery), detail)


_NATIVE: dict[str, Callable[[Key, Subject], Ready]] = {
    "decode": _decode,
    "detect": _detect,
    "align": _align,
    "search": _search,
}


# --- torch


def _without_gradients(step: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return step()

    return call


def _torch_step(key: Key, subject: Subject, model: XCosModel) -> Callable[[], Any]:
    """A stage of a model in torch, without arguments."""
    batch, device = key.batch, key.device
    if key.stage == "head":
        a, b = (subject.features(batch, device, side) for side in (0, 1))
        return lambda: model.score(a, b, return_maps=True)
    images_a = subject.images(batch, device)
    if key.stage == "backbone":
        return lambda: model.features(images_a)
    if key.stage == "pair":
        images_b = subject.images(batch, device, 1)
        return lambda: model(images_a, images_b)
    backbone = model.backbone
    with torch.inference_mode():
        grid = backbone.grid(images_a) if isinstance(backbone, Recogniser) else backbone(images_a)
    return lambda: model.head.features(grid)


def _scores(key: Key, call: Callable[[], Any]) -> Callable[[], Tensor] | None:
    return (lambda: call().score) if key.stage in ("head", "pair") else None


def _eager(key: Key, subject: Subject) -> Ready:
    call = _without_gradients(_torch_step(key, subject, subject.eager(key.device, key.dtype)))
    return Ready(call, key.device == "cuda", key.batch, scores=_scores(key, call))


def _for_inference(key: Key, subject: Subject) -> Ready:
    call = _without_gradients(_torch_step(key, subject, subject.folded(key.device, key.dtype)))
    return Ready(call, key.device == "cuda", key.batch, scores=_scores(key, call))


def _graph(key: Key, subject: Subject) -> Ready:
    """A CUDA graph of the folded model: one launch for all its kernels; its inputs stay where they are."""
    if key.device != "cuda":
        raise Unavailable("CUDA graphs need a GPU (--device cuda)")
    step = _without_gradients(_torch_step(key, subject, subject.folded(key.device, key.dtype)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def scores() -> Tensor:
        graph.replay()
        found: Tensor = output.score
        return found

    # The graph owns its output's memory, which lasts as long as the call does.
    def call() -> Any:
        graph.replay()
        return output

    return Ready(call, True, key.batch, scores=scores if key.stage in ("head", "pair") else None)


def _compiled(key: Key, subject: Subject, seconds: float) -> Ready:
    from xcos_ext.deploy.compiled import compile_for_inference

    batch, device = key.batch, key.device
    images_a, images_b = (subject.images(batch, device, side) for side in (0, 1))
    # Faces of a pair go through as one batch, so a backbone alone is compiled for another shape.
    example = images_a if key.stage == "backbone" else (images_a, images_b)
    found = subject.once(
        ("compiled", device, key.dtype, batch, key.stage == "backbone"),
        lambda: compile_for_inference(subject.on(device), example, dtypes=(TORCH_DTYPES[key.dtype],), seconds=seconds),
    )
    # It looks after gradients itself.
    if key.stage == "head":
        a, b = (subject.features(batch, device, side) for side in (0, 1))
        return _compiled_ready(key, lambda: found.score(a, b, return_maps=True), "")
    if key.stage == "backbone":
        return _compiled_ready(key, lambda: found.features(images_a), str(found.chosen))
    return _compiled_ready(key, lambda: found(images_a, images_b), str(found.chosen))


def _compiled_ready(key: Key, call: Callable[[], Any], chosen: str) -> Ready:
    return Ready(call, key.device == "cuda", key.batch, chosen, _scores(key, call))


# --- exported graphs

_GRAPHS = {"backbone": "template", "head": "score", "pair": "pair"}


def _graph_file(key: Key, subject: Subject) -> str:
    """The model as an ONNX graph for a case's stage."""
    from xcos_ext.deploy import export_onnx

    if key.dtype == "bf16":
        raise Unavailable("graphs are written in fp32 and fp16")
    kind = _GRAPHS[key.stage]
    # The head computes in fp32 whatever the backbone does.
    dtype = "fp32" if kind == "score" else key.dtype

    def make() -> str:
        path = str(subject.folder / f"{kind}-{dtype}.onnx")
        export_onnx(subject.model, path, kind=kind, dtype=TORCH_DTYPES[dtype])  # type: ignore[arg-type]
        return path

    path: str = subject.once(("file", kind, dtype), make)
    return path


def _flat_templates(key: Key, subject: Subject, side: int) -> Tensor:
    """Templates [N, T] of the case's crops, as graphs of kind ``score`` take them."""
    from xcos_ext.deploy import OnnxModel

    path = _graph_file(replace(key, stage="backbone", dtype="fp32"), subject)
    model = subject.once(("file", "flat"), lambda: OnnxModel(path))
    return torch.from_numpy(model.templates(subject.images(key.batch, "cpu", side).numpy()))


def _graph_inputs(key: Key, subject: Subject) -> dict[str, Tensor]:
    """The graph's inputs by name, on the CPU."""
    from xcos_ext.card.card import INPUTS

    names = INPUTS[_GRAPHS[key.stage]]
    make = _flat_templates if key.stage == "head" else lambda k, s, side: s.images(k.batch, "cpu", side)
    return {name: make(key, subject, side) for side, name in enumerate(names)}


def _onnxruntime(key: Key, subject: Subject, threads: int) -> Ready:
    from xcos_ext.deploy import OnnxModel

    providers: list[Any] | None = None
    if key.device == "cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise Unavailable("this onnxruntime has no CUDA provider: pip install onnxruntime-gpu")
        cuda = ("CUDAExecutionProvider", {"device_id": torch.cuda.current_device()})
        providers = [cuda, "CPUExecutionProvider"]
    path = _graph_file(key, subject)
    model = subject.once(
        ("session", path, key.device, threads), lambda: OnnxModel(path, threads=threads, providers=providers)
    )
    inputs = [value.numpy() for value in _graph_inputs(key, subject).values()]
    run = {"backbone": model.templates, "head": model.score, "pair": model.pair}[key.stage]
    scores = (lambda: run(*inputs).score) if key.stage != "backbone" else None
    # Host arrays in and out: on a GPU the copies are part of the call.
    return Ready(lambda: run(*inputs), False, key.batch, "host arrays" if providers else "", scores)


def _tensorrt(key: Key, subject: Subject) -> Ready:
    if key.device != "cuda":
        raise Unavailable("TensorRT needs a GPU (--device cuda)")
    from xcos_ext.deploy import TrtRunner, build_engine

    path = _graph_file(key, subject)
    plan = f"{path.removesuffix('.onnx')}-{key.batch}.plan"

    def make() -> Any:
        # Kernels for this very batch, and as exact or inexact in fp32 as torch's.
        tf32 = torch.backends.cudnn.allow_tf32
        build_engine(path, plan, profiles=[(key.batch,) * 3], tf32=tf32, device=key.device)
        return TrtRunner(plan, device=key.device)

    runner = subject.once(("engine", plan), make)
    inputs = {name: value.to(key.device) for name, value in _graph_inputs(key, subject).items()}
    scores = (lambda: runner.run(inputs)["score"]) if key.stage != "backbone" else None
    return Ready(lambda: runner.run(inputs), True, key.batch, scores=scores)


_ADAPTERS: dict[str, Callable[[Key, Subject], Ready]] = {
    "eager": _eager,
    "for_inference": _for_inference,
    "graph": _graph,
    "tensorrt": _tensorrt,
}
