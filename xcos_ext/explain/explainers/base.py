"""What explainers share: the loop over pairs, the checks of arguments and options, and gradients under any caller."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .interface import PairModel, Saliency

__all__ = ["BatchedExplainer", "GradientExplainer", "check_count", "split", "threshold_of"]

_AT_ONCE = {"cpu": 16}  # the shipped model on one core: 18 ms a picture one by one, 6.2 by 16, 9.0 by 128
_AT_ONCE_ELSEWHERE = 256


def check_count(name: str, value: int, least: int = 1) -> int:
    """An option that counts something; ValueError if it is less than ``least``, or not a whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number, at least {least}, got {value!r}")
    return value


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


def split(signed: Tensor, clip: bool) -> Saliency:
    """A signed map [N, h, w] -> its positive part as similar, its negative part as dissimilar.

    Args:
        signed: positive where A is like B.
        clip: as published: what has the other sign is 0 in a map. False keeps the order among it.
    """
    signed = signed.detach().float()
    return Saliency(signed.clamp_min(0), (-signed).clamp_min(0)) if clip else Saliency(signed, -signed)


class BatchedExplainer(ABC):
    """An explainer that passes some pictures at a time through the network.

    Args:
        batch_size: pictures per pass; None: 16 on a CPU, else 256.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)

    @torch.inference_mode(False)
    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over A, fp32: [N, H, W] of its pixels, or [N, h, w] of its cells.

        Raises:
            TypeError: something else than floating-point tensors.
            ValueError: images that are not [N, 3, H, W], a network in training mode, or a model that the method does
                not fit, e.g. one without a threshold.
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
        self._check(model)
        size = self.batch_size or _AT_ONCE.get(a.device.type, _AT_ONCE_ELSEWHERE)
        # A single batch stays the tensors themselves: a model may remember what it has seen.
        parts = [(a, b)] if len(a) <= size else zip(a.split(size), b.split(size), strict=True)
        made = [self._maps(model, part_a, part_b, size) for part_a, part_b in parts]
        return Saliency(*(torch.cat(maps) for maps in zip(*made, strict=True)))

    def _check(self, model: PairModel) -> None:  # noqa: B027 - most methods fit every model
        """Refuse, before anything is computed, what the method does not fit."""

    @abstractmethod
    def _maps(self, model: PairModel, a: Tensor, b: Tensor, size: int) -> Saliency:
        """Maps of at most ``size`` pairs."""


class GradientExplainer(BatchedExplainer):
    """Maps from gradients of the score, whatever the caller's mode of gradients is; arguments as for its base."""

    @torch.inference_mode(False)
    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """See :meth:`BatchedExplainer.__call__`."""
        module = getattr(model, "module", None)
        if isinstance(module, nn.Module) and any(t.is_inference() for t in (*module.parameters(), *module.buffers())):
            model = copy.deepcopy(model)  # no gradient goes through what was made under inference mode
        return super().__call__(model, a, b)

    @torch.enable_grad()
    def _maps(self, model: PairModel, a: Tensor, b: Tensor, size: int) -> Saliency:
        with torch.no_grad():
            features_b = model.features(b).clone()
        return self._gradient_maps(model, a.detach().clone(), features_b, size)

    @abstractmethod
    def _gradient_maps(self, model: PairModel, a: Tensor, features_b: Tensor, size: int) -> Saliency:
        """Maps of at most ``size`` pairs; A [n, 3, H, W] is a copy of the caller's."""
