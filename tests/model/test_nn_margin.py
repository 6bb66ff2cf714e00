"""Margin heads: formulas, finite gradients at the ends, label checks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from xcos_ext.model import ArcFaceHead, CosFaceHead

HEADS = [ArcFaceHead, CosFaceHead]


def test_arcface_formula() -> None:
    head = ArcFaceHead(8, 5, scale=64, margin=0.5).double()
    x, labels = torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 5
    logits = head(x, labels).detach()
    kernel = head.kernel.detach()
    for i in range(40):
        for j in range(5):
            cosine = float(x[i] @ kernel[:, j] / (x[i].norm() * kernel[:, j].norm()))
            if j == labels[i]:
                theta = math.acos(cosine)
                inside = theta < math.pi - 0.5
                cosine = math.cos(theta + 0.5) if inside else cosine - 0.5 * math.sin(0.5)
            assert float(logits[i, j]) == pytest.approx(64 * cosine, abs=1e-9)


def test_cosface_formula() -> None:
    head = CosFaceHead(8, 5).double()
    x, labels = torch.randn(12, 8, dtype=torch.float64), torch.arange(12) % 5
    cosine = F.normalize(x, dim=1) @ F.normalize(head.kernel, dim=0)
    expected = 30 * (cosine - 0.35 * F.one_hot(labels, 5).double())
    torch.testing.assert_close(head(x, labels), expected)


def test_arcface_decreases_with_the_angle() -> None:
    head = ArcFaceHead(2, 1).double()
    with torch.no_grad():
        head.kernel.copy_(torch.tensor([[1.0], [0.0]]))
    theta = torch.linspace(0.01, math.pi - 0.01, 500, dtype=torch.float64)
    x = torch.stack((theta.cos(), theta.sin()), 1)
    logits = head(x, torch.zeros(500, dtype=torch.int64))[:, 0]
    assert (logits.diff() < 0).all()


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_are_finite_at_the_ends(head_class: type, dtype: torch.dtype, sign: float) -> None:
    head = head_class(16, 3).to(dtype)
    x = (sign * head.kernel.detach().T).clone().requires_grad_()  # cosine with the true class is exactly +-1
    F.cross_entropy(head(x, torch.arange(3)), torch.arange(3)).backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(head.kernel.grad).all()


@pytest.mark.parametrize("head_class", HEADS)
def test_zero_embedding(head_class: type) -> None:
    head = head_class(16, 3)
    x = torch.zeros(2, 16, requires_grad=True)
    logits = head(x, torch.tensor([0, 1]))
    logits.sum().backward()
    assert torch.isfinite(logits).all() and torch.isfinite(x.grad).all()
    assert (head.cosine(x) == 0).all()


@pytest.mark.parametrize("head_class", HEADS)
def test_gradcheck(head_class: type) -> None:
    head = head_class(6, 4).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0])
    assert torch.autograd.gradcheck(lambda x: head(x, labels), (x,))


@pytest.mark.parametrize("head_class", HEADS)
def test_half_precision_computes_in_fp32(head_class: type) -> None:
    head = head_class(64, 10)
    x, labels = torch.randn(4, 64), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x, labels)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head(x, labels))


def test_kernel_name_and_start() -> None:
    head = ArcFaceHead(1568, 20)
    assert [(name, tuple(p.shape)) for name, p in head.named_parameters()] == [("kernel", (1568, 20))]
    torch.testing.assert_close(head.kernel.norm(dim=0), torch.ones(20))


@pytest.mark.parametrize("head_class", HEADS)
def test_labels_are_checked(head_class: type) -> None:
    head = head_class(8, 5)
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 4\], got 0..5"):
        head(x, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 4\], got -1..2"):
        head(x, torch.tensor([0, -1, 2]))
    with pytest.raises(TypeError, match=r"labels: expected int64 or int32, got torch.float32"):
        head(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"labels: expected \[3\], got \[2\]"):
        head(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"embeddings: expected \[N, 8\], got \[3, 9\]"):
        head(torch.randn(3, 9), torch.tensor([0, 1, 2]))
    assert head(torch.randn(0, 8), torch.zeros(0, dtype=torch.int64)).shape == (0, 5)


def test_constructor_checks() -> None:
    with pytest.raises(ValueError, match="scale: expected a positive finite number, got 0"):
        ArcFaceHead(8, 5, scale=0)
    with pytest.raises(ValueError, match="margin: expected an angle below pi"):
        ArcFaceHead(8, 5, margin=3.2)
    with pytest.raises(ValueError, match="margin: expected a finite number >= 0"):
        CosFaceHead(8, 5, margin=-0.1)
    with pytest.raises(ValueError, match="features, classes: expected positive integers"):
        CosFaceHead(8, 0)
