"""NumPy arrays through the pybind11 entry points: same values as tensors, no tensor made, layouts read in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import sample

import xcos_ext


def arrays(s):
    return (
        s.a.numpy(),
        s.b.numpy(),
        s.attention.numpy() if isinstance(s.attention, torch.Tensor) else s.attention,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["uniform", "norm", "weights", "logits_shared"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed", "expanded", "sliced", "transposed"])
def test_same_as_tensors(layout, mode, dtype):
    s = sample((4, 17, 5, 7), dtype, layout, mode)
    a, b, attention = arrays(s)
    expected = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=s.logits, return_maps=True)
    actual = xcos_ext.xcos_score(a, b, attention, logits=s.logits, return_maps=True)
    assert isinstance(actual, xcos_ext.XCosScore)
    for one, other in zip(actual, expected, strict=True):
        assert isinstance(one, np.ndarray)
        np.testing.assert_array_equal(one, other.numpy())
    score = xcos_ext.xcos_score(a, b, attention, logits=s.logits)
    np.testing.assert_array_equal(score, expected.score.numpy())
    np.testing.assert_array_equal(xcos_ext.grid_cosine(a, b), expected.similarity.numpy())


def test_negative_strides_unaligned_and_read_only_arrays():
    a = np.random.default_rng(0).standard_normal((3, 8, 4, 5)).astype(np.float32)
    expected = xcos_ext.grid_cosine(np.ascontiguousarray(a[:, :, ::-1]), a)
    np.testing.assert_array_equal(xcos_ext.grid_cosine(a[:, :, ::-1], a), expected)
    raw = np.empty(a.nbytes + 1, dtype=np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(a.shape)
    unaligned[:] = a
    unaligned.flags.writeable = False
    np.testing.assert_array_equal(xcos_ext.grid_cosine(unaligned, a), xcos_ext.grid_cosine(a, a))


def test_masks_are_refused():
    a = np.ones((2, 8, 3, 3), np.float32)
    masked = np.ma.masked_array(a, mask=a > 0)
    for name, call in (
        ("xcos_score: a", lambda: xcos_ext.xcos_score(masked, a)),
        ("grid_cosine: b", lambda: xcos_ext.grid_cosine(a, masked)),
        ("xcos_score: attention", lambda: xcos_ext.xcos_score(a, a, masked[0, 0])),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected an array without a mask, got a MaskedArray"):
            call()


def test_empty_batch():
    a = np.zeros((0, 32, 7, 7), dtype=np.float32)
    assert xcos_ext.xcos_score(a, a).shape == (0,)
