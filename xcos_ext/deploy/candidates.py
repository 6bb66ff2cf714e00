"""Candidates for the fastest way to run a model: eager, folded, packed, compiled, as CUDA graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from xcos_ext.io.several import several
from xcos_ext.model.model import XCosModel
from xcos_ext.ops import XCosScore

from .cuda_graphs import CudaGraphs
from .inference import for_inference

__all__ = ["CANDIDATES", "DEFAULT_CANDIDATES", "DTYPE_NAMES", "Candidate", "build_candidate", "names"]

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

#: Every candidate there is, by device, simplest first.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "cpu": ("eager", "folded", "packed", "inductor", "ahead of time", "autotuned"),
    "cuda": ("eager", "folded", "graph", "inductor", "inductor graph", "autotuned graph"),
}
#: What is tried where nothing is asked for. On a CPU autotuning takes minutes and is seldom worth it.
DEFAULT_CANDIDATES = {"cpu": CANDIDATES["cpu"][:-1], "cuda": CANDIDATES["cuda"]}


class Candidate:
    """Images to grid features, and pairs of images to scores, both faces of a pair in one batch."""

    def __init__(self, model: XCosModel) -> None:
        self.model = model

    def features(self, images: Tensor) -> Tensor:
        """[N, 3, height, width], any float type -> F [N, C, H, W]."""
        return self.model.features(images)

    def pair(self, images_a: Tensor, images_b: Tensor) -> XCosScore:
        """Two batches of one shape -> score and maps."""
        features = self.features(torch.cat([images_a, images_b]))
        pairs = images_a.shape[0]
        return cast(XCosScore, self.model.score(features[:pairs], features[pairs:], return_maps=True))


class _Eager(Candidate):
    """The model as it came."""

    def __init__(self, model: XCosModel) -> None:
        super().__init__(model)
        self._dtype = next(model.parameters()).dtype

    def features(self, images: Tensor) -> Tensor:
        return self.model.features(images.to(self._dtype))

    def pair(self, images_a: Tensor, images_b: Tensor) -> XCosScore:
        return cast(XCosScore, self.model(images_a.to(self._dtype), images_b.to(self._dtype)))


class _Embed(nn.Module):
    """Images to grid features, what is compiled."""

    def __init__(self, model: XCosModel) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor) -> Tensor:
        return self.head.features(self.backbone(images))


class _Compiled(Candidate):
    """Body and 1x1 block compiled for one batch size; other sizes go through the folded model."""

    def __init__(self, model: XCosModel, shape: Sequence[int], run: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model)
        self._shape = tuple(shape)
        self._run = run

    def features(self, images: Tensor) -> Tensor:
        if tuple(images.shape) != self._shape:
            return super().features(images)
        # One dtype, one layout: others would be compiled again, or be wrong for what was compiled once and for all.
        return self._run(images.to(torch.float32, memory_format=torch.contiguous_format))


def _just_in_time(embed: _Embed, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """By torch.compile, at the first call."""

    def run(images: Tensor) -> Tensor:
        return cast(Tensor, embed(images))

    # Dynamo counts recompilations by code object: with one of its own, no other model uses up this one's.
    run.__code__ = run.__code__.replace(co_name=f"embed_{id(embed):x}")
    return cast(Callable[[Tensor], Tensor], torch.compile(run, fullgraph=True, dynamic=False, options=options))


def _ahead_of_time(
    embed: _Embed, shape: Sequence[int], device: torch.device, options: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """By AOTInductor, now: a library without Python between its kernels and without guards before them."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    program = torch.export.export(embed, (torch.zeros(*shape, device=device),))
    with tempfile.TemporaryDirectory() as folder:
        file = aoti_compile_and_package(program, package_path=str(Path(folder) / "embed.pt2"), inductor_configs=options)
        return cast(Callable[[Tensor], Tensor], aoti_load_package(file))


class _Graphed(Candidate):
    """Another candidate, replayed from CUDA graphs."""

    def __init__(self, candidate: Candidate, cuda: Any = None) -> None:
        super().__init__(candidate.model)
        self._features = CudaGraphs(lambda images: (candidate.features(images),), cuda=cuda)
        self._pair = CudaGraphs(lambda a, b: tuple(candidate.pair(a, b)), cuda=cuda)

    def features(self, images: Tensor) -> Tensor:
        return self._features(images)[0]

    def pair(self, images_a: Tensor, images_b: Tensor) -> XCosScore:
        return XCosScore(*self._pair(images_a, images_b))


def build_candidate(
    kind: str, model: XCosModel, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> Candidate:
    """One of :data:`CANDIDATES`.

    Args:
        kind: its name.
        model: in evaluation mode.
        dtype: of the body; ``eager`` keeps the model's own.
        shape: [M, 3, height, width] of the batch that goes through the body.
        device: of the model.

    >>> from xcos_ext import backbones, model
    >>> small = model.XCosModel(backbones.SlimFaceNet(), model.XCosHead(512)).eval()
    >>> folded = build_candidate("folded", small, torch.float32, (2, 3, 112, 112), torch.device("cpu"))
    >>> folded.pair(*torch.zeros(2, 1, 3, 112, 112)).similarity.shape
    torch.Size([1, 7, 7])
    """
    if kind == "eager":
        return _Eager(model)
    prepared = for_inference(model, dtype, packed=kind != "folded")
    candidate = Candidate(prepared)
    if kind.startswith(("inductor", "ahead of time", "autotuned")):
        embed = _Embed(prepared).requires_grad_(False).eval()
        cpu, tuned = device.type == "cpu", kind.startswith("autotuned")
        # Frozen weights become constants in oneDNN's own layout.
        wanted = {"freezing": cpu, "max_autotune": tuned, "coordinate_descent_tuning": tuned and not cpu}
        options = {name: True for name, on in wanted.items() if on}  # the user's own elsewhere
        if kind == "ahead of time":
            run = _ahead_of_time(embed, shape, device, options)
        else:
            run = _just_in_time(embed, options)
        candidate = _Compiled(prepared, shape, run)
    return _Graphed(candidate) if kind.endswith("graph") else candidate


def names(device: torch.device, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the candidates to try, simplest first, the eager one always among them.

    Raises:
        ValueError: a name that this device does not have.
        TypeError: one text.
    """
    known = CANDIDATES.get(device.type, ("eager", "folded"))
    if wanted is None:
        return DEFAULT_CANDIDATES.get(device.type, known)
    if not set(several(wanted, "candidates")) <= set(known):
        raise ValueError(
            f"candidates: expected a list of {', '.join(map(repr, known))} ({device.type}), got {wanted!r}"
        )
    return tuple(name for name in known if name in wanted or name == "eager")
