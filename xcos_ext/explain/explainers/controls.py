"""Maps that know nothing of the pair: whoever cannot beat them explains nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import PairModel, Saliency

__all__ = ["CentreMap", "RandomMap"]


class RandomMap:
    """Independent uniform values for every pixel.

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
