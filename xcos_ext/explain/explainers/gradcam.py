"""Grad-CAM on the last grid map, through captum."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext.backbones import Recogniser
from xcos_ext.io.optional import need

from .checks import at_once, check_count, check_pairs, differentiable, split, with_gradients
from .interface import EmbeddingCosine, PairModel, Saliency, XCosPairs

__all__ = ["GradCAM"]

_Step = Callable[[Tensor], Tensor]


class _Grid(nn.Module):
    """Images to the map that is explained; nothing in front of it is differentiated."""

    def __init__(self, compute: _Step) -> None:
        super().__init__()
        self._compute = compute

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self._compute(images).clone()


class _PairScore(nn.Module):
    """Images of A [N, 3, H, W] to their scores with B [N]."""

    def __init__(self, model: PairModel) -> None:
        super().__init__()
        to_map, to_features = _steps(model)
        self.grid = _Grid(to_map)
        self._to_features = to_features
        self._score = model.score

    def forward(self, images: Tensor, features_b: Tensor) -> Tensor:
        return self._score(self._to_features(self.grid(images)), features_b)


def _steps(model: PairModel) -> tuple[_Step, _Step]:
    """Images to the last map before spatial resolution is lost, and from there to features."""
    if isinstance(model, XCosPairs):
        backbone = model.model.backbone
        return (backbone.grid if isinstance(backbone, Recogniser) else backbone), model.model.head.features
    if isinstance(model, EmbeddingCosine):
        recogniser = model.recogniser
        return recogniser.grid, lambda grid: F.normalize(recogniser.embed(grid), dim=1)
    return model.features, lambda features: features


class GradCAM:
    """Channels of the last map, each weighed with the mean of the score's gradient to it.

    ``sum_c mean_ij(d score / d x_c,ij) x_c`` over the backbone's last map x (Grad-CAM, arXiv 1610.02391; the score is
    that of the pair, with B held constant), from :class:`captum.attr.LayerGradCam`. Grad-CAM keeps the positive part,
    which is what is similar; the negative part is what is not. One forward and, behind the map, one backward pass.

    Args:
        clip: False: the maps keep their order where the sum has the other sign, too.
        batch_size: pictures per pass; None: 16 on a CPU, else 256.

    Raises:
        MissingPackageError: captum is not installed (the ``explain`` extra).
        ValueError: an option out of range.
    """

    name = "gradcam"

    def __init__(self, *, clip: bool = True, batch_size: int | None = None) -> None:
        self._method = need("captum.attr", "Grad-CAM", extra="explain").LayerGradCam
        self.clip = clip
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)

    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over the cells of A's map [N, h, w].

        Raises:
            TypeError: something else than floating-point tensors.
            ValueError: images that are not [N, 3, H, W], or a model whose features are no map.
        """
        check_pairs(model, a, b)
        size = at_once(self.batch_size, a.device)
        with with_gradients():
            net = differentiable(model)
            module = _PairScore(net)
            made = []
            for part_a, part_b in zip(a.split(size), b.split(size), strict=True):
                with torch.no_grad():
                    features_b = net.features(part_b).clone()
                if not isinstance(net, XCosPairs | EmbeddingCosine) and features_b.dim() != 4:
                    raise ValueError(
                        f"model: expected features that are a map [N, C, h, w], got {list(features_b.shape)} "
                        f"({net.name})"
                    )
                method = self._method(module, module.grid)
                made.append(method.attribute(part_a.detach().clone(), additional_forward_args=(features_b,)))
            return split(torch.cat(made).squeeze(1), self.clip)
