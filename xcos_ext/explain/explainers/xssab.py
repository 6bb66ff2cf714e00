"""xSSAB (arXiv 2304.13409): the channels that argue for a match, and those against it, sent back to the picture."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import at_once, check_count, check_pairs, check_threshold, differentiable, threshold_of, with_gradients
from .interface import PairModel, Saliency

__all__ = ["XSSAB"]


class XSSAB:
    """Gradients of the score restricted to its supporting and to its opposing channels.

    As published (arXiv 2304.13409, and its code): channels k of the K with ``u_k v_k >= t / K`` support a match at the
    threshold t, the others oppose it. The score restricted to either set, with B held constant, is differentiated to
    A's pixels; the map is the mean of the gradient's magnitude over the colours. Two backward passes per picture,
    whatever K is. On an xCos model the channels are those of all cells' unit features, weighed with the attention,
    which is held constant.

    Args:
        threshold: t; None: the model's.
        batch_size: pictures per pass; None: 16 on a CPU, else 256.

    Raises:
        ValueError: an option out of range.
    """

    name = "xssab"

    def __init__(self, *, threshold: float | None = None, batch_size: int | None = None) -> None:
        self.threshold = check_threshold(threshold)
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)

    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over A's pixels [N, H, W].

        Raises:
            TypeError: something else than floating-point tensors.
            ValueError: images that are not [N, 3, H, W], or no threshold.
        """
        check_pairs(model, a, b)
        threshold = threshold_of(model, self.threshold, "the support of a channel")
        size = at_once(self.batch_size, a.device)
        made = []
        with with_gradients():
            net = differentiable(model)
            for part_a, part_b in zip(a.split(size), b.split(size), strict=True):
                made.append(self._maps(net, part_a, part_b, threshold))
            return Saliency(*(torch.cat(maps) for maps in zip(*made, strict=True)))

    @staticmethod
    def _maps(model: PairModel, a: Tensor, b: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features_b = model.features(b).clone()
        images = a.detach().clone().requires_grad_()
        u, v = model.channels(model.features(images), features_b)
        terms = u * v.detach()
        supports = terms.detach() >= threshold / terms.shape[1]
        maps = []
        for chosen in (supports, ~supports):
            if terms.requires_grad:
                total = torch.where(chosen, terms, 0.0).sum()  # pairs do not meet, so one pass serves them all
                (gradient,) = torch.autograd.grad(total, images, retain_graph=True)
            else:
                gradient = torch.zeros_like(images)  # the features do not depend on the picture
            maps.append(gradient.abs().mean(1).float())
        return maps[0], maps[1]
