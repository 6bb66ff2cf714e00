"""FGGB (arXiv 2403.04549): the gradient of every channel at one length, weighed with what the channel is worth."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    at_once,
    check_count,
    check_pairs,
    check_threshold,
    differentiable,
    split,
    threshold_of,
    with_gradients,
)
from .interface import EmbeddingCosine, PairModel, Saliency, XCosPairs

__all__ = ["FGGB"]

Units = Literal["cells", "channels"]
Gradients = Literal["signed", "magnitude"]


class FGGB:
    """Feature-guided gradient backpropagation.

    As published (arXiv 2403.04549): ``S = sum_k G_k / |G_k| (w_k - t / K)``, with G_k the gradient of A's channel k to
    A's pixels, |.| the Frobenius norm over pixels and colours, and w_k the channel's share of the score; the positive
    part of S is what is similar, its negative part what is not. A channel without a gradient adds nothing. One
    backward pass per channel.

    Units of a plain embedding are its K numbers before they are brought to unit length: w_k = a_k b_k / (|a| |b|). An
    xCos score has C * h * w channels; its units are by default the h * w cells instead, G the gradient of the cell's
    cosine and w the cell's W * S. The paper does not say how colours become one map: here it is their mean.

    Args:
        units: ``"cells"`` (xCos models only) or ``"channels"``; None: cells where there are cells.
        threshold: t; None: the model's.
        gradients: ``"signed"``: the formula as it stands. Its maps depend on the sign that an embedding happens to give
            a channel. ``"magnitude"`` puts |G_k| in its place, which does not.
        clip: as published. False: the maps keep their order where S has the other sign, too.
        batch_size: pictures per pass; None: 16 on a CPU, else 256.
        vectorised: several channels per backward pass, as many as fit ``batch_size``; None: except on a CPU, where one
            after the other is as fast.

    Raises:
        ValueError: an option out of range.
    """

    name = "fggb"

    def __init__(
        self,
        units: Units | None = None,
        *,
        threshold: float | None = None,
        gradients: Gradients = "signed",
        clip: bool = True,
        batch_size: int | None = None,
        vectorised: bool | None = None,
    ) -> None:
        if units is not None and units not in get_args(Units):
            raise ValueError(f"units: expected one of {', '.join(get_args(Units))} or None, got {units!r}")
        if gradients not in get_args(Gradients):
            raise ValueError(f"gradients: expected one of {', '.join(get_args(Gradients))}, got {gradients!r}")
        self.units = units
        self.threshold = check_threshold(threshold)
        self.gradients = gradients
        self.clip = clip
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)
        self.vectorised = vectorised

    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over A's pixels [N, H, W].

        Raises:
            TypeError: something else than floating-point tensors.
            ValueError: images that are not [N, 3, H, W], no threshold, or cells of a model that has none.
        """
        check_pairs(model, a, b)
        if self.units == "cells" and not isinstance(model, XCosPairs):
            raise ValueError(f"units: expected 'channels' for a model without cells, got 'cells' ({model.name})")
        threshold = threshold_of(model, self.threshold, "the worth of a channel")
        size = at_once(self.batch_size, a.device)
        with with_gradients():
            net = differentiable(model)
            made = [
                self._signed(net, part_a, part_b, threshold, size)
                for part_a, part_b in zip(a.split(size), b.split(size), strict=True)
            ]
            return split(torch.cat(made), self.clip)

    def _signed(self, model: PairModel, a: Tensor, b: Tensor, threshold: float, size: int) -> Tensor:
        """S [n, H, W] of some pairs."""
        with torch.no_grad():
            features_b = model.features(b).clone()
        images = a.detach().clone().requires_grad_()
        units, shares = self._units(model, images, features_b)
        count, total = units.shape[0], units.shape[1]
        made = images.new_zeros(count, *a.shape[2:], dtype=torch.float32)
        if not units.requires_grad:
            return made  # the features do not depend on the picture
        worth = (shares - threshold / total).float()
        vectorised = a.device.type != "cpu" if self.vectorised is None else self.vectorised
        together = max(1, size // count) if vectorised else 1
        for numbers in torch.arange(total, device=a.device).split(together):
            gradient = _gradients(units, images, numbers).float()  # [units, n, 3, H, W]
            norm = gradient.flatten(2).norm(dim=2)
            scale = torch.where(norm > 0, worth.T[numbers] / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
            if self.gradients == "magnitude":
                gradient = gradient.abs()
            made += torch.einsum("kn,knhw->nhw", scale, gradient.mean(2))
        return made

    def _units(self, model: PairModel, images: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
        """What is differentiated [n, K], and its shares of the score [n, K]."""
        if isinstance(model, EmbeddingCosine):
            raw = model.embedding(images)
            u, v = model.channels(F.normalize(raw, dim=1), features_b)
            return raw, (u * v).detach()
        features = model.features(images)
        u, v = model.channels(features, features_b)
        terms = u * v.detach()
        if not isinstance(model, XCosPairs):
            return u, terms.detach()
        if self.units == "channels":
            return features.flatten(1), terms.detach()
        cells = terms.unflatten(1, (features.shape[1], -1)).sum(1)
        return cells, cells.detach()


def _gradients(units: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
    """Gradients of the units with these numbers to the pictures: [units, n, ...]."""
    if numbers.numel() == 1:
        return torch.autograd.grad(units[:, numbers[0]].sum(), images, retain_graph=True)[0].unsqueeze(0)
    seeds = F.one_hot(numbers, units.shape[1]).to(units.dtype).unsqueeze(1).expand(-1, units.shape[0], -1)
    return torch.autograd.grad(units, images, seeds, retain_graph=True, is_grads_batched=True)[0]
