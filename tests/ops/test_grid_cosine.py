"""grid_cosine against the reference: values, gradients, layouts."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_forward_close, assert_gradient_close
from samples import DTYPES, GRADIENT_SHAPES, LAYOUTS, SHAPES, feature_maps

import xcos_ext
from xcos_ext import reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, layout, dtype, device):
    a, b = feature_maps(shape, dtype, layout, device)
    expected = reference.grid_cosine(a.double(), b.double())
    actual = xcos_ext.grid_cosine(a, b)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.is_contiguous()
    assert_forward_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=str)
def test_gradient_matches_the_reference(shape, layout, dtype, device):
    a, b = feature_maps(shape, dtype, layout, device)
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    wide_a, wide_b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    grad = torch.randn(shape[0], *shape[2:], dtype=torch.float64, device=device)
    out = xcos_ext.grid_cosine(a, b)
    actual = torch.autograd.grad(out, (a, b), grad.to(out.dtype))
    expected = torch.autograd.grad(reference.grid_cosine(wide_a, wide_b), (wide_a, wide_b), grad)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert_gradient_close(one, other, dtype)


def test_gradcheck(device):
    a, b = (t.requires_grad_() for t in feature_maps((3, 5, 2, 3), torch.float64, "contiguous", device))
    assert torch.autograd.gradcheck(xcos_ext.grid_cosine, (a, b))


def test_only_the_wanted_gradient_is_computed(device):
    a, b = feature_maps((2, 32, 7, 7), torch.float32, "contiguous", device)
    a.requires_grad_()
    xcos_ext.grid_cosine(a, b).sum().backward()
    assert a.grad is not None and b.grad is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_keeps_the_memory_format(layout, device):
    a, b = (t.requires_grad_() for t in feature_maps((2, 32, 7, 7), torch.float32, layout, device))
    xcos_ext.grid_cosine(a, b).sum().backward()
    assert a.grad.stride() == a.stride()


def test_agrees_with_torch_cosine_similarity(device):
    a, b = feature_maps((16, 32, 7, 7), torch.float32, "contiguous", device)
    expected = torch.nn.functional.cosine_similarity(a, b, dim=1, eps=1e-6)
    torch.testing.assert_close(xcos_ext.grid_cosine(a, b), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_channel_has_a_constant_cosine(dtype, device):
    a, b = (t.requires_grad_() for t in feature_maps((4, 1, 3, 3), dtype, "contiguous", device))
    out = xcos_ext.grid_cosine(a, b)
    torch.testing.assert_close(out.abs(), torch.ones_like(out), rtol=0, atol=1e-6)
    out.sum().backward()
    # Two terms of size 1/|a| cancel up to their rounding.
    assert (a.grad.abs() <= 4 * torch.finfo(dtype).eps / a.detach().abs()).all()
