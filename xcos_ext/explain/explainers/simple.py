"""Maps that cost nothing: xCos's own, which come with the score, and controls, which know nothing of the pair."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .base import check_pairs, check_threshold, threshold_of
from .interface import PairModel, Saliency, XCosPairs

__all__ = ["CellMap", "CentreMap", "RandomMap"]

_NAMES = {"contribution": "xcos", "similarity": "xcos-similarity", "attention": "xcos-attention"}


class CellMap:
    """A map of the cells that the score is made of.

    Args:
        kind: ``"contribution"``: W * (S - t), what each cell adds to the decision; ``"similarity"``: S alone;
            ``"attention"``: W alone, the same for what is similar and what is not.
        threshold: t, for ``"contribution"``; None: the model's.

    Raises:
        ValueError: another kind, a threshold that is not finite, or one for a map that has none.
    """

    def __init__(
        self,
        kind: Literal["contribution", "similarity", "attention"] = "contribution",
        *,
        threshold: float | None = None,
    ) -> None:
        if kind not in _NAMES:
            raise ValueError(f"kind: expected one of {', '.join(_NAMES)}, got {kind!r}")
        if threshold is not None and kind != "contribution":
            raise ValueError(f"threshold: expected None for {kind}, which is not about one, got {threshold}")
        self.kind = kind
        self.threshold = check_threshold(threshold)
        self.name = _NAMES[kind]

    @torch.no_grad()
    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over A's cells [N, h, w].

        Raises:
            TypeError: something else than floating-point tensors.
            ValueError: a model without cells, images that are not [N, 3, H, W], or ``"contribution"`` without a
                threshold.
        """
        check_pairs(model, a, b)
        if not isinstance(model, XCosPairs):
            raise ValueError(f"model: expected an xCos model, whose score has cells, got {model.name}")
        maps = model.model.score(model.features(a), model.features(b), return_maps=True)
        if self.kind == "attention":
            return Saliency(maps.attention.float(), maps.attention.float())
        if self.kind == "similarity":
            return Saliency(maps.similarity.float(), -maps.similarity.float())
        parts = (maps.attention * (maps.similarity - threshold_of(model, self.threshold, "W * (S - t)"))).float()
        return Saliency(parts, -parts)


class RandomMap:
    """Independent uniform values for every pixel: a map that cannot beat it explains nothing.

    Args:
        seed: of the first call; later calls go on from there.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over A's pixels [N, H, W]."""
        shape = (a.shape[0], *a.shape[2:])
        similar, dissimilar = (torch.rand(shape, generator=self._generator).to(a.device) for _ in range(2))
        return Saliency(similar, dissimilar)


class CentreMap:
    """A Gaussian at the centre of the picture, the same for every pair.

    Args:
        spread: its standard deviation, in widths of the picture.
    """

    name = "centre"

    def __init__(self, spread: float = 2 / 7) -> None:
        self.spread = spread

    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over A's pixels [N, H, W]."""
        rows, columns = (torch.linspace(-0.5, 0.5, n, device=a.device) / self.spread for n in a.shape[2:])
        made = torch.exp(-0.5 * (rows.square().unsqueeze(1) + columns.square())).expand(a.shape[0], -1, -1)
        return Saliency(made, made)
