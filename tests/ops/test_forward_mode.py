"""Derivatives in forward mode: right numbers from every operator, or an error; never a tangent that is lost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import xcos_ext
from xcos_ext.model import XCosAttention, XCosHead

Function = Callable[[Tensor, Tensor, XCosHead], Tensor]

CASES: dict[str, Function] = {
    "grid_cosine": lambda a, b, _: xcos_ext.grid_cosine(a, b),
    "grid_match": lambda a, b, _: xcos_ext.grid_match(a, b, match="soft", symmetric=False),
    "grid_match, offsets": lambda a, b, _: xcos_ext.grid_match(a, b, return_offsets=True).similarity,
    "xcos_score": lambda a, b, _: xcos_ext.xcos_score(a, b),
    "xcos_score, norm": lambda a, b, _: xcos_ext.xcos_score(a, b, "norm"),
    "xcos_score, weights": lambda a, b, _: xcos_ext.xcos_score(b, b + 1, a[:, 0]),
    "xcos_score, logits": lambda a, b, _: xcos_ext.xcos_score(a, b, a[0, 0], logits=True, temperature=0.5),
    "xcos_score, radius": lambda a, b, _: xcos_ext.xcos_score(a, b, "norm", radius=1),
    "xcos_score, maps": lambda a, b, _: torch.stack(xcos_ext.xcos_score(a, b, "norm", return_maps=True)[1:]),
    "xcos_matrix, uniform": lambda a, b, _: xcos_ext.xcos_matrix(
        *(xcos_ext.Templates.from_features(x) for x in (a, b))
    ),
    "xcos_matrix, norm": lambda a, b, _: xcos_ext.xcos_matrix(*map(xcos_ext.Templates.from_features, (a, b)), "norm"),
    "xcos_matrix, learned": lambda a, b, head: xcos_ext.xcos_matrix(head.templates(a), head.templates(b, "gallery")),
    "xcos_maps": lambda a, b, head: (
        xcos_ext.xcos_maps(head.templates(a), head.templates(b, "gallery"), torch.tensor([[0, 1], [1, 1]])).attention
    ),
    "a head": lambda a, b, head: head.score(a, b),
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def maps() -> list[Tensor]:
    return list(torch.randn(3, 2, 6, 3, 3, dtype=torch.float64))


@pytest.fixture
def head() -> XCosHead:
    # Parameters of zero slope would hide what the maximum of the two faces' shares passes on.
    made = XCosHead(6, 6, projection="none", attention=XCosAttention(6)).double().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.rand_like(parameter) - 0.3)
    return made


@cases
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_tangents_are_differences(case: str, grad: bool, maps: list[Tensor], head: XCosHead) -> None:
    a, b, v = maps
    step = 1e-6
    with torch.no_grad():
        wanted = (CASES[case](a + step * v, b, head) - CASES[case](a - step * v, b, head)) / (2 * step)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(CASES[case](forward_ad.make_dual(a, v), b, head))
    assert tangent is not None
    torch.testing.assert_close(tangent, wanted, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(value, CASES[case](a, b, head))


@cases
def test_jacobians_of_both_modes_agree(case: str, maps: list[Tensor], head: XCosHead) -> None:
    a, b, v = maps

    def function(x: Tensor) -> Tensor:
        return CASES[case](x, b, head)

    forward = torch.func.jacfwd(function)(a)
    torch.testing.assert_close(forward, torch.autograd.functional.jacobian(function, a))
    pushed = torch.func.jvp(function, (a,), (v,))[1]
    torch.testing.assert_close(pushed, torch.einsum("...nchw,nchw->...", forward, v))


@pytest.mark.parametrize("case", ["grid_cosine", "xcos_score, norm", "xcos_matrix, learned"])
def test_second_derivatives_are_differences_of_first(case: str, maps: list[Tensor], head: XCosHead) -> None:
    a, b, v = maps
    gradient = torch.func.grad(lambda x: CASES[case](x, b, head).sum())
    wanted = (gradient(a + 1e-6 * v) - gradient(a - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(gradient, (a,), (v,))[1], wanted, atol=1e-6, rtol=1e-5)


def test_tensors_without_tangents_go_the_short_way(maps: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    from xcos_ext.ops import reference

    monkeypatch.delattr(reference, "grid_cosine")
    with forward_ad.dual_level():
        xcos_ext.grid_cosine(maps[0], maps[1])


def test_wrong_arguments_are_refused_as_ever(maps: list[Tensor]) -> None:
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="grid_cosine: b: expected shape"):
        xcos_ext.grid_cosine(forward_ad.make_dual(maps[0], maps[1]), maps[1][:1])


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_what_has_no_derivative_says_so(grad: bool, maps: list[Tensor], head: XCosHead) -> None:
    a, b, v = maps
    operators = torch.ops.xcos_ext
    parameters = XCosHead(6, 6, projection="none", attention=XCosAttention(6)).eval().attention.head_parameters()
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(a, v)
        faces = xcos_ext.Templates.from_features(dual)
        with pytest.raises(RuntimeError, match="expected templates without tangents"):
            xcos_ext.xcos_topk(faces, faces, 1)
        with pytest.raises(RuntimeError, match="requires one or has a tangent"):
            xcos_ext.xcos_head(forward_ad.make_dual(a.float(), v.float()), b.float(), parameters)
        with pytest.raises(RuntimeError, match="jvp"):
            operators.xcos_score(dual, b, None, 0, 1.0, 1e-6)
        with pytest.raises(RuntimeError, match="xcos_matrix_fixed"):
            operators.xcos_matrix_fixed(faces.features, faces.features.detach(), None, None)
        with pytest.raises(RuntimeError, match="double backward"):
            operators.grid_cosine_backward(forward_ad.make_dual(a[:, 0], v[:, 0]), a, b, 1e-6, True, True)
    with pytest.raises(RuntimeError, match="tangents"):
        torch.func.jacfwd(lambda x: xcos_ext.xcos_topk(*(xcos_ext.Templates.from_features(x),) * 2, 1).values)(a)


def test_a_head_in_single_precision_is_not_fused_away(maps: list[Tensor], head: XCosHead) -> None:
    a, b, v = maps
    wanted = torch.func.jvp(lambda x: head.score(x, b), (a,), (v,))[1].float()
    head.float()
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(head.score(forward_ad.make_dual(a.float(), v.float()), b.float())).tangent
    torch.testing.assert_close(tangent, wanted, atol=1e-5, rtol=1e-4)
