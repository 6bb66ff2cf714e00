"""Explainers by gradients: FGGB, xSSAB and Grad-CAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext.backbones.recogniser import in_type_of
from xcos_ext.card.calibration import check_threshold
from xcos_ext.io.optional import need

from .base import GradientExplainer, split, threshold_of
from .interface import EmbeddingCosine, PairModel, Saliency, XCosPairs

__all__ = ["FGGB", "XSSAB", "GradCAM"]

Units = Literal["cells", "channels"]
Gradients = Literal["signed", "magnitude"]


class FGGB(GradientExplainer):
    """Feature-guided gradient backpropagation.

    As published (arXiv 2403.04549): ``S = sum_k G_k / |G_k| (w_k - t / K)``, with G_k the gradient of A's channel k to
    A's pixels, |.| the Frobenius norm over pixels and colours, and w_k the channel's share of the score; the positive
    part of S is what is similar, its negative part what is not. A channel without a gradient adds nothing. One
    backward pass per channel.

    Units of a plain embedding are its K numbers before they are brought to unit length: w_k = a_k b_k / (|a| |b|). An
    xCos score has C * h * w channels; its units are by default the h * w cells instead, G the gradient of the cell's
    cosine and w the cell's W * S. The paper does not say how colours become one map: here it is their mean.

    >>> FGGB("channels", gradients="magnitude").units
    'channels'

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
        super().__init__(batch_size)
        self.units = units
        self.threshold = check_threshold(threshold)
        self.gradients = gradients
        self.clip = clip
        self.vectorised = vectorised

    def _check(self, model: PairModel) -> None:
        if self.units == "cells" and not isinstance(model, XCosPairs):
            raise ValueError(f"units: expected 'channels' for a model without cells, got 'cells' ({model.name})")
        threshold_of(model, self.threshold, "the worth of a channel")

    def _gradient_maps(self, model: PairModel, a: Tensor, features_b: Tensor, size: int) -> Saliency:
        threshold = threshold_of(model, self.threshold, "the worth of a channel")
        images = a.requires_grad_()
        units, shares = self._units(model, images, features_b)
        count, total = units.shape[0], units.shape[1]
        made = images.new_zeros(count, *a.shape[2:], dtype=torch.float32)
        if not units.requires_grad:
            return split(made, self.clip)  # the features do not depend on the picture
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
        return split(made, self.clip)

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


class XSSAB(GradientExplainer):
    """Gradients of the score restricted to its supporting and to its opposing channels.

    As published (arXiv 2304.13409, and its code): channels k of the K with ``u_k v_k >= t / K`` support a match at the
    threshold t, the others oppose it. The score restricted to either set, with B held constant, is differentiated to
    A's pixels; the map is the mean of the gradient's magnitude over the colours. Two backward passes per picture,
    whatever K is. On an xCos model the channels are those of all cells' unit features, weighed with the attention,
    which is held constant.

    >>> XSSAB(threshold=0.3).threshold
    0.3

    Args:
        threshold: t; None: the model's.
        batch_size: pictures per pass; None: 16 on a CPU, else 256.

    Raises:
        ValueError: an option out of range.
    """

    name = "xssab"

    def __init__(self, *, threshold: float | None = None, batch_size: int | None = None) -> None:
        super().__init__(batch_size)
        self.threshold = check_threshold(threshold)

    def _check(self, model: PairModel) -> None:
        threshold_of(model, self.threshold, "the support of a channel")

    def _gradient_maps(self, model: PairModel, a: Tensor, features_b: Tensor, size: int) -> Saliency:
        threshold = threshold_of(model, self.threshold, "the support of a channel")
        images = a.requires_grad_()
        u, v = model.channels(model.features(images), features_b)
        terms = u * v.detach()
        supports = terms.detach() >= threshold / terms.shape[1]
        maps = []
        for chosen in (supports, ~supports):
            gradient = torch.zeros_like(images)
            if terms.requires_grad:  # else the features do not depend on the picture
                total = torch.where(chosen, terms, 0.0).sum()  # pairs do not meet, so one pass serves them all
                (gradient,) = torch.autograd.grad(total, images, retain_graph=True)
            maps.append(gradient.abs().mean(1).float())
        return Saliency(*maps)


class GradCAM(GradientExplainer):
    """Channels of the last map, each weighed with the mean of the score's gradient to it.

    ``sum_c mean_ij(d score / d x_c,ij) x_c`` over the backbone's last map x (Grad-CAM, arXiv 1610.02391; the score is
    that of the pair, with B held constant), from :class:`captum.attr.LayerGradCam`. Grad-CAM keeps the positive part,
    which is what is similar; the negative part is what is not. One forward and, behind the map, one backward pass.

    >>> GradCAM(clip=False).name
    'gradcam'

    Args:
        clip: False: the maps keep their order where the sum has the other sign, too.
        batch_size: pictures per pass; None: 16 on a CPU, else 256.

    Raises:
        MissingPackageError: captum is not installed (the ``explain`` extra).
        ValueError: an option out of range.
    """

    name = "gradcam"

    def __init__(self, *, clip: bool = True, batch_size: int | None = None) -> None:
        super().__init__(batch_size)
        self._method = need("captum.attr", "Grad-CAM", extra="explain").LayerGradCam
        self.clip = clip

    def _gradient_maps(self, model: PairModel, a: Tensor, features_b: Tensor, size: int) -> Saliency:
        to_map: Callable[[Tensor], Tensor] = model.features
        to_features: Callable[[Tensor], Tensor] = nn.Identity()
        if isinstance(model, XCosPairs):
            xcos = model.model
            to_map, to_features = lambda images: xcos._grid(images, "a"), xcos.head.features
        elif isinstance(model, EmbeddingCosine):
            recogniser = model.recogniser
            to_map = lambda images: recogniser.grid(in_type_of(recogniser, images))  # noqa: E731
            to_features = lambda grid: F.normalize(recogniser.embed(grid), dim=1)  # noqa: E731
        elif features_b.dim() != 4:
            raise ValueError(
                f"model: expected features that are a map [N, C, h, w], got {list(features_b.shape)} ({model.name})"
            )
        with torch.no_grad():  # nothing in front of the map is differentiated
            grid = to_map(a).clone()
        layer = nn.Identity()
        method = self._method(lambda grid: model.score(to_features(layer(grid)), features_b), layer)
        return split(method.attribute(grid).squeeze(1), self.clip)
