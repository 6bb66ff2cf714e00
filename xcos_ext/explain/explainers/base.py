"""What explainers share: their options, the checks of their arguments, and gradients under any caller."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .interface import PairModel, Saliency

__all__ = [
    "BatchedExplainer",
    "GradientExplainer",
    "check_count",
    "check_pairs",
    "check_threshold",
    "features_of",
    "split",
    "threshold_of",
]

_AT_ONCE = {"cpu": 16}  # the shipped model on one core: 18 ms a picture one by one, 6.2 by 16, 9.0 by 128
_AT_ONCE_ELSEWHERE = 256


def check_count(name: str, value: int, least: int = 1) -> int:
    """An option that counts something.

    Raises:
        ValueError: less than ``least``, or not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number, at least {least}, got {value!r}")
    return value


def check_threshold(threshold: float | None) -> float | None:
    """A threshold given to an explainer.

    Raises:
        ValueError: it is not finite.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold: expected a finite number or None, got {threshold}")
    return threshold


def threshold_of(model: PairModel, given: float | None, what: str) -> float:
    """The threshold that an explanation is about: the one given, else the model's.

    Raises:
        ValueError: neither; the message says what it is needed for.
    """
    threshold = model.threshold if given is None else given
    if threshold is None:
        raise ValueError(
            f"model: expected a decision threshold, which {what} is about, got none; give one with threshold="
        )
    return threshold


def check_pairs(model: PairModel, a: Tensor, b: Tensor) -> None:
    """The arguments of an explainer.

    Raises:
        TypeError: something else than floating-point tensors.
        ValueError: not [N, 3, H, W] with N >= 1, shapes that differ, or a network in training mode.
    """
    for name, images in (("a", a), ("b", b)):
        if not isinstance(images, Tensor):
            raise TypeError(f"{name}: expected a tensor of normalised images, got {type(images).__name__}")
        if not images.is_floating_point():
            raise TypeError(f"{name}: expected normalised floating-point images, got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[0] < 1:
            raise ValueError(f"{name}: expected [N, 3, H, W], N at least 1, got {list(images.shape)}")
    if a.shape != b.shape:
        raise ValueError(f"b: expected the shape of a, {list(a.shape)}, got {list(b.shape)}")
    module = getattr(model, "module", None)
    if isinstance(module, nn.Module) and any(part.training for part in module.modules()):
        raise ValueError("model: expected evaluation mode, got training mode; call .eval() first")


def features_of(model: PairModel, images: Tensor, batch_size: int) -> Tensor:
    """Features of pictures, some at a time."""
    if images.shape[0] <= batch_size:
        return model.features(images)  # the tensor itself: a model may remember what it has seen
    return torch.cat([model.features(part) for part in images.split(batch_size)])


def split(signed: Tensor, clip: bool) -> Saliency:
    """A signed map [N, h, w] -> its positive part as similar, its negative part as dissimilar.

    Args:
        signed: positive where A is like B.
        clip: as published: what has the other sign is 0 in a map. False keeps the order among it.
    """
    signed = signed.detach().float()
    return Saliency(signed.clamp_min(0), (-signed).clamp_min(0)) if clip else Saliency(signed, -signed)


class BatchedExplainer:
    """An explainer that passes some pictures at a time through the network.

    Args:
        batch_size: pictures per pass; None: 16 on a CPU, else 256.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)

    def _at_once(self, device: torch.device) -> int:
        """Pictures per pass: the number given, else what is fast on the device."""
        return _AT_ONCE.get(device.type, _AT_ONCE_ELSEWHERE) if self.batch_size is None else self.batch_size


class GradientExplainer(BatchedExplainer, ABC):
    """Maps from gradients of the score, some pairs at a time, whatever the caller's mode of gradients is.

    Args:
        batch_size: as for :class:`BatchedExplainer`.
    """

    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over A's pixels [N, H, W], or over the cells of its last map.

        Raises:
            TypeError: something else than floating-point tensors.
            ValueError: images that are not [N, 3, H, W], or a model that the method does not fit.
        """
        check_pairs(model, a, b)
        self._check(model)
        size = self._at_once(a.device)
        made = []
        with torch.inference_mode(False), torch.enable_grad():
            net = _differentiable(model)
            for part_a, part_b in zip(a.split(size), b.split(size), strict=True):
                with torch.no_grad():
                    features_b = net.features(part_b).clone()
                made.append(self._maps(net, part_a.detach().clone(), features_b, size))
            return Saliency(*(torch.cat(maps) for maps in zip(*made, strict=True)))

    def _check(self, model: PairModel) -> None:
        """Refuse, before anything is computed, what the method does not fit."""

    @abstractmethod
    def _maps(self, model: PairModel, a: Tensor, features_b: Tensor, size: int) -> Saliency:
        """Maps of at most ``size`` pairs; A [n, 3, H, W] is a copy of the caller's."""


def _differentiable(model: PairModel) -> PairModel:
    """A model through which gradients can be taken: itself, or a copy if it was made under inference mode."""
    module = getattr(model, "module", None)
    if not isinstance(module, nn.Module):
        return model
    if any(tensor.is_inference() for tensor in (*module.parameters(), *module.buffers())):
        return copy.deepcopy(model)
    return model
