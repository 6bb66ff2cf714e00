"""The exact cell decomposition of an affine output block: emb = sum_ij M_ij x_ij + c."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from xcos_ext.backbones.modes import kept_modes
from xcos_ext.backbones.plain import altered
from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.io.errors import ModelError

__all__ = ["CellMatrices", "cell_matrices", "separate", "spread_matrix"]

_ROWS_AT_ONCE = 32  # rows of M per backward pass; bounds the memory of the 25,088-wide IR-SE block
_AFFINE_TOLERANCE = 1e-9  # relative, in fp64; a rectifier or a norm in the block misses it by orders
_SEPARABLE_TOLERANCE = 1e-10  # relative, in fp64: a depthwise block is separable up to rounding, others are far off


class CellMatrices(NamedTuple):
    """Attributes: matrices M [D, C, H, W] and constant c [D], both fp64 on the CPU."""

    matrices: Tensor
    constant: Tensor


class _OutputBlock(nn.Module):
    """A recogniser seen through its output block only, so that functional_call can reach `embed`."""

    def __init__(self, recogniser: Recogniser) -> None:
        super().__init__()
        self.recogniser = recogniser

    def forward(self, grid: Tensor) -> Tensor:
        return self.recogniser.embed(grid)


# Gradients are needed here even when a caller loads models under inference_mode().
@torch.inference_mode(False)
def cell_matrices(recogniser: Recogniser) -> CellMatrices:
    """M_ij and c of a recogniser's output block in evaluation mode.

    Works for every affine block, whatever its layers, because the rows of M are read off as gradients in
    fp64; that the block is affine is checked on random maps.

    Args:
        recogniser: a network with an output block. Its training mode is restored afterwards.

    Raises:
        ModelError: no output block, or one that is not affine over the map (an activation or a normalisation
            of the embedding inside it).

    >>> from xcos_ext.backbones import SplitRecogniser
    >>> output = nn.Sequential(nn.Flatten(), nn.Linear(147, 8))
    >>> network = SplitRecogniser(nn.AvgPool2d(16), output, grid_shape=(3, 7, 7), embedding_size=8)
    >>> matrices, constant = cell_matrices(network)
    >>> bool((constant == output[1].bias).all()), matrices.shape
    (True, torch.Size([8, 3, 7, 7]))
    """
    if recogniser.embedding_size is None:
        raise ModelError(f"{recogniser.architecture}: no output block, so there are no cells to take from it")
    if found := altered(recogniser):
        raise ModelError(
            f"{recogniser.architecture}: expected a recogniser whose embedding is embed(grid(images)), got {found}, "
            "which the closed form would pass over; remove it first"
        )
    block = _OutputBlock(recogniser)
    prefixes = tuple(f"recogniser.{p}" for p in recogniser.output_prefixes) or ("recogniser.",)
    state = {
        name: tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in block.state_dict().items()
        if name.startswith(prefixes)
    }

    def embed(grid: Tensor) -> Tensor:
        return functional_call(block, state, (grid,))

    shape = recogniser.grid_shape
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, *shape, dtype=torch.float64, generator=generator)
    probe[2:] *= 30  # so that saturation and clipping show
    with kept_modes(recogniser):
        recogniser.eval()
        with torch.no_grad():
            constant = embed(torch.zeros(1, *shape, dtype=torch.float64))
            expected = embed(probe)
        if constant.dim() != 2 or expected.shape != (4, constant.shape[1]):
            raise ModelError(
                f"{recogniser.architecture}: the output block must give [N, D], got {list(constant.shape)} for one map"
            )
        constant = constant[0]
        rows = []
        with torch.enable_grad():
            for channels in torch.arange(len(constant)).split(_ROWS_AT_ONCE):
                grid = torch.zeros(len(channels), *shape, dtype=torch.float64, requires_grad=True)
                # Item i asks for its own output channel only, so its gradient is that row of M.
                picked = embed(grid).gather(1, channels[:, None]).sum()
                rows.append(torch.autograd.grad(picked, grid)[0])
        matrices = torch.cat(rows)
    if not (torch.isfinite(matrices).all() and torch.isfinite(constant).all()):
        raise ModelError(f"{recogniser.architecture}: the output block's weights are not finite")
    got = torch.einsum("dchw,nchw->nd", matrices, probe) + constant
    error = (got - expected).abs().amax() / expected.abs().amax().clamp_min(1e-300)
    if not error <= _AFFINE_TOLERANCE:
        raise ModelError(
            f"{recogniser.architecture}: the output block is not affine over the feature map (relative error "
            f"{float(error):.1e}), so it has no closed-form cells; remove a final normalisation or activation"
        )
    return CellMatrices(matrices, constant)


def separate(matrices: Tensor) -> tuple[Tensor, Tensor] | None:
    """Write M[d, c, i, j] as weight[d, c] * scale[c, i, j] where it has that form (a depthwise output block).

    Args:
        matrices: M [D, C, H, W], fp64.

    Returns:
        (weight [D, C], scale [C, H, W]) or None for blocks that mix cells and channels freely.
    """
    flat = matrices.flatten(2)  # [D, C, P]
    energy = flat.square().sum(0)  # [C, P]
    anchor = energy.argmax(1)  # the strongest cell of each channel: the best conditioned reference
    weight = flat.gather(2, anchor.view(1, -1, 1).expand(flat.shape[0], -1, 1)).squeeze(2)
    norm = weight.square().sum(0).clamp_min(1e-300)
    scale = torch.einsum("dcp,dc->cp", flat, weight) / norm[:, None]
    residual = (flat - weight[:, :, None] * scale).abs().amax()
    if not residual <= _SEPARABLE_TOLERANCE * flat.abs().amax():
        return None
    return weight, scale.view(matrices.shape[1:])


def spread_matrix(size: tuple[int, int], sigma: float) -> Tensor | None:
    """How cells share with their neighbours: a Gaussian of ``sigma`` cells, normalised per giving cell.

    Args:
        size: (H, W) of the grid.
        sigma: standard deviation in cells; 0 means no sharing.

    Returns:
        G [P, P] fp64, G[to, from], every column summing to 1 (so the sum over all cells is kept), or None for
        sigma 0.

    Raises:
        ValueError: sigma is negative or not finite.

    >>> spread_matrix((1, 3), 0.7)[:, 1].numpy().round(2).tolist()
    [0.21, 0.58, 0.21]
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"spread: expected a finite number >= 0 (in cells), got {sigma}")
    if sigma == 0:
        return None
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in size)
    vertical = torch.exp(-0.5 * ((rows[:, None] - rows) / sigma) ** 2)
    horizontal = torch.exp(-0.5 * ((columns[:, None] - columns) / sigma) ** 2)
    return torch.kron(vertical / vertical.sum(0), horizontal / horizontal.sum(0))
