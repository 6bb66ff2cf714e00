"""Heads: from a backbone's map to the grid feature F, and from two F to the score with its maps."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext.ops import XCosScore, xcos_score

from .attention import XCosAttention

__all__ = ["ClosedFormHead", "XCosHead"]


class XCosHead(nn.Module):
    """The trained xCos head: a 1x1 block to the grid feature F, attention W, and the score sum W * S.

    F = PReLU(BN(Conv1x1(map))), S = cell-wise cosine of two F, W from :class:`XCosAttention`
    (arXiv 2003.05383).

    Args:
        in_channels: channels of the backbone's map.
        channels: channels of F.
        attention: an :class:`XCosAttention` for ``channels`` channels; None builds the published one;
            ``"uniform"`` (1 / cells) and ``"norm"`` (proportional to the cells' norms) have no parameters.

    Raises:
        ValueError: an attention for another number of channels, or an unknown name.
    """

    kind = "learned"

    def __init__(
        self,
        in_channels: int = 512,
        channels: int = 32,
        *,
        attention: XCosAttention | Literal["uniform", "norm"] | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.channels = channels
        self.conv1x1 = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1), nn.BatchNorm2d(channels), nn.PReLU(channels)
        )
        self.attention: XCosAttention | None = None
        self.fixed_attention: Literal["uniform", "norm"] | None = None
        if attention is None:
            self.attention = XCosAttention(channels)
        elif isinstance(attention, XCosAttention):
            if attention.channels != channels:
                raise ValueError(f"attention: expected {channels} channels, got one for {attention.channels}")
            self.attention = attention
        elif attention in ("uniform", "norm"):
            self.fixed_attention = attention
        else:
            raise ValueError(
                f"attention: expected an XCosAttention, 'uniform', 'norm' or None, got {attention!r}"
            )

    def config(self) -> dict[str, Any]:
        """What is needed to build the same head again, as plain values."""
        return {
            "in_channels": self.in_channels,
            "channels": self.channels,
            "attention": self.fixed_attention if self.attention is None else self.attention.config(),
        }

    def features(self, grid: Tensor) -> Tensor:
        """The backbone's map [N, in_channels, H, W] -> grid feature F [N, channels, H, W]."""
        if grid.dim() != 4 or grid.shape[1] != self.in_channels:
            raise ValueError(f"grid: expected [N, {self.in_channels}, H, W], got {list(grid.shape)} (XCosHead)")
        return self.conv1x1(grid)

    def identity(self, features: Tensor) -> Tensor:
        """F flattened to [N, channels * H * W] and scaled to unit length: what a margin head sees in training."""
        return F.normalize(features.flatten(1), dim=1)

    def score(
        self, features_a: Tensor, features_b: Tensor, *, return_maps: bool = False
    ) -> Tensor | XCosScore:
        """xCos of two batches of grid features.

        Args:
            features_a: F of the first faces [N, C, H, W].
            features_b: F of the second faces, same shape.
            return_maps: also return S and W.

        Returns:
            Scores [N], or ``XCosScore(score [N], similarity [N, H, W], attention [N, H, W])``.
        """
        if self.attention is None:
            mode = "norm" if self.fixed_attention == "norm" else None
            return xcos_score(features_a, features_b, mode, return_maps=return_maps)
        if self.attention.fusable:
            logits = self.attention.logits(features_a, features_b)
            return xcos_score(
                features_a,
                features_b,
                logits,
                logits=True,
                temperature=self.attention.temperature,
                return_maps=return_maps,
            )
        return xcos_score(
            features_a, features_b, self.attention(features_a, features_b), return_maps=return_maps
        )

    def forward(self, grid_a: Tensor, grid_b: Tensor) -> XCosScore:
        """Two maps [N, in_channels, H, W] -> score, similarity and attention."""
        result = self.score(self.features(grid_a), self.features(grid_b), return_maps=True)
        assert isinstance(result, XCosScore)
        return result


class ClosedFormHead(nn.Module):
    """Cells of a linear output block: F_ij = M_ij x_ij - mean_ij, scored with norm attention. Nothing is trained.

    Where a recogniser's output block is affine, its embedding is a sum over cells, emb = sum_ij M_ij x_ij + c.
    Each summand is the cell's share of the identity. S is the cosine of two shares, W_ij is proportional to
    |F_ij(A)| |F_ij(B)|, so the score is sum F(A).F(B) / sum |F(A)| |F(B)|. Built by :func:`xcos_ext.nn.plug`.

    Args:
        weight: M. Either one matrix for all cells [D, C], with the cell's own part in ``scale``, or one per
            cell [H * W, D, C] (cells in row-major order).
        scale: [C, H, W] multiplied with the map first, or None. Required with the [D, C] form.
        mean: [D, H, W] subtracted from every cell, or None for cells that are not centred.
        constant: c [D], the embedding of an all-zero map, or None if F was projected to fewer dimensions.
        grid_shape: (C, H, W) of the map.
    """

    kind = "closed-form"

    weight: Tensor
    scale: Tensor | None
    mean: Tensor | None
    constant: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        *,
        scale: Tensor | None,
        mean: Tensor | None,
        constant: Tensor | None,
        grid_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        channels, height, width = grid_shape
        dim = weight.shape[-2]
        expected = (dim, channels) if scale is not None else (height * width, dim, channels)
        if tuple(weight.shape) != expected:
            raise ValueError(f"weight: expected {list(expected)}, got {list(weight.shape)} (ClosedFormHead)")
        for name, tensor, shape in (
            ("scale", scale, (channels, height, width)),
            ("mean", mean, (dim, height, width)),
            ("constant", constant, (dim,)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)} (ClosedFormHead)")
        self.grid_shape = (channels, height, width)
        self.channels = dim
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("mean", mean)
        self.register_buffer("constant", constant)

    def config(self) -> dict[str, Any]:
        """What is needed to build the same head again beside its tensors, as plain values."""
        return {"grid_shape": list(self.grid_shape)}

    def features(self, grid: Tensor) -> Tensor:
        """The backbone's map [N, C, H, W] -> cell features F [N, D, H, W]."""
        if grid.dim() != 4 or tuple(grid.shape[1:]) != self.grid_shape:
            raise ValueError(
                f"grid: expected [N, {', '.join(map(str, self.grid_shape))}], got {list(grid.shape)} (ClosedFormHead)"
            )
        _, height, width = self.grid_shape
        if self.scale is not None:
            cells = F.conv2d(grid * self.scale, self.weight[:, :, None, None])
        else:
            per_cell = torch.bmm(self.weight, grid.flatten(2).permute(2, 1, 0))  # [H*W, D, N]
            cells = per_cell.permute(2, 1, 0).unflatten(2, (height, width)).contiguous()
        return cells if self.mean is None else cells - self.mean

    def embedding(self, features: Tensor) -> Tensor:
        """The recogniser's own embedding [N, D] from cell features F [N, D, H, W]: their sum plus constants.

        Raises:
            ValueError: F was projected to fewer dimensions, so the embedding is lost.
        """
        if self.constant is None:
            raise ValueError("features: these cells were projected, so their sum is not the embedding")
        total = features.sum((2, 3)) + self.constant
        return total if self.mean is None else total + self.mean.sum((1, 2))

    def score(
        self, features_a: Tensor, features_b: Tensor, *, return_maps: bool = False
    ) -> Tensor | XCosScore:
        """Score of two batches of cell features with norm attention.

        Args:
            features_a: F of the first faces [N, D, H, W].
            features_b: F of the second faces, same shape.
            return_maps: also return S and W.

        Returns:
            Scores [N], or ``XCosScore(score [N], similarity [N, H, W], attention [N, H, W])``.
        """
        return xcos_score(features_a, features_b, "norm", return_maps=return_maps)

    def forward(self, grid_a: Tensor, grid_b: Tensor) -> XCosScore:
        """Two maps [N, C, H, W] -> score, similarity and attention."""
        result = self.score(self.features(grid_a), self.features(grid_b), return_maps=True)
        assert isinstance(result, XCosScore)
        return result

    def extra_repr(self) -> str:
        form = "per channel and cell" if self.scale is not None else "per cell"
        return f"{self.grid_shape[0]} -> {self.channels}, {form}, centred={self.mean is not None}"
