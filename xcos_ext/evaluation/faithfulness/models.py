"""What the protocols ask of the models that they measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from xcos_ext.explain.explainers.interface import EmbeddingCosine, Explainer, PairModel, Saliency, XCosPairs
from xcos_ext.ops import xcos_matrix

__all__ = ["device_of", "explained", "grid_of", "mate_scorer", "remembering"]

_REMEMBERED = 4  # batches of features
_PAIRS_AT_ONCE = 1024
_GRID = (7, 7)


class _Memory:
    """The features of the last few batches, so that explainers that run one after another do not compute them anew."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        self._compute = compute
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self._compute(images)
        for place, (known, features) in enumerate(self._kept):
            if known is images:
                self._kept.append(self._kept.pop(place))
                return features
        features = self._compute(images)
        self._kept = [*self._kept[1 - _REMEMBERED :], (images, features)]
        return features


class _RememberingCells(XCosPairs):
    def __init__(self, model: XCosPairs) -> None:
        super().__init__(model.model)
        self._memory = _Memory(model.features)

    def features(self, images: Tensor) -> Tensor:
        return self._memory(images)


class _RememberingCosine(EmbeddingCosine):
    def __init__(self, model: EmbeddingCosine) -> None:
        super().__init__(model.recogniser, threshold=model.threshold, name=model.name)
        self._memory = _Memory(model.features)

    def features(self, images: Tensor) -> Tensor:
        return self._memory(images)


def remembering(model: PairModel) -> PairModel:
    """The same model, which keeps the features of the last few batches while no gradients are wanted.

    A batch is known again as the same tensor object, so it must not be changed in place. Models of other classes come
    back as they are.
    """
    if type(model) is XCosPairs:
        return _RememberingCells(model)
    if type(model) is EmbeddingCosine:
        return _RememberingCosine(model)
    return model


def device_of(model: PairModel) -> torch.device:
    """Where its network is; the CPU if it has none."""
    module = getattr(model, "module", None)
    parameter = next(module.parameters(), None) if isinstance(module, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


@torch.no_grad()
def grid_of(model: PairModel) -> tuple[int, int]:
    """Rows and columns of an xCos model's cells; 7x7 for models without cells."""
    if not isinstance(model, XCosPairs):
        return _GRID
    blank = torch.zeros(1, 3, *model.preprocessing.size, device=device_of(model))
    return cast(tuple[int, int], tuple(model.features(blank).shape[2:]))


def explained(explainer: Explainer, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
    """An explainer's maps, checked.

    Raises:
        ValueError: of another shape than [N, h, w], or values that are not finite.
    """
    maps = explainer(model, a, b)
    for name, made in zip(Saliency._fields, maps, strict=True):
        if made.dim() != 3 or made.shape[0] != a.shape[0]:
            raise ValueError(f"{explainer.name}: {name}: expected [{a.shape[0]}, h, w], got {list(made.shape)}")
        if not torch.isfinite(made).all():
            raise ValueError(f"{explainer.name}: {name}: a map has values that are NaN or infinite")
    return Saliency(*(made.detach().float() for made in maps))


def mate_scorer(model: PairModel, gallery: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that scores probes' features [P, ...] against all of a gallery's [G, ...]: [P, G].

    xCos scores and cosines are matrix products; other models are asked pair by pair.
    """
    if isinstance(model, XCosPairs):
        head = model.model
        enrolled = head.templates(gallery, "gallery")
        return lambda probes: xcos_matrix(head.templates(probes, "probe"), enrolled)
    if isinstance(model, EmbeddingCosine):
        return lambda probes: probes @ gallery.T

    def paired(probes: Tensor) -> Tensor:
        rows = []
        for probe in probes:
            parts = gallery.split(_PAIRS_AT_ONCE)
            rows.append(torch.cat([model.score(probe.expand_as(part), part) for part in parts]))
        return torch.stack(rows)

    return paired
