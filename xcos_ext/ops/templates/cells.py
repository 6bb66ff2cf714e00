"""From grid features to unit cells: what every template is made of, with the checks of its arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import dtype_name
from .._library import tracked

__all__ = [
    "EPS",
    "STORAGE_DTYPES",
    "FixedAttention",
    "Role",
    "cell_norms",
    "check_features",
    "check_role",
    "check_storage",
    "exact_convolutions",
    "in_chunks",
    "unit_cells",
]

Role = Literal["probe", "gallery", "both"]
FixedAttention = Literal["uniform", "norm"]

STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# A cell shorter than this is divided by it instead of by its norm: the operators' eps.
EPS = 1e-6

# Faces at a time where nothing is differentiated: temporaries stay below some ten MB.
CHUNK = 2048


def check_storage(dtype: torch.dtype, argument: str, where: str) -> None:
    if dtype not in STORAGE_DTYPES:
        raise TypeError(
            f"{where}: {argument}: expected dtype float16, bfloat16, float32 or float64, "
            f"got {dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)}"
        )


def check_role(role: str, where: str) -> None:
    if role not in ("probe", "gallery", "both"):
        raise ValueError(f"{where}: role: expected 'probe', 'gallery' or 'both', got {role!r}")


def check_features(features: Tensor, channels: int | None, where: str) -> None:
    """Grid features [N, C, H, W] of a floating dtype."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{where}: features: expected a tensor, got {type(features).__name__}")
    if features.layout != torch.strided or features.device.type == "meta":
        got = "a meta tensor" if features.layout == torch.strided else f"layout {features.layout}"
        raise TypeError(f"{where}: features: expected a dense tensor with values, got {got}")
    expected = "C" if channels is None else str(channels)
    if features.dim() != 4 or (channels is not None and features.shape[1] != channels):
        raise ValueError(f"{where}: features: expected [N, {expected}, H, W], got {list(features.shape)}")
    if 0 in features.shape[1:]:
        raise ValueError(f"{where}: features: expected at least one channel and one cell, got {list(features.shape)}")
    check_storage(features.dtype, "features", where)


def cell_norms(cells: Tensor, dim: int) -> Tensor:
    """Lengths of cells along ``dim``; 0 without gradient where a cell is 0, NaN where the squares overflow."""
    squared = (cells * cells).sum(dim)
    zero = squared == 0
    norms = torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
    # Squares beyond the dtype's range: x / inf would be a silent 0.
    return torch.where(norms.isinf(), torch.nan, norms)


def unit_cells(features: Tensor) -> tuple[Tensor, Tensor]:
    """Grid features [N, C, H, W], fp32 or fp64, to unit cells [N, H * W, C] and norms [N, H * W].

    The norm is clamped to 1e-6 where it divides, as in the operators, so zero cells stay 0; they get no gradient.
    """
    cells = features.flatten(2).transpose(1, 2)
    norms = cell_norms(cells, 2)
    if cells.requires_grad:
        cells = torch.where((norms == 0).unsqueeze(2), cells.detach(), cells)
    return cells / norms.clamp_min(EPS).unsqueeze(2), norms


def in_chunks(compute: Callable[[Tensor], Sequence[Tensor]], faces: Tensor, *others: Tensor | None) -> Sequence[Tensor]:
    """``compute`` on all faces at once where they or other tensors in it are differentiated, else on some thousand at a
    time; its outputs have the faces first."""
    if tracked(faces, *others) or faces.shape[0] <= CHUNK:
        return compute(faces)
    outputs: list[Tensor] = []
    for start in range(0, faces.shape[0], CHUNK):
        parts = compute(faces[start : start + CHUNK])
        if not outputs:
            outputs = [part.new_empty((faces.shape[0], *part.shape[1:])) for part in parts]
        for output, part in zip(outputs, parts, strict=True):
            output[start : start + CHUNK] = part
    return outputs


@contextlib.contextmanager
def exact_convolutions(device: torch.device) -> Iterator[None]:
    """fp32 convolutions in fp32: a GPU would use TF32, whose rounding a template would keep for good."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        settings: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before = settings.fp32_precision
        settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before
