"""xcos_score against the reference: every attention mode, values, maps, gradients, layouts."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_forward_close, assert_gradient_close
from samples import (
    DTYPES,
    GRADIENT_SHAPES,
    LAYOUTS,
    MODES,
    SHAPES,
    differentiable,
    feature_maps,
    leaves,
    sample,
)

import xcos_ext
from xcos_ext import reference


def both(s, **options):
    """(ours, reference in fp64 on the same values); logits are divided by 0.7."""
    options |= {"temperature": 0.7} if s.logits else {}
    wide = leaves(s, torch.float64)
    ours = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=s.logits, return_maps=True, **options)
    theirs = reference.xcos_score(wide.a, wide.b, wide.attention, logits=s.logits, return_maps=True, **options)
    return ours, theirs, wide


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, layout, mode, dtype, device):
    s = sample(shape, dtype, layout, mode, device)
    ours, theirs, _ = both(s)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_forward_close(one, other, dtype)
    alone = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=s.logits, temperature=0.7 if s.logits else 1.0)
    assert torch.equal(alone, ours.score), "the score must not depend on whether maps are asked for"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=str)
def test_gradients_match_the_reference(shape, layout, mode, dtype, device):
    s = leaves(sample(shape, dtype, layout, mode, device))
    ours, theirs, wide = both(s)
    seeds = [torch.randn(t.shape, dtype=torch.float64, device=device) for t in theirs]
    actual = torch.autograd.grad(
        sum((t * g.to(t.dtype)).sum() for t, g in zip(ours, seeds, strict=True)), differentiable(s)
    )
    expected = torch.autograd.grad(sum((t * g).sum() for t, g in zip(theirs, seeds, strict=True)), differentiable(wide))
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert_gradient_close(one, other, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, device):
    s = leaves(sample((3, 4, 2, 3), torch.float64, "contiguous", mode, device))

    options = {"logits": s.logits, "temperature": 0.8 if s.logits else 1.0, "return_maps": True}

    def score(*tensors):
        attention = tensors[2] if len(tensors) == 3 else s.attention
        return tuple(xcos_ext.xcos_score(*tensors[:2], attention, **options))

    assert torch.autograd.gradcheck(score, differentiable(s))


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
def test_only_the_wanted_gradients_are_computed(wanted, device):
    s = sample((2, 32, 7, 7), torch.float32, "contiguous", "logits", device)
    tensors = [t.requires_grad_(need) for t, need in zip(differentiable(s), wanted, strict=True)]
    xcos_ext.xcos_score(*tensors, logits=True).sum().backward()
    assert [t.grad is not None for t in tensors] == list(wanted)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["score", "similarity", "attention"])
@pytest.mark.parametrize("mode", ["norm", "weights", "logits"])
def test_gradient_through_one_output_alone(mode, part, device):
    s = leaves(sample((3, 32, 7, 7), torch.float64, "contiguous", mode, device))
    ours, theirs, wide = both(s)
    actual = torch.autograd.grad(ours[part].square().sum(), differentiable(s), allow_unused=True)
    expected = torch.autograd.grad(
        theirs[part].square().sum(), differentiable(wide), allow_unused=True, materialize_grads=True
    )
    for one, other in zip(actual, expected, strict=True):
        assert_gradient_close(torch.zeros_like(other) if one is None else one, other, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_attention_of_another_dtype_than_the_features(dtype, device):
    s = sample((4, 32, 7, 7), torch.float16, "contiguous", "logits", device)
    attention = s.attention.to(dtype).requires_grad_()
    score = xcos_ext.xcos_score(s.a, s.b, attention, logits=True)
    expected = reference.xcos_score(s.a.double(), s.b.double(), attention.detach().double(), logits=True)
    assert_forward_close(score.detach(), expected, torch.float16)
    score.sum().backward()
    assert attention.grad.dtype == dtype


def test_weights_of_the_softmax_and_of_norms_sum_to_one(device):
    for mode in ("uniform", "norm", "logits"):
        s = sample((6, 32, 7, 7), torch.float32, "contiguous", mode, device)
        maps = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=s.logits, return_maps=True)
        torch.testing.assert_close(maps.attention.sum((1, 2)), torch.ones(6, device=device), rtol=0, atol=1e-6)
        assert (maps.attention >= 0).all()


def test_the_score_is_what_its_maps_add_up_to(device):
    s = sample((6, 32, 7, 7), torch.float32, "contiguous", "logits", device)
    score, similarity, attention = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=True, return_maps=True)
    torch.testing.assert_close((similarity * attention).sum((1, 2)), score, rtol=0, atol=1e-6)


def test_minus_infinity_masks_a_cell(device):
    s = sample((2, 32, 7, 7), torch.float32, "contiguous", "logits", device)
    logits = s.attention.clone()
    logits[:, 3, 3] = -torch.inf
    maps = xcos_ext.xcos_score(s.a, s.b, logits, logits=True, return_maps=True)
    assert (maps.attention[:, 3, 3] == 0).all()
    expected = reference.xcos_score(s.a.double(), s.b.double(), logits.double(), logits=True)
    assert_forward_close(maps.score, expected, torch.float32)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 50.0, 1e4])
def test_softmax_at_every_spread_of_logits(spread, device):
    s = sample((4, 32, 7, 7), torch.float32, "contiguous", "logits", device)
    ours = xcos_ext.xcos_score(s.a, s.b, s.attention * spread, logits=True, return_maps=True)
    expected = (s.attention * spread).double().flatten(1).softmax(1).view_as(ours.attention)
    # Two ulp of exp, and the rounding of logit differences, which grows with them.
    torch.testing.assert_close(ours.attention.double(), expected, rtol=2e-6 * max(1.0, spread), atol=1e-9)


def test_expanded_gradient_of_a_sum(device):
    """sum().backward() hands in one number for all pairs; nothing may read past it."""
    a, b = (t.requires_grad_() for t in feature_maps((9, 32, 7, 7), torch.float32, "contiguous", device))
    xcos_ext.xcos_score(a, b).sum().backward()
    expected = torch.autograd.grad(reference.xcos_score(a, b).sum(), a)[0]
    assert_gradient_close(a.grad, expected, torch.float32)


def test_numpy_free_broadcast_of_one_probe(device):
    """expand() scores one probe against many faces without a copy, and its gradient is the sum over them."""
    probe = torch.randn(1, 32, 7, 7, device=device, requires_grad=True)
    gallery = torch.randn(20, 32, 7, 7, device=device)
    xcos_ext.xcos_score(probe.expand(20, -1, -1, -1), gallery).sum().backward()
    wide = probe.detach().double().requires_grad_()
    reference.xcos_score(wide.expand(20, -1, -1, -1), gallery.double()).sum().backward()
    assert_gradient_close(probe.grad, wide.grad, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("match", ["best", "soft"])
def test_matched_scores_match_the_reference(match, mode, dtype, device):
    s = leaves(sample((5, 32, 7, 7), dtype, "contiguous", mode, device))
    matching = {"radius": 1, "match": match} | ({"match_temperature": 0.2} if match == "soft" else {})
    ours, theirs, wide = both(s, **matching)
    for one, other in zip(ours, theirs, strict=True):
        assert_forward_close(one.detach(), other.detach(), dtype)
    options = {"logits": s.logits, "temperature": 0.7 if s.logits else 1.0}
    alone = xcos_ext.xcos_score(s.a, s.b, s.attention, **options, **matching)
    assert torch.equal(alone, ours.score)
    soft = {"temperature": 0.2} if match == "soft" else {}
    matched = xcos_ext.grid_match(s.a, s.b, radius=1, match=match, **soft)
    assert torch.equal(ours.similarity, matched), "S is that of grid_match"
    plain = xcos_ext.xcos_score(s.a, s.b, s.attention, **options, return_maps=True)
    assert torch.equal(ours.attention, plain.attention), "W does not look at the radius"
    actual = torch.autograd.grad(ours.score.sum(), differentiable(s))
    expected = torch.autograd.grad(theirs.score.sum(), differentiable(wide))
    for one, other in zip(actual, expected, strict=True):
        assert_gradient_close(one, other, dtype)


def test_radius_0_is_the_score_as_it_was(device):
    s = sample((5, 32, 7, 7), torch.float32, "contiguous", "norm", device)
    for match in ("best", "soft"):
        for one, other in zip(
            xcos_ext.xcos_score(s.a, s.b, "norm", radius=0, match=match, return_maps=True),
            xcos_ext.xcos_score(s.a, s.b, "norm", return_maps=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_matching_names_what_is_wrong():
    a = torch.zeros(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match="radius: expected 0 to 7, got 9"):
        xcos_ext.xcos_score(a, a, radius=9)
    with pytest.raises(RuntimeError, match="xcos_score: match: expected 'best' or 'soft', got 'worst'"):
        xcos_ext.xcos_score(a, a, match="worst")
    with pytest.raises(TypeError, match="xcos_score: match_temperature: expected a number, got a tensor"):
        xcos_ext.xcos_score(a, a, radius=1, match_temperature=torch.tensor(1.0))
    for radius in (0, 1):
        with pytest.raises(RuntimeError, match="xcos_score: match_temperature: expected the default with match='best'"):
            xcos_ext.xcos_score(a, a, radius=radius, match_temperature=0.5)
    with pytest.raises(TypeError, match=r"xcos_score: radius: expected 0 for arrays, got 1; torch.from_numpy"):
        xcos_ext.xcos_score(a.numpy(), a.numpy(), radius=1)
