"""Maps that cost nothing: xCos's own, which come with the score, and controls, which know nothing of the pair."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from xcos_ext.card.calibration import check_threshold

from .base import BatchedExplainer, threshold_of
from .interface import PairModel, Saliency, XCosPairs

__all__ = ["CellMap", "CentreMap", "RandomMap"]

_NAMES = {"contribution": "xcos", "similarity": "xcos-similarity", "attention": "xcos-attention"}


class CellMap(BatchedExplainer):
    """A map of the cells that the score is made of.

    >>> CellMap("attention").name
    'xcos-attention'

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
        super().__init__()
        self.kind, self.name, self.threshold = kind, _NAMES[kind], check_threshold(threshold)

    @torch.no_grad()
    def _maps(self, model: PairModel, a: Tensor, b: Tensor, size: int) -> Saliency:
        if not isinstance(model, XCosPairs):
            raise ValueError(f"model: expected an xCos model, whose score has cells, got {model.name}")
        _, similarity, attention = model.model.score(model.features(a), model.features(b), return_maps=True)
        if self.kind == "attention":
            return Saliency(attention.float(), attention.float())
        if self.kind == "contribution":
            similarity = attention * (similarity - threshold_of(model, self.threshold, "W * (S - t)"))
        return Saliency(similarity.float(), -similarity.float())


class RandomMap:
    """Independent uniform values for every pixel: a map that cannot beat it explains nothing.

    >>> import torch
    >>> faces = torch.zeros(2, 3, 28, 28)
    >>> RandomMap(seed=1)(None, faces, faces).similar.shape
    torch.Size([2, 28, 28])

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

    >>> import torch
    >>> faces = torch.zeros(2, 3, 29, 29)
    >>> float(CentreMap()(None, faces, faces).similar[0, 14, 14])
    1.0

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
