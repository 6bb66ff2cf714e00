"""torch.compile, torch.export, opcheck, vmap, autocast: the operators inside torch's machinery."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_forward_close, assert_gradient_close
from samples import MODES, differentiable, feature_maps, leaves, sample
from torch._subclasses.fake_tensor import FakeTensorMode

import xcos_ext
from xcos_ext import reference
from xcos_ext.model import XCosAttention, XCosHead

MODE_VALUES = {"uniform": 0, "norm": 1, "weights": 2, "weights_shared": 2, "logits": 3, "logits_shared": 3}


def raw_arguments(s, mode):
    attention = s.attention if isinstance(s.attention, torch.Tensor) else None
    return s.a, s.b, attention, MODE_VALUES[mode], 0.9, 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overload", ["default", "maps"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_xcos_score(mode, overload, layout, device):
    s = leaves(sample((3, 8, 3, 5), torch.float32, layout, mode, device))
    op = getattr(torch.ops.xcos_ext.xcos_score, overload)
    torch.library.opcheck(op, raw_arguments(s, mode))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
def test_opcheck_grid_cosine(layout, device):
    a, b = feature_maps((3, 8, 3, 5), torch.float32, layout, device)
    torch.library.opcheck(
        torch.ops.xcos_ext.grid_cosine.default,
        (a.detach().requires_grad_(), b.detach().requires_grad_(), 1e-6),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
def test_opcheck_backward_operators(layout, device):
    """The backward operators are not differentiable themselves: schema, fake kernels and AOT tracing."""
    tests = ("test_schema", "test_faketensor")
    s = sample((3, 8, 3, 5), torch.float16, layout, "logits", device)
    g, maps = torch.randn(3, device=device), torch.randn(3, 3, 5, device=device)
    for need in (True, False):
        torch.library.opcheck(
            torch.ops.xcos_ext.grid_cosine_backward.default,
            (maps, s.a, s.b, 1e-6, need, True),
            test_utils=tests,
        )
        torch.library.opcheck(
            torch.ops.xcos_ext.xcos_score_backward.default,
            (g, maps, None, s.a, s.b, s.attention, 3, 1.0, 1e-6, True, need, need),
            test_utils=tests,
        )


@pytest.mark.parametrize("mode", ["norm", "weights_shared", "logits"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_with_gradients(mode, dynamic, device):
    s = leaves(sample((4, 8, 3, 5), torch.float32, "contiguous", mode, device))

    def loss(a, b, attention):
        maps = xcos_ext.xcos_score(a * 2, b, attention, logits=s.logits, return_maps=True)
        alone = xcos_ext.xcos_score(a, b, attention, logits=s.logits)
        return (maps.score * alone).sum() + maps.similarity.square().sum() + xcos_ext.grid_cosine(a, b).mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = torch.autograd.grad(loss(s.a, s.b, s.attention), differentiable(s))
    actual = torch.autograd.grad(compiled(s.a, s.b, s.attention), differentiable(s))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_compile_with_inductor(device):
    a, b = feature_maps((4, 32, 7, 7), torch.float32, "contiguous", device)
    a.requires_grad_()

    def loss(a, b):
        return (xcos_ext.xcos_score(torch.relu(a), b, "norm") - 0.3).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    (expected,) = torch.autograd.grad(loss(a, b), a)
    (actual,) = torch.autograd.grad(compiled(a, b), a)
    torch.testing.assert_close(actual, expected)


RESULTS = {
    "score": lambda a, faces: xcos_ext.xcos_score(a, a, return_maps=True),
    "match": lambda a, faces: xcos_ext.grid_match(a, a, return_offsets=True),
    "maps": lambda a, faces: xcos_ext.xcos_maps(faces, faces, torch.tensor([[0, 1]]), threshold=0.1),
    "topk": lambda a, faces: xcos_ext.xcos_topk(faces, faces, 1),
}


@pytest.mark.parametrize("result", RESULTS)
def test_results_can_be_saved_and_exported(result, tmp_path):
    features = torch.randn(2, 6, 3, 3)
    faces = xcos_ext.Templates.from_features(features)
    made = RESULTS[result](features, faces)
    torch.save(made, tmp_path / "result.pt")
    loaded = torch.load(tmp_path / "result.pt", weights_only=True)
    assert type(loaded) is type(made)
    torch.testing.assert_close(tuple(loaded), tuple(made))

    class Same(torch.nn.Module):
        def forward(self, x):
            return type(made)(*(x + i for i in range(len(made))))

    torch.export.save(torch.export.export(Same(), (features,)), tmp_path / "result.pt2")
    assert type(torch.export.load(tmp_path / "result.pt2").module()(features)) is type(made)


def test_templates_can_be_saved_and_are_checked_when_loaded(tmp_path):
    head = XCosHead(6, 6, projection="none", attention=XCosAttention(6)).eval()
    probes = head.templates(torch.randn(2, 6, 3, 3)).detach()
    torch.save(probes, tmp_path / "faces.pt")
    loaded = torch.load(tmp_path / "faces.pt", weights_only=True)
    gallery = head.templates(torch.randn(3, 6, 3, 3), "gallery")
    assert torch.equal(xcos_ext.xcos_matrix(loaded, gallery), xcos_ext.xcos_matrix(probes, gallery))
    object.__setattr__(probes, "norms", probes.norms[:1])
    torch.save(probes, tmp_path / "faces.pt")
    with pytest.raises(ValueError, match=r"norms: expected shape \[2, 9\]"):
        torch.load(tmp_path / "faces.pt", weights_only=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict, tmp_path):
    class Score(torch.nn.Module):
        def forward(self, a, b, logits):
            return tuple(xcos_ext.xcos_score(a, b, logits, logits=True, return_maps=True))

    n = torch.export.Dim("n", min=2, max=64)
    s = sample((4, 32, 7, 7), torch.float32, "contiguous", "logits")
    program = torch.export.export(
        Score(), (s.a, s.b, s.attention), dynamic_shapes=({0: n}, {0: n}, {0: n}), strict=strict
    )
    assert "xcos_ext.xcos_score" in str(program.graph)
    torch.export.save(program, tmp_path / "score.pt2")
    loaded = torch.export.load(tmp_path / "score.pt2").module()
    other = sample((7, 32, 7, 7), torch.float32, "contiguous", "logits")
    for one, expected in zip(
        loaded(other.a, other.b, other.attention), Score()(other.a, other.b, other.attention), strict=True
    ):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("dims", [(0, 0), (1, None), (None, 2)])
def test_vmap_grid_cosine(dims):
    a = torch.randn(3, 2, 4, 5, 5).movedim(0, dims[0]) if dims[0] is not None else torch.randn(2, 4, 5, 5)
    b = torch.randn(3, 2, 4, 5, 5).movedim(0, dims[1]) if dims[1] is not None else torch.randn(2, 4, 5, 5)
    actual = torch.vmap(xcos_ext.grid_cosine, in_dims=dims)(a, b)
    expected = torch.vmap(reference.grid_cosine, in_dims=dims)(a, b)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "attention_shape, dim",
    [((5, 5), None), ((2, 5, 5), None), ((3, 5, 5), 0), ((3, 2, 5, 5), 0), ((2, 5, 3, 5), 2)],
)
@pytest.mark.parametrize("maps", [False, True])
def test_vmap_xcos_score(attention_shape, dim, maps):
    a, b = torch.randn(3, 2, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    attention = torch.randn(attention_shape)

    def run(op):
        def one(a, b, w):
            out = op(a, b, w, logits=True, return_maps=maps)
            return tuple(out) if maps else out

        return torch.vmap(one, in_dims=(0, 1, dim))(a, b, attention)

    actual, expected = run(xcos_ext.xcos_score), run(reference.xcos_score)
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("error::UserWarning")  # a missing batching rule only warns
@pytest.mark.parametrize("attention_shape, dim", [(None, None), ((5, 5), None), ((2, 5, 5), None), ((6, 5, 5), 0)])
def test_per_sample_gradients_by_func_grad_and_vmap(attention_shape, dim):
    a, b = torch.randn(6, 2, 4, 5, 5), torch.randn(6, 2, 4, 5, 5)
    attention = "norm" if attention_shape is None else torch.randn(attention_shape)

    def run(op):
        if attention_shape is None:
            one = torch.func.grad(lambda x, y: op(x, y, "norm").square().sum(), argnums=(0, 1))
            return torch.vmap(one)(a, b)
        one = torch.func.grad(lambda x, y, w: op(x, y, w, logits=True).square().sum(), argnums=(0, 1, 2))
        return torch.vmap(one, in_dims=(0, 0, dim))(a, b, attention)

    torch.testing.assert_close(run(xcos_ext.xcos_score), run(reference.xcos_score), rtol=1e-4, atol=1e-6)


def test_autocast_promotes_mixed_maps_and_keeps_half(device):
    half = torch.bfloat16 if device == "cpu" else torch.float16
    a, b = feature_maps((4, 32, 7, 7), torch.float32, "contiguous", device)
    narrow = b.to(half).requires_grad_()
    with pytest.raises(RuntimeError, match="b: expected dtype"):
        xcos_ext.xcos_score(a, narrow)
    a.requires_grad_()
    with torch.autocast(device, dtype=half):
        score = xcos_ext.xcos_score(a, narrow)
        raw = torch.ops.xcos_ext.xcos_score(a, narrow, None, 0, 1.0, 1e-6)
        assert xcos_ext.xcos_score(narrow, narrow).dtype == torch.float32
        grid = xcos_ext.grid_cosine(a, narrow)
    assert score.dtype == torch.float32 and torch.equal(score, raw)
    expected = reference.xcos_score(a.detach().double(), narrow.detach().double())
    assert_forward_close(score.detach(), expected, torch.float32)
    (score.sum() + raw.sum() + grid.sum()).backward()
    assert a.grad.dtype == torch.float32 and narrow.grad.dtype == half


def test_training_under_autocast_with_a_convolution(device):
    conv = torch.nn.Conv2d(8, 32, 1).to(device)
    x, y = torch.randn(2, 8, 7, 7, device=device), torch.randn(2, 8, 7, 7, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        score = xcos_ext.xcos_score(conv(x), conv(y), "norm")
    score.sum().backward()
    assert score.dtype == torch.float32 and conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "transposed"])
def test_fake_outputs_look_like_real_ones(fake_device, layout):
    """Forward and backward operators; autograd itself cannot record fake CUDA tensors on a torch without CUDA."""
    s = sample((3, 8, 3, 5), torch.float16, layout, "logits")

    def run(a, b, attention):
        maps = xcos_ext.xcos_score(a, b, attention, logits=True, return_maps=True)
        backward = torch.ops.xcos_ext.xcos_score_backward
        return *maps, *backward(*maps, a, b, attention, 3, 1.0, 1e-6, True, True, True)

    real = run(s.a, s.b, s.attention)
    with FakeTensorMode():
        fake = run(
            *(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=fake_device) for t in differentiable(s))
        )
    for one, other in zip(fake, real, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()
        assert one.device.type == fake_device


def test_torch_operator_without_the_python_wrapper_is_differentiable(device):
    s = leaves(sample((3, 8, 3, 5), torch.float64, "contiguous", "logits", device))
    wide = leaves(s)
    torch.ops.xcos_ext.xcos_score(*raw_arguments(s, "logits")).sum().backward()
    reference.xcos_score(wide.a, wide.b, wide.attention, logits=True, temperature=0.9).sum().backward()
    for one, other in zip(differentiable(s), differentiable(wide), strict=True):
        assert_gradient_close(one.grad, other.grad, torch.float64)
