"""Bad input: one clear error naming the argument, the same from the kernels, from fake kernels and from NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import xcos_ext

A = (4, 32, 7, 7)


def call(op, a, b, attention=None, **options):
    if op == "grid_cosine":
        return xcos_ext.grid_cosine(a, b, **options)
    return xcos_ext.xcos_score(a, b, attention, **options)


# name: (operator, shapes and dtypes of a, b and attention, options, message after the operator's name)
F32, F64, I64 = torch.float32, torch.float64, torch.int64
BAD = {
    "rank of a": (
        "grid_cosine",
        [((32, 7, 7), F32), (A, F32)],
        {},
        "a: expected a feature map [N, C, H, W], got shape [32, 7, 7]",
    ),
    "rank of b": (
        "xcos_score",
        [(A, F32), ((32, 7, 7), F32)],
        {},
        "b: expected shape [4, 32, 7, 7] like a, got [32, 7, 7]",
    ),
    "N": (
        "xcos_score",
        [(A, F32), ((3, 32, 7, 7), F32)],
        {},
        "b: expected shape [4, 32, 7, 7] like a, got [3, 32, 7, 7]",
    ),
    "C": (
        "grid_cosine",
        [(A, F32), ((4, 16, 7, 7), F32)],
        {},
        "b: expected shape [4, 32, 7, 7] like a, got [4, 16, 7, 7]",
    ),
    "H": (
        "xcos_score",
        [(A, F32), ((4, 32, 6, 7), F32)],
        {},
        "b: expected shape [4, 32, 7, 7] like a, got [4, 32, 6, 7]",
    ),
    "W": (
        "xcos_score",
        [(A, F32), ((4, 32, 7, 8), F32)],
        {},
        "b: expected shape [4, 32, 7, 7] like a, got [4, 32, 7, 8]",
    ),
    "no channels": (
        "xcos_score",
        [((4, 0, 7, 7), F32)] * 2,
        {},
        "a: expected at least one channel and one cell, got shape [4, 0, 7, 7]",
    ),
    "no cells": (
        "grid_cosine",
        [((4, 32, 0, 7), F32)] * 2,
        {},
        "a: expected at least one channel and one cell, got shape [4, 32, 0, 7]",
    ),
    "integer a": (
        "xcos_score",
        [(A, I64), (A, I64)],
        {},
        "a: expected dtype float16, bfloat16, float32 or float64, got int64",
    ),
    "mixed dtypes": ("xcos_score", [(A, F32), (A, F64)], {}, "b: expected dtype float32 like a, got float64"),
    "attention shape": (
        "xcos_score",
        [(A, F32), (A, F32), ((7, 6), F32)],
        {},
        "attention: expected shape [7, 7] or [4, 7, 7], got [7, 6]",
    ),
    "attention batch": (
        "xcos_score",
        [(A, F32), (A, F32), ((3, 7, 7), F32)],
        {"logits": True},
        "attention: expected shape [7, 7] or [4, 7, 7], got [3, 7, 7]",
    ),
    "attention rank": (
        "xcos_score",
        [(A, F32), (A, F32), ((4, 1, 7, 7), F32)],
        {},
        "attention: expected shape [7, 7] or [4, 7, 7], got [4, 1, 7, 7]",
    ),
    "integer attention": (
        "xcos_score",
        [(A, F32), (A, F32), ((7, 7), I64)],
        {},
        "attention: expected dtype float16, bfloat16, float32 or float64, got int64",
    ),
    "negative temperature": (
        "xcos_score",
        [(A, F32), (A, F32), ((7, 7), F32)],
        {"logits": True, "temperature": -0.5},
        "temperature: expected a finite number above 0, got -0.5",
    ),
    "zero temperature": (
        "xcos_score",
        [(A, F32), (A, F32), ((7, 7), F32)],
        {"logits": True, "temperature": 0.0},
        "temperature: expected a finite number above 0, got 0",
    ),
    "NaN eps": (
        "grid_cosine",
        [(A, F32), (A, F32)],
        {"eps": float("nan")},
        "eps: expected a finite number above 0, got nan",
    ),
    "infinite eps": (
        "xcos_score",
        [(A, F32), (A, F32)],
        {"eps": float("inf")},
        "eps: expected a finite number above 0, got inf",
    ),
    "zero eps": ("xcos_score", [(A, F32), (A, F32)], {"eps": 0.0}, "eps: expected a finite number above 0, got 0"),
}


def tensors(specs, device="cpu"):
    return [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in specs]


@pytest.mark.parametrize("case", BAD)
def test_kernels_name_what_is_wrong(case, device):
    op, specs, options, message = BAD[case]
    with pytest.raises(RuntimeError) as error:
        call(op, *tensors(specs, device), **options)
    assert str(error.value) == f"{op}: {message}"


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_fake_kernels_say_the_same(case, fake_device):
    op, specs, options, message = BAD[case]
    with FakeTensorMode(), pytest.raises(RuntimeError) as error:
        call(op, *tensors(specs, fake_device), **options)
    assert f"{op}: {message}" in str(error.value)


@pytest.mark.parametrize("case", BAD)
def test_numpy_entry_points_say_the_same(case):
    op, specs, options, message = BAD[case]
    with pytest.raises(ValueError) as error:
        call(op, *(t.numpy() for t in tensors(specs)), **options)
    # NumPy has no bfloat16.
    assert str(error.value) == f"{op}: {message.replace('float16, bfloat16,', 'float16,')}"


def test_mixed_devices_are_named():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        xcos_ext.xcos_score(torch.zeros(A), torch.zeros(A, device="cuda"))
    with pytest.raises(RuntimeError, match=r"b: expected device \w+ like a, got \w+"):
        xcos_ext.xcos_score(torch.zeros(A, device="meta"), torch.zeros(A))


@pytest.mark.cuda
def test_mixed_devices_are_named_on_a_gpu():
    with pytest.raises(RuntimeError, match="expected device cuda:0 like a, got cpu"):
        xcos_ext.xcos_score(torch.zeros(A, device="cuda"), torch.zeros(A))


def test_arguments_of_the_wrong_kind():
    a = torch.zeros(A)
    with pytest.raises(TypeError, match=r"xcos_score: a: expected a torch.Tensor or a numpy.ndarray, got list"):
        xcos_ext.xcos_score([1.0], a)
    with pytest.raises(TypeError, match=r"grid_cosine: b: expected a Tensor like a, got ndarray"):
        xcos_ext.grid_cosine(a, a.numpy())
    with pytest.raises(TypeError, match=r"xcos_score: attention: expected a ndarray like a, got Tensor"):
        xcos_ext.xcos_score(a.numpy(), a.numpy(), a[0, 0])
    for maps, error in (((a, a), RuntimeError), ((a.numpy(), a.numpy()), ValueError)):
        with pytest.raises(error, match=r"attention: expected None, 'norm' or a tensor, got 'learned'"):
            xcos_ext.xcos_score(*maps, "learned")
        with pytest.raises(error, match=r"logits: expected False when attention is 'norm', got True"):
            xcos_ext.xcos_score(*maps, "norm", logits=True)
        for attention in (None, "norm", maps[0][0, 0]):  # where there are no logits to divide
            with pytest.raises(error, match=r"temperature: expected 1 without logits=True, .*, got 0.5"):
                xcos_ext.xcos_score(*maps, attention, temperature=0.5)


def test_numbers_in_tensors_are_refused_instead_of_waited_for():
    a = torch.zeros(A)
    with pytest.raises(TypeError, match=r"temperature: expected a number, got a tensor, .*divide the logits by it"):
        xcos_ext.xcos_score(a, a, a[0, 0], logits=True, temperature=torch.tensor(0.5))
    for call_op in (xcos_ext.xcos_score, xcos_ext.grid_cosine):
        with pytest.raises(TypeError, match="eps: expected a number, got a tensor"):
            call_op(a, a, eps=torch.tensor(1e-6))


def test_raw_operator_checks_its_mode():
    a = torch.zeros(A)
    op = torch.ops.xcos_ext.xcos_score
    with pytest.raises(
        RuntimeError, match=r"mode: expected 0 \(uniform\), 1 \(norm\), 2 \(weights\) or 3 \(logits\), got 7"
    ):
        op(a, a, None, 7, 1.0, 1e-6)
    with pytest.raises(RuntimeError, match="attention: expected a tensor for this mode, got None"):
        op(a, a, None, 3, 1.0, 1e-6)
    with pytest.raises(RuntimeError, match="attention: expected None for this mode, got a tensor"):
        op(a, a, a[0, 0], 0, 1.0, 1e-6)


def test_raw_backward_checks_its_gradients():
    a = torch.zeros(A)
    op = torch.ops.xcos_ext.grid_cosine_backward
    with pytest.raises(RuntimeError, match=r"grad_similarity: expected shape \[4, 7, 7\], got \[4, 7\]"):
        op(torch.zeros(4, 7), a, a, 1e-6, True, True)
    with pytest.raises(RuntimeError, match="grad_similarity: expected dtype float32, got float64"):
        op(torch.zeros(4, 7, 7, dtype=torch.float64), a, a, 1e-6, True, True)


@pytest.mark.parametrize("op", ["grid_cosine", "xcos_score"])
@pytest.mark.parametrize("through_attention", [False, True])
def test_double_backward_is_refused_clearly(op, through_attention, device):
    """Also where the incoming gradient is a constant, as in a gradient penalty."""
    a = torch.randn(A, device=device, requires_grad=True)
    attention = torch.randn(7, 7, device=device, requires_grad=True) if through_attention else None
    out = call(op, a, torch.randn(A, device=device), attention)
    (grad,) = torch.autograd.grad(out.sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not implemented; xcos_ext.reference.{op}"):
        (grad.square().sum() + a.sum()).backward()


def test_numpy_arrays_of_another_byte_order():
    a = np.zeros(A, dtype=">f4")
    with pytest.raises(ValueError, match="a: expected dtype float16, float32 or float64, got >f4"):
        xcos_ext.xcos_score(a, a)


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("grid_cosine", "eps", "x", "grid_cosine: eps: expected a number, got str"),
        ("xcos_score", "temperature", None, "xcos_score: temperature: expected a number, got NoneType"),
        ("grid_match", "symmetric", [], "grid_match: symmetric: expected True or False, got list"),
        ("grid_match", "symmetric", 1, "grid_match: symmetric: expected True or False, got int"),
        ("grid_match", "return_offsets", "no", "grid_match: return_offsets: expected True or False, got str"),
        ("xcos_score", "logits", "no", "xcos_score: logits: expected True or False, got str"),
        ("xcos_score", "return_maps", None, "xcos_score: return_maps: expected True or False, got NoneType"),
    ],
)
def test_values_of_a_wrong_kind_are_named_as_all_others(name, argument, value, message):
    a = torch.randn(2, 8, 3, 3)
    with pytest.raises(TypeError, match=f"^{message}$"):
        getattr(xcos_ext, name)(a, a, **{argument: value})


def test_sparse_tensors_are_refused_in_a_line():
    a = torch.randn(2, 8, 3, 3)
    with pytest.raises(RuntimeError, match="grid_cosine: expected dense tensors"):
        xcos_ext.grid_cosine(a.to_sparse(), a)


def test_numbers_of_a_search_are_named_as_all_others():
    faces = xcos_ext.Templates.from_features(torch.randn(2, 8, 3, 3))
    for options, message in (
        ({"min_score": {}}, "min_score: expected a number, got dict"),
        ({"first_index": 1.5}, "first_index: expected an int, got float"),
    ):
        with pytest.raises(TypeError, match=f"xcos_topk: {message}"):
            xcos_ext.xcos_topk(faces, faces, 1, **options)
    with pytest.raises(RuntimeError, match="xcos_topk: first_index: expected 0 or more"):
        xcos_ext.xcos_topk(faces, faces, 1, first_index=2**63)
    with pytest.raises(TypeError, match="xcos_maps: threshold: expected a number, got str"):
        xcos_ext.xcos_maps(faces, faces, torch.tensor([[0, 1]]), threshold="x")
