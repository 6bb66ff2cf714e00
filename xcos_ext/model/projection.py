"""From a backbone's map to cells with a matrix for each: the closed form's mathematics, fixed or to be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext.ops._checks import checked_flag

__all__ = ["CellProjection", "Cells"]


def _per_cell(matrices: Tensor, cells: Tensor) -> Tensor:
    """One matrix per cell: [P, K, D] and [N, D, H, W] -> [N, K, H, W], contiguous."""
    # A cell's channels side by side in memory on both sides: a third of the time of the other order for one face.
    faces = cells.flatten(2).permute(2, 0, 1).contiguous()  # [P, N, D]
    product = torch.bmm(faces, matrices.transpose(1, 2))  # [P, N, K]
    return product.permute(1, 2, 0).contiguous().unflatten(2, tuple(cells.shape[2:]))


class Cells(nn.Module):
    """What fixed and trained cells share: F_ij = B_ij (sum_kl G_ij,kl M_kl x_kl - mean_ij).

    Attributes:
        grid_shape: (C, H, W) of the map; P = H * W cells.
        weight: M, one matrix for all cells [D, C] with the cell's own part in ``scale``, or [P, D, C].
        scale: [C, H, W] multiplied with the map first; given with the [D, C] form only.
        spread: G [P, P] (to, from), or None.
        mean: [D, H, W], or None.
        basis: B [P, K, D], or None.
    """

    grid_shape: tuple[int, int, int]
    weight: Tensor
    scale: Tensor | None
    spread: Tensor | None
    mean: Tensor | None
    basis: Tensor | None

    def project(self, grid: Tensor) -> Tensor:
        """x [N, C, H, W] -> F [N, D or K, H, W], in the weight's dtype: a half-precision backbone does not make the
        cells half.

        Raises:
            ValueError: a map of another shape.
        """
        if grid.dim() != 4 or tuple(grid.shape[1:]) != self.grid_shape:
            expected = ", ".join(map(str, self.grid_shape))
            raise ValueError(f"grid: expected [N, {expected}], got {list(grid.shape)} ({type(self).__name__})")
        weight, grid = self.weight, grid.to(self.weight.dtype)
        cells = _per_cell(weight, grid) if self.scale is None else F.conv2d(grid * self.scale, weight[:, :, None, None])
        if self.spread is not None:
            cells = (cells.flatten(2) @ self.spread.T).unflatten(2, self.grid_shape[1:])
        if self.mean is not None:
            cells = cells - self.mean
        return cells if self.basis is None else _per_cell(self.basis, cells)


class CellProjection(Cells):
    """Cells with a matrix for each: F_ij = B_ij (sum_kl G_ij,kl M_kl x_kl - mean_ij), all of it trainable.

    The formula is that of :class:`ClosedFormHead`, whose values it can start from (:meth:`from_tensors`). On its own
    it starts as a random projection of every cell, alike for all.

    Args:
        grid_shape: (C, H, W) of the map.
        dim: D, length of a cell's feature before B.
        channels: K, length of a cell's feature; None: D, without B.
        separable: M_ij = weight times a scale for each channel and cell (C D + C P numbers), as in a depthwise output
            block, instead of a matrix of its own for each cell (C D P).
        spread: with G.

    Raises:
        ValueError: a size below 1, or more channels than ``dim``.
        TypeError: ``separable`` or ``spread`` is not True or False.

    >>> CellProjection((512, 7, 7), 128, 32)(torch.randn(2, 512, 7, 7)).shape
    torch.Size([2, 32, 7, 7])
    """

    def __init__(
        self,
        grid_shape: tuple[int, int, int],
        dim: int,
        channels: int | None = None,
        *,
        separable: bool = True,
        spread: bool = True,
    ) -> None:
        super().__init__()
        separable = checked_flag("CellProjection", "separable", separable)
        spread = checked_flag("CellProjection", "spread", spread)
        maps, height, width = grid_shape
        if min(maps, height, width, dim) < 1:
            raise ValueError(f"grid_shape, dim: expected positive numbers, got {tuple(grid_shape)} and {dim}")
        if channels is not None and not 1 <= channels <= dim:
            raise ValueError(f"channels: expected 1..{dim} or None, got {channels}")
        cells = height * width
        self.grid_shape = (maps, height, width)
        self.dim = dim
        self.channels = dim if channels is None else channels
        weight = torch.randn(dim, maps) / maps**0.5
        self.weight = nn.Parameter(weight if separable else weight.expand(cells, -1, -1).clone())
        self.scale = nn.Parameter(torch.ones(maps, height, width)) if separable else None
        self.spread = nn.Parameter(torch.eye(cells)) if spread else None
        self.mean = nn.Parameter(torch.zeros(dim, height, width))
        basis = None if channels is None else torch.linalg.qr(torch.randn(dim, channels))[0].T
        self.basis = None if basis is None else nn.Parameter(basis.expand(cells, -1, -1).clone())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], grid_shape: tuple[int, int, int]) -> CellProjection:
        """A projection with given ``weight``, ``scale``, ``spread``, ``mean``, ``basis`` (all but the first may lack);
        shapes as in :class:`Cells`. Other names are passed over."""
        weight, basis = tensors["weight"], tensors.get("basis")
        made = cls(
            grid_shape,
            weight.shape[-2],
            None if basis is None else basis.shape[1],
            separable="scale" in tensors,
            spread="spread" in tensors,
        ).to(weight.device, weight.dtype)
        own = made.state_dict()
        made.load_state_dict(own | {name: value for name, value in tensors.items() if name in own})
        return made

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {
            "grid_shape": list(self.grid_shape),
            "dim": self.dim,
            "channels": None if self.basis is None else self.channels,
            "separable": self.scale is not None,
            "spread": self.spread is not None,
        }

    def forward(self, grid: Tensor) -> Tensor:
        """Map [N, C, H, W] -> F [N, K, H, W], in the parameters' dtype.

        Raises:
            ValueError: a map of another shape.
        """
        # In full precision under autocast: these are the cells that the score is made of.
        with torch.autocast(grid.device.type, enabled=False):
            return self.project(grid)

    def extra_repr(self) -> str:
        return f"{self.grid_shape[0]} -> {self.channels}, {'x'.join(map(str, self.grid_shape[1:]))} cells"
