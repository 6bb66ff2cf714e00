"""How close is close: one table of tolerances with the reason for each, and the comparison that uses it."""

from __future__ import annotations

import torch
from torch import Tensor

# Features of this dtype, result compared with the fp64 reference on the very same (rounded) features.
FORWARD_ATOL = {
    torch.float64: 1e-13,  # a few ulp of 1, sums of some thousand terms
    torch.float32: 3e-6,  # sums of up to 512 products in fp32: sqrt(512) ulp of 1
    torch.float16: 3e-6,  # products and sums in fp32; features are exact
    torch.bfloat16: 3e-6,
}

# Relative to the largest entry of the reference gradient.
BACKWARD_RTOL = {
    torch.float64: 1e-11,
    torch.float32: 3e-5,  # differences of nearly equal terms where two vectors are almost parallel
    torch.float16: 1e-3,  # the gradient is stored in fp16: half an ulp is 2^-11
    torch.bfloat16: 8e-3,  # half an ulp is 2^-8
}


def assert_forward_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Absolute closeness of scores and maps; NaN must stand in the same places."""
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=0, atol=FORWARD_ATOL[dtype], equal_nan=True
    )


def assert_gradient_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, floor: float = 1e-3) -> None:
    """Closeness relative to the largest entry of the expected gradient, or to ``floor`` where all are smaller."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    scale = max(expected.double().abs().max().item() if expected.numel() else 0.0, floor)
    error = (actual.double().cpu() - expected.double().cpu()).abs().max().item() if expected.numel() else 0.0
    bound = BACKWARD_RTOL[dtype] * scale
    assert error <= bound, f"largest error {error:.3g}, allowed {bound:.3g} ({dtype}, scale {scale:.3g})"
