"""Learned attention over the cells of a pair (xCos, arXiv 2003.05383)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["XCosAttention"]

Normalizer = Literal["softmax", "min-shift"]


def _min_shift(logits: Tensor) -> Tensor:
    """(x - min x) / sum(x - min x) over the cells [N, H, W]; a map of equal values becomes uniform."""
    flat = logits.flatten(1)
    shifted = flat - flat.amin(1, keepdim=True)
    total = shifted.sum(1, keepdim=True)
    # Divide by 1 where the sum is 0, so that the unused branch of `where` has no NaN gradient.
    weights = shifted / torch.where(total > 0, total, torch.ones_like(total))
    weights = torch.where(total > 0, weights, torch.full_like(weights, 1.0 / flat.shape[1]))
    return weights.view_as(logits)


class XCosAttention(nn.Module):
    """Cell weights W computed from the two grid features of a pair.

    With E the shared embedding (3x3 convolution, batch norm, PReLU) and G the attention network (3x3
    convolution, batch norm, PReLU, twice, down to one channel)::

        logits(A, B) = G(cat(E(A), E(B)))          [N, H, W]
        W(A, B)      = normalise(logits / T)       sums to 1 over the cells

    Parameter names (``embedding_net.*``, ``attention.*``) are those of the public xCos weights. The published
    form depends on the order of the two faces; ``symmetric=True`` uses (W(A, B) + W(B, A)) / 2.

    Args:
        channels: channels of the grid feature.
        hidden: channels inside.
        normalize: ``"softmax"`` over the cells, or ``"min-shift"``: subtract the smallest value and divide by
            the sum (a map of equal values becomes uniform). The temperature has no effect on min-shift.
        temperature: T > 0; large values flatten W.
        symmetric: average both orders.

    Raises:
        ValueError: unknown normaliser, or a temperature that is not a positive finite number.
    """

    def __init__(
        self,
        channels: int = 32,
        hidden: int = 16,
        *,
        normalize: Normalizer = "softmax",
        temperature: float = 1.0,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if normalize not in ("softmax", "min-shift"):
            raise ValueError(f"normalize: expected 'softmax' or 'min-shift', got {normalize!r}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
        self.channels = channels
        self.hidden = hidden
        self.normalize: Normalizer = normalize
        self.temperature = float(temperature)
        self.symmetric = bool(symmetric)
        self.embedding_net = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.PReLU()
        )
        self.attention = nn.Sequential(
            nn.Conv2d(2 * hidden, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.PReLU(),
            nn.Conv2d(hidden, 1, 3, padding=1),
            nn.BatchNorm2d(1),
            nn.PReLU(),
        )

    @property
    def fusable(self) -> bool:
        """Whether W is softmax(logits / T), which ``xcos_score(..., logits=True)`` computes itself."""
        return self.normalize == "softmax" and not self.symmetric

    def config(self) -> dict[str, int | float | bool | str]:
        """The constructor's arguments, as plain values."""
        return {
            "channels": self.channels,
            "hidden": self.hidden,
            "normalize": self.normalize,
            "temperature": self.temperature,
            "symmetric": self.symmetric,
        }

    def embed(self, features: Tensor) -> Tensor:
        """The shared embedding E: grid features [N, C, H, W] -> [N, hidden, H, W]."""
        if features.dim() != 4 or features.shape[1] != self.channels:
            raise ValueError(
                f"features: expected [N, {self.channels}, H, W], got {list(features.shape)} (XCosAttention)"
            )
        return self.embedding_net(features)

    def _logits(self, embedded_a: Tensor, embedded_b: Tensor) -> Tensor:
        logits = self.attention(torch.cat((embedded_a, embedded_b), 1)).squeeze(1)
        # Weights stay in fp32 under autocast; fp64 stays fp64.
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _weights(self, logits: Tensor) -> Tensor:
        if self.normalize == "min-shift":
            return _min_shift(logits)
        return (logits.flatten(1) / self.temperature).softmax(1).view_as(logits)

    def logits(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """The raw maps of the ordered pair (A, B), before temperature and normalisation.

        Args:
            features_a: grid features [N, C, H, W].
            features_b: grid features of the same shape.

        Returns:
            [N, H, W], fp32 (fp64 for fp64 features).
        """
        return self._logits(self.embed(features_a), self.embed(features_b))

    def forward(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """Cell weights W.

        Args:
            features_a: grid features [N, C, H, W].
            features_b: grid features of the same shape.

        Returns:
            [N, H, W], fp32 (fp64 for fp64 features), non-negative, summing to 1 over the cells.
        """
        embedded_a, embedded_b = self.embed(features_a), self.embed(features_b)
        weights = self._weights(self._logits(embedded_a, embedded_b))
        if self.symmetric:
            weights = (weights + self._weights(self._logits(embedded_b, embedded_a))) / 2
        return weights

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}, temperature={self.temperature}, symmetric={self.symmetric}"
