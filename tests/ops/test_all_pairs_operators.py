"""The operators behind xcos_matrix and xcos_topk inside torch's machinery: opcheck, fake kernels, compile, export."""

from __future__ import annotations

import dataclasses
import math

import pytest
import template_samples as samples
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import xcos_ext
from xcos_ext.ops.templates import Templates, result_dtype

OPS = torch.ops.xcos_ext
GRADS = ("test_schema", "test_faketensor")  # the backward is not differentiable itself


def arguments(
    probes: int = 3, gallery: int = 5, dtype: torch.dtype = torch.float32, orders: int = 1, device: str = "cpu"
) -> list[Tensor]:
    wide = result_dtype(dtype)

    def side(faces: int) -> list[Tensor]:
        features = torch.nn.functional.normalize(torch.randn(faces, 15, 8, dtype=wide), dim=2)
        projection = torch.randn(faces, orders, 4, 15, dtype=wide)
        return [features.to(dtype), projection.to(dtype), torch.randn(faces, orders, 15, dtype=wide)]

    shared = [torch.randn(4, 3, 3, dtype=wide), torch.tensor([0.25], dtype=wide)]
    return [t.to(device) for t in (*side(probes), *side(gallery), *shared)]


OPTIONS = (3, 5, 0, 0.8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("orders", [1, 2])
def test_opcheck_xcos_matrix(dtype: torch.dtype, orders: int, device: str) -> None:
    tensors = [t.requires_grad_() for t in arguments(dtype=dtype, orders=orders, device=device)]
    # Half gradients are rounded, so that two ways of summing them differ: opcheck compares them too closely.
    options = {"test_utils": GRADS} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(OPS.xcos_matrix.default, (*tensors, *OPTIONS), **options)


@pytest.mark.parametrize("need_mask", [255, 1, 0b11000010])
def test_opcheck_xcos_matrix_backward(need_mask: int, device: str) -> None:
    grad = torch.randn(3, 5, device=device)
    torch.library.opcheck(
        OPS.xcos_matrix_backward.default, (grad, *arguments(device=device), *OPTIONS, need_mask), test_utils=GRADS
    )


def test_opcheck_xcos_matrix_fixed() -> None:
    features = arguments()
    norms = torch.rand(3, 15), torch.rand(5, 15)
    for given in ((None, None), norms):
        torch.library.opcheck(OPS.xcos_matrix_fixed.default, (features[0], features[3], *given), test_utils=GRADS)


def test_opcheck_xcos_topk_update(device: str) -> None:
    values = torch.full((3, 4), -math.inf, device=device)
    indices = torch.full((3, 4), -1, device=device)
    scores = torch.randn(3, 20, device=device)
    listed = torch.tensor([[1, 2], [-1, -1], [5, 19]], device=device)
    mask = torch.rand(1, 20, device=device) > 0.5
    for exclude in ((None, None), (listed, None), (None, mask)):
        torch.library.opcheck(
            OPS.xcos_topk_update.default, (values, indices, scores, 0, -0.5, *exclude), test_utils=GRADS
        )


# What is wrong, and the message behind the operator's name.
def _replaced(index: int, change):  # type: ignore[no-untyped-def]
    def apply(tensors: list[Tensor]) -> list[Tensor]:
        tensors[index] = change(tensors[index])
        return tensors

    return apply


BAD = {
    "rank": (_replaced(0, lambda t: t[0]), OPTIONS, "probe_features: expected shape [P, cells, C], got [15, 8]"),
    "integer": (
        _replaced(0, lambda t: t.long()),
        OPTIONS,
        "probe_features: expected dtype float16, bfloat16, float32 or float64, got int64",
    ),
    "grid": (
        lambda tensors: tensors,
        (4, 4, 0, 1.0),
        "probe_features: expected shape [P, 16, C] for a grid of 4 x 4, got [3, 15, 8]",
    ),
    "orders": (
        _replaced(1, lambda t: t.expand(3, 3, 4, 15)),
        OPTIONS,
        "probe_projection: expected shape [P, 1 or 2, hidden, cells], got [3, 3, 4, 15]",
    ),
    "other channels": (
        _replaced(3, lambda t: t[:, :, :7]),
        OPTIONS,
        "gallery_features: expected shape [5, 15, 8], got [5, 15, 7]",
    ),
    "other hidden": (
        _replaced(4, lambda t: t[:, :, :3]),
        OPTIONS,
        "gallery_projection: expected shape [5, 1, 4, 15], got [5, 1, 3, 15]",
    ),
    "mixed dtypes": (
        _replaced(3, lambda t: t.half()),
        OPTIONS,
        "gallery_features: expected dtype float32, got float16",
    ),
    "half bias": (_replaced(2, lambda t: t.half()), OPTIONS, "probe_bias: expected dtype float32, got float16"),
    "faces of the bias": (
        _replaced(5, lambda t: t[:4]),
        OPTIONS,
        "gallery_bias: expected shape [5, 1, 15], got [4, 1, 15]",
    ),
    "weight": (_replaced(6, lambda t: t[:, :2]), OPTIONS, "weight: expected shape [4, 3, 3], got [4, 2, 3]"),
    "slope": (_replaced(7, lambda t: t.double()), OPTIONS, "slope: expected dtype float32, got float64"),
    "normalize": (lambda t: t, (3, 5, 2, 1.0), "normalize: expected 0 (softmax) or 1 (min-shift), got 2"),
    "temperature": (lambda t: t, (3, 5, 0, 0.0), "temperature: expected a finite number above 0, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_message_from_kernels_and_fake_kernels(name: str) -> None:
    change, options, message = BAD[name]
    with pytest.raises(RuntimeError) as real:
        OPS.xcos_matrix(*change(arguments()), *options)
    assert str(real.value) == f"xcos_matrix: {message}"
    with FakeTensorMode(), pytest.raises(RuntimeError) as fake:
        OPS.xcos_matrix(*change(arguments()), *options)
    assert str(fake.value) == str(real.value)


def test_gradient_of_another_shape_is_refused() -> None:
    call = (torch.randn(5, 3), *arguments(), *OPTIONS, 255)
    for mode in (None, FakeTensorMode(allow_non_fake_inputs=True)):
        with pytest.raises(RuntimeError, match=r"xcos_matrix_backward: grad: expected shape \[3, 5\], got \[5, 3\]"):
            if mode is None:
                OPS.xcos_matrix_backward(*call)
            else:
                with mode:
                    OPS.xcos_matrix_backward(*call)


def _templates(module: torch.nn.Module, faces: int, role: str, device: str) -> Templates:
    return module.templates(torch.randn(faces, 8, 3, 5, device=device), role)  # type: ignore[operator]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph_with_gradients(dynamic: bool, device: str) -> None:
    module = samples.attention("softmax", 8, 4).float().to(device)
    probes, gallery = _templates(module, 3, "probe", device), _templates(module, 6, "gallery", device)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        first = dataclasses.replace(probes, features=a)
        return xcos_ext.xcos_matrix(first, dataclasses.replace(gallery, features=b)).logsumexp(1).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    grads = []
    for function in (loss, compiled):
        a, b = (t.features.detach().clone().requires_grad_() for t in (probes, gallery))
        grads.append(torch.autograd.grad(function(a, b), (a, b)))
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(traced, eager)


def test_the_operator_is_exported() -> None:
    class Search(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return OPS.xcos_matrix(*tensors, *OPTIONS)

    tensors = tuple(arguments())
    program = torch.export.export(Search(), tensors)
    torch.testing.assert_close(program.module()(*tensors), Search()(*tensors))


def test_functional_gradient(device: str) -> None:
    module = samples.attention("softmax", 8, 4).to(device)
    probes, gallery = (module.templates(samples.features(4, 8, (3, 5)).to(device), "both").detach() for _ in range(2))

    def total(features: Tensor) -> Tensor:
        return xcos_ext.xcos_matrix(dataclasses.replace(probes, features=features), gallery).square().sum()

    leaf = probes.features.clone().requires_grad_()
    total(leaf).backward()
    torch.testing.assert_close(torch.func.grad(total)(probes.features), leaf.grad)
