"""XCosAttention: the published keys, the formula, both normalisers, order of the faces, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import randomised
from torch import Tensor

from xcos_ext.model import XCosAttention

# Names and shapes as they are in the public weights.
OFFICIAL = {
    "embedding_net.0.weight": (16, 32, 3, 3),
    "embedding_net.0.bias": (16,),
    "embedding_net.1.weight": (16,),
    "embedding_net.1.bias": (16,),
    "embedding_net.1.running_mean": (16,),
    "embedding_net.1.running_var": (16,),
    "embedding_net.1.num_batches_tracked": (),
    "embedding_net.2.weight": (1,),
    "attention.0.weight": (16, 32, 3, 3),
    "attention.0.bias": (16,),
    "attention.1.weight": (16,),
    "attention.1.bias": (16,),
    "attention.1.running_mean": (16,),
    "attention.1.running_var": (16,),
    "attention.1.num_batches_tracked": (),
    "attention.2.weight": (1,),
    "attention.3.weight": (1, 16, 3, 3),
    "attention.3.bias": (1,),
    "attention.4.weight": (1,),
    "attention.4.bias": (1,),
    "attention.4.running_mean": (1,),
    "attention.4.running_var": (1,),
    "attention.4.num_batches_tracked": (),
    "attention.5.weight": (1,),
}


def by_hand(state: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The published network written out with functional calls."""

    def block(x: Tensor, name: str, conv: int) -> Tensor:
        x = F.conv2d(x, state[f"{name}.{conv}.weight"], state[f"{name}.{conv}.bias"], padding=1)
        bn = f"{name}.{conv + 1}"
        x = (x - state[f"{bn}.running_mean"].view(1, -1, 1, 1)) / (
            state[f"{bn}.running_var"].view(1, -1, 1, 1) + 1e-5
        ).sqrt()
        x = x * state[f"{bn}.weight"].view(1, -1, 1, 1) + state[f"{bn}.bias"].view(1, -1, 1, 1)
        return torch.where(x >= 0, x, x * state[f"{name}.{conv + 2}.weight"])

    both = torch.cat((block(a, "embedding_net", 0), block(b, "embedding_net", 0)), 1)
    return block(block(both, "attention", 0), "attention", 3)[:, 0]


def pair(n: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 32, 7, 7, dtype=torch.float64), torch.randn(n, 32, 7, 7, dtype=torch.float64)


def test_keys_are_the_published_ones() -> None:
    assert {k: tuple(v.shape) for k, v in XCosAttention().state_dict().items()} == OFFICIAL


@pytest.mark.parametrize("temperature", [1.0, 0.3, 7.0])
def test_softmax_formula(temperature: float) -> None:
    net = randomised(XCosAttention(temperature=temperature, symmetric=False))
    a, b = pair()
    expected = by_hand(net.state_dict(), a, b)
    torch.testing.assert_close(net.logits(a, b), expected, rtol=1e-10, atol=1e-12)
    weights = net(a, b)
    torch.testing.assert_close(weights.flatten(1), (expected.flatten(1) / temperature).softmax(1))
    assert weights.shape == (3, 7, 7)


def test_min_shift_formula() -> None:
    net = randomised(XCosAttention(normalize="min-shift", symmetric=False))
    a, b = pair()
    logits = by_hand(net.state_dict(), a, b).flatten(1)
    shifted = logits - logits.min(1, keepdim=True).values
    torch.testing.assert_close(net(a, b).flatten(1), shifted / shifted.sum(1, keepdim=True))


def test_min_shift_of_equal_cells_is_uniform_with_finite_gradient() -> None:
    net = XCosAttention(normalize="min-shift").eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("weight") and parameter.dim() == 4:
                parameter.zero_()
    a, b = torch.randn(2, 32, 7, 7, requires_grad=True), torch.randn(2, 32, 7, 7)
    weights = net(a, b)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 49))
    (weights * torch.randn(2, 7, 7)).sum().backward()
    assert a.grad is not None and torch.isfinite(a.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("normalize", ["softmax", "min-shift"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_are_a_distribution(normalize: str, symmetric: bool) -> None:
    net = randomised(XCosAttention(normalize=normalize, symmetric=symmetric))
    weights = net(*pair())
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("normalize", ["softmax", "min-shift"])
def test_symmetric_is_the_mean_of_both_orders(normalize: str) -> None:
    ordered = randomised(XCosAttention(normalize=normalize, symmetric=False))
    symmetric = XCosAttention(normalize=normalize).double().eval()
    symmetric.load_state_dict(ordered.state_dict())
    a, b = pair()
    assert not torch.allclose(ordered(a, b), ordered(b, a))
    torch.testing.assert_close(symmetric(a, b), (ordered(a, b) + ordered(b, a)) / 2)
    torch.testing.assert_close(symmetric(a, b), symmetric(b, a))


def test_weights_stay_fp32_under_autocast() -> None:
    net = XCosAttention().eval()
    a, b = torch.randn(2, 32, 7, 7), torch.randn(2, 32, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert net.logits(a, b).dtype == torch.float32
        weights = net(a, b)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(2))


def test_any_grid_and_empty_batch() -> None:
    net = XCosAttention(8, 4).eval()
    assert net(torch.randn(2, 8, 5, 3), torch.randn(2, 8, 5, 3)).shape == (2, 5, 3)
    assert net(torch.randn(0, 8, 7, 7), torch.randn(0, 8, 7, 7)).shape == (0, 7, 7)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature: expected a positive finite number"):
        XCosAttention(temperature=temperature)


def test_bad_normaliser_and_channels() -> None:
    for name in ("symmetric", "residual"):
        with pytest.raises(TypeError, match=f"XCosAttention: {name}: expected True or False, got str"):
            XCosAttention(**{name: "no"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normalize: expected 'softmax' or 'min-shift', got 'sum'"):
        XCosAttention(normalize="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"features: expected \[N, 32, H, W\], got \[1, 512, 7, 7\]"):
        XCosAttention()(torch.randn(1, 512, 7, 7), torch.randn(1, 512, 7, 7))
