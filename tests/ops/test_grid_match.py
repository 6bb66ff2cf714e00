"""grid_match against the reference: both kinds of match, values, choices, gradients, layouts, contracts, errors."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_forward_close, assert_gradient_close
from samples import DTYPES, GRADIENT_SHAPES, LAYOUTS, SHAPES, feature_maps
from torch._subclasses.fake_tensor import FakeTensorMode

import xcos_ext
from xcos_ext import reference

MATCHES = ("best", "soft")
T = 0.2  # wide enough for several neighbours to count
MATCHED = {"best": {"match": "best"}, "soft": {"match": "soft", "temperature": T}}

# Radii beyond the smallest grids among them, and more channels than a frame holds at a time.
RADII = {(1, 512, 7, 7): (1,), (2, 3, 33, 31): (2,), (2, 8, 12, 14): (1, 4)}


def radii(shape):
    return RADII.get(shape, (1, 2, 7))


def cases(shapes):
    return [pytest.param(shape, radius, id=f"{shape}-r{radius}") for shape in shapes for radius in radii(shape)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("shape, radius", cases(SHAPES))
def test_matches_the_reference(shape, radius, match, layout, dtype, device):
    a, b = feature_maps(shape, dtype, layout, device)
    for symmetric in (False, True):
        options = {"radius": radius, "symmetric": symmetric, **MATCHED[match]}
        actual = xcos_ext.grid_match(a, b, **options)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert actual.is_contiguous()
        assert_forward_close(actual, reference.grid_match(a.double(), b.double(), **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("shape, radius", cases(GRADIENT_SHAPES))
def test_gradient_matches_the_reference(shape, radius, match, layout, dtype, device):
    a, b = feature_maps(shape, dtype, layout, device)
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    wide_a, wide_b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    grad = torch.randn(shape[0], *shape[2:], dtype=torch.float64, device=device)
    for symmetric in (False, True):
        options = {"radius": radius, "symmetric": symmetric, **MATCHED[match]}
        out = xcos_ext.grid_match(a, b, **options)
        actual = torch.autograd.grad(out, (a, b), grad.to(out.dtype))
        expected = torch.autograd.grad(reference.grid_match(wide_a, wide_b, **options), (wide_a, wide_b), grad)
        for one, other, map_ in zip(actual, expected, (a, b), strict=True):
            assert one.dtype == dtype
            if layout in ("contiguous", "channels_last"):
                assert one.stride() == map_.stride()
            assert_gradient_close(one, other, dtype)


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradcheck(match, symmetric, device):
    a, b = (t.requires_grad_() for t in feature_maps((3, 5, 2, 3), torch.float64, "contiguous", device))
    options = {"radius": 1, "symmetric": symmetric, **MATCHED[match]}
    assert torch.autograd.gradcheck(lambda x, y: xcos_ext.grid_match(x, y, **options), (a, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("match", MATCHES)
def test_radius_0_is_grid_cosine_to_the_bit(match, dtype, device):
    a, b = (t.requires_grad_() for t in feature_maps((5, 32, 7, 7), dtype, "contiguous", device))
    one, other = xcos_ext.grid_match(a, b, radius=0, match=match), xcos_ext.grid_cosine(a, b)
    assert torch.equal(one, other)
    for x, y in zip(torch.autograd.grad(one.sum(), (a, b)), torch.autograd.grad(other.sum(), (a, b)), strict=True):
        assert torch.equal(x, y)
    if match == "best":
        assert (xcos_ext.grid_match(a, b, radius=0, return_offsets=True).offsets == 0).all()


@pytest.mark.parametrize("match", MATCHES)
def test_symmetric_matching_does_not_care_which_face_comes_first(match, device):
    a, b = feature_maps((6, 32, 7, 7), torch.float32, "contiguous", device)
    one, other = (xcos_ext.grid_match(x, y, radius=2, match=match) for x, y in ((a, b), (b, a)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    forth = xcos_ext.grid_match(a, b, radius=2, match=match, symmetric=False)
    back = xcos_ext.grid_match(b, a, radius=2, match=match, symmetric=False)
    torch.testing.assert_close((forth + back) / 2, one, rtol=0, atol=1e-6)
    assert not torch.allclose(forth, back)


def test_more_freedom_never_lowers_the_best(device):
    a, b = feature_maps((6, 32, 7, 7), torch.float32, "contiguous", device)
    last = xcos_ext.grid_cosine(a, b)
    for radius in range(1, 8):
        now = xcos_ext.grid_match(a, b, radius=radius)
        assert (now >= last - 1e-6).all()
        last = now


def test_temperature_leads_from_the_mean_to_the_best(device):
    a, b = feature_maps((4, 32, 7, 7), torch.float64, "contiguous", device)
    soft = {t: xcos_ext.grid_match(a, b, match="soft", temperature=t, symmetric=False) for t in (1e-4, 1e4, 1e-60)}
    best = xcos_ext.grid_match(a, b, symmetric=False)
    torch.testing.assert_close(soft[1e-4], best, rtol=0, atol=1e-3)
    torch.testing.assert_close(soft[1e-60], best, rtol=0, atol=1e-12)
    candidates = reference._candidates(a, b, 1, 1e-6)
    inside = candidates > -torch.inf
    mean = torch.where(inside, candidates, 0.0).sum(1) / inside.sum(1)
    torch.testing.assert_close(soft[1e4], mean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_offsets_lead_to_the_best_neighbour(symmetric, layout, device):
    a, b = feature_maps((3, 17, 3, 5), torch.float32, layout, device)
    found = xcos_ext.grid_match(a, b, radius=2, symmetric=symmetric, return_offsets=True)
    expected = reference.grid_match(a, b, radius=2, symmetric=symmetric, return_offsets=True)
    assert found.offsets.dtype == torch.int8 and found.offsets.shape == (3, 2 if symmetric else 1, 2, 3, 5)
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.similarity, xcos_ext.grid_match(a, b, radius=2, symmetric=symmetric))


def test_a_shifted_face_is_found_where_it_went(device):
    """All cells that are still in the picture have cosine 1, and say by how much the face moved."""
    a = torch.randn(2, 32, 7, 7, device=device)
    b = torch.roll(a, (1, -2), (2, 3))  # content goes down one row and left two columns
    found = xcos_ext.grid_match(a, b, radius=2, symmetric=True, return_offsets=True)
    forth, back = found.offsets.unbind(1)
    assert (forth[:, 0, :6, 2:] == 1).all() and (forth[:, 1, :6, 2:] == -2).all()
    assert (back[:, 0, 1:, :5] == -1).all() and (back[:, 1, 1:, :5] == 2).all()
    one_way = xcos_ext.grid_match(a, b, radius=2, symmetric=False)[:, :6, 2:]
    torch.testing.assert_close(one_way, torch.ones_like(one_way), rtol=0, atol=1e-5)
    assert xcos_ext.grid_cosine(a, b).abs().mean() < 0.3


@pytest.mark.parametrize("size", [(3, 3), (1, 4), (5, 2)])
def test_the_first_of_equal_neighbours_is_chosen(size, device):
    """All cells alike: the neighbour up and left, as far as the grid goes, and the gradient is its alone."""
    a = torch.ones(1, 4, *size, device=device)
    found = xcos_ext.grid_match(a, a.clone(), radius=1, symmetric=True, return_offsets=True)
    expected = reference.grid_match(a, a, radius=1, symmetric=True, return_offsets=True)
    assert torch.equal(found.offsets, expected.offsets)
    rows = torch.arange(size[0], device=device)[:, None].expand(size)
    columns = torch.arange(size[1], device=device).expand(size)
    for direction in (0, 1):
        assert torch.equal(found.offsets[0, direction, 0], -(rows > 0).to(torch.int8))
        assert torch.equal(found.offsets[0, direction, 1], -(columns > 0).to(torch.int8))


@pytest.mark.parametrize("match", MATCHES)
def test_one_cell_has_only_itself(match, device):
    a, b = feature_maps((4, 8, 1, 1), torch.float64, "contiguous", device)
    actual = xcos_ext.grid_match(a, b, radius=7, match=match)
    torch.testing.assert_close(actual, xcos_ext.grid_cosine(a, b), rtol=0, atol=1e-14)


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("radius", [0, 1])
def test_empty_batch(match, radius, device):
    a = torch.zeros(0, 32, 7, 7, device=device, requires_grad=True)
    s = xcos_ext.grid_match(a, a, radius=radius, match=match)
    assert s.shape == (0, 7, 7)
    s.sum().backward()
    assert a.grad.shape == a.shape
    assert xcos_ext.grid_match(a, a, radius=radius, return_offsets=True).offsets.shape == (0, 2, 2, 7, 7)


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("eps", [1e-60, 1e-30, 1e-6, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_cells_have_cosine_and_gradient_zero(dtype, eps, match, device):
    a, b = feature_maps((4, 32, 7, 7), dtype, "contiguous", device)
    a[:, :, 2, 3] = 0
    b[:, :, 4, 1] = 0
    a[3] = b[3] = 0
    a.requires_grad_(), b.requires_grad_()
    s = xcos_ext.grid_match(a, b, match=match, symmetric=False, eps=eps)
    assert (s[:, 2, 3] == 0).all() and (s[3] == 0).all()
    xcos_ext.grid_match(a, b, match=match, eps=eps).sum().backward()
    assert (a.grad[:, :, 2, 3] == 0).all() and (b.grad[:, :, 4, 1] == 0).all()
    assert (a.grad[3] == 0).all() and (b.grad[3] == 0).all()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_tiny_norms_below_eps_are_clamped(device):
    a, b = feature_maps((2, 8, 3, 3), torch.float64, "contiguous", device)
    a, b = (a * 1e-9).requires_grad_(), b.requires_grad_()
    wide_a, wide_b = a.detach().requires_grad_(), b.detach().requires_grad_()
    for match in MATCHES:
        out = xcos_ext.grid_match(a, b, match=match)
        expected = reference.grid_match(wide_a, wide_b, match=match)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=0)
        actual = torch.autograd.grad(out.sum(), (a, b))
        for one, other in zip(actual, torch.autograd.grad(expected.sum(), (wide_a, wide_b)), strict=True):
            assert_gradient_close(one, other, torch.float64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_reaches_its_neighbourhood_only(layout, match, bad, device):
    a, b = feature_maps((5, 32, 7, 7), torch.float32, layout, device)
    clean = xcos_ext.grid_match(a, b, match=match)
    a = a.clone()
    a[2, 5, 3, 3] = bad
    a.requires_grad_()
    s = xcos_ext.grid_match(a, b, match=match)
    others = [0, 1, 3, 4]
    assert torch.equal(s[others], clean[others])
    near = torch.zeros(7, 7, dtype=torch.bool, device=device)
    near[2:5, 2:5] = True
    assert torch.equal(s[2].isnan(), near)
    assert torch.equal(s[2][~near], clean[2][~near])
    s.sum().backward()
    assert a.grad[others].isfinite().all() and a.grad[2].isnan().any()


@pytest.mark.parametrize("match", MATCHES)
def test_deterministic_run_to_run_over_thread_counts_and_alone(match, device):
    a, b = (t.requires_grad_() for t in feature_maps((67, 32, 7, 7), torch.float32, "contiguous", device))

    def run(x=a, y=b):
        s = xcos_ext.grid_match(x, y, match=match)
        return [s.detach(), *torch.autograd.grad(s.sum(), (x, y))]

    threads = torch.get_num_threads()
    try:
        first = run()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for one, other in zip(first, run(), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)
    for i in (0, 7, 66):
        for one, other in zip(run(a[i : i + 1], b[i : i + 1]), first, strict=True):
            assert torch.equal(one[0], other[i])


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("shape", [(2, 32, 7, 7), (2, 70, 3, 3)])
def test_only_the_wanted_gradient_is_computed(wanted, shape, device):
    a, b = feature_maps(shape, torch.float32, "contiguous", device)
    both = [t.clone().requires_grad_() for t in (a, b)]
    expected = torch.autograd.grad(xcos_ext.grid_match(*both).sum(), both)
    a.requires_grad_(wanted[0]), b.requires_grad_(wanted[1])
    xcos_ext.grid_match(a, b).sum().backward()
    for t, grad, need in zip((a, b), expected, wanted, strict=True):
        assert (t.grad is not None) == need
        assert not need or torch.equal(t.grad, grad)


def test_nothing_but_the_outputs_is_allocated():
    from test_contracts import _allocated

    for layout in ("contiguous", "channels_last", "mixed", "expanded", "sliced"):
        a, b = feature_maps((64, 32, 7, 7), torch.float32, layout)
        assert _allocated(lambda a=a, b=b: xcos_ext.grid_match(a, b, radius=2)) == 64 * 49 * 4
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        s, seed = xcos_ext.grid_match(a, b, radius=2, match="soft"), torch.ones(64, 7, 7)
        used = _allocated(lambda s=s, a=a, b=b, g=seed: torch.autograd.grad(s, (a, b), g, retain_graph=True))
        assert used == (a.numel() + b.numel()) * 4, "the gradients alone"


# --- inside torch's machinery


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("match", [0, 1])
def test_opcheck(layout, match, device):
    a, b = feature_maps((3, 8, 3, 5), torch.float32, layout, device)
    leaves = a.detach().requires_grad_(), b.detach().requires_grad_()
    for radius in (0, 1):
        options = (radius, match, T, True, 1e-6)
        torch.library.opcheck(torch.ops.xcos_ext.grid_match.default, (*leaves, *options))
        if match == 0:
            torch.library.opcheck(torch.ops.xcos_ext.grid_match.offsets, (*leaves, *options))
        for need in (True, False):
            torch.library.opcheck(
                torch.ops.xcos_ext.grid_match_backward.default,
                (torch.randn(3, 3, 5, device=device), a, b, *options, need, True),
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "transposed"])
def test_fake_outputs_look_like_real_ones(fake_device, layout):
    a, b = feature_maps((3, 8, 3, 5), torch.float16, layout)

    def run(a, b):
        found = xcos_ext.grid_match(a, b, return_offsets=True)
        backward = torch.ops.xcos_ext.grid_match_backward
        return *found, *backward(found.similarity, a, b, 1, 0, T, True, 1e-6, True, True)

    real = run(a, b)
    with FakeTensorMode():
        fake = run(*(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=fake_device) for t in (a, b)))
    for one, other in zip(fake, real, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()
        assert one.device.type == fake_device


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_with_gradients(dynamic, device):
    a, b = (t.requires_grad_() for t in feature_maps((4, 8, 3, 5), torch.float32, "contiguous", device))

    def loss(a, b):
        s = xcos_ext.grid_match(a * 2, b, match="soft")
        return s.square().sum() + xcos_ext.xcos_score(a, b, "norm", radius=1).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = torch.autograd.grad(loss(a, b), (a, b))
    for one, other in zip(torch.autograd.grad(compiled(a, b), (a, b)), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dims", [(0, 0), (1, None), (None, 2)])
def test_vmap(dims):
    a = torch.randn(3, 2, 4, 5, 5).movedim(0, dims[0]) if dims[0] is not None else torch.randn(2, 4, 5, 5)
    b = torch.randn(3, 2, 4, 5, 5).movedim(0, dims[1]) if dims[1] is not None else torch.randn(2, 4, 5, 5)
    for options in ({"match": "soft"}, {"return_offsets": True}):
        actual = torch.vmap(lambda x, y, o=options: tuple(xcos_ext.grid_match(x, y, **o)), in_dims=dims)(a, b)
        expected = torch.vmap(lambda x, y, o=options: tuple(reference.grid_match(x, y, **o)), in_dims=dims)(a, b)
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("error::UserWarning")  # a missing batching rule only warns
def test_per_sample_gradients_by_func_grad_and_vmap():
    a, b = torch.randn(6, 2, 4, 5, 5), torch.randn(6, 2, 4, 5, 5)

    def run(op):
        return torch.vmap(torch.func.grad(lambda x, y: op(x, y).square().sum(), argnums=(0, 1)))(a, b)

    torch.testing.assert_close(run(xcos_ext.grid_match), run(reference.grid_match), rtol=1e-4, atol=1e-6)


def test_autocast_promotes_mixed_maps_and_keeps_half(device):
    half = torch.bfloat16 if device == "cpu" else torch.float16
    a, b = feature_maps((4, 32, 7, 7), torch.float32, "contiguous", device)
    narrow = b.to(half).requires_grad_()
    with pytest.raises(RuntimeError, match="b: expected dtype"):
        xcos_ext.grid_match(a, narrow)
    a.requires_grad_()
    with torch.autocast(device, dtype=half):
        s = xcos_ext.grid_match(a, narrow)
        raw = torch.ops.xcos_ext.grid_match(a, narrow, 1, 0, T, True, 1e-6)
    assert s.dtype == torch.float32 and torch.equal(s, raw)
    (s.sum() + raw.sum()).backward()
    assert a.grad.dtype == torch.float32 and narrow.grad.dtype == half


# --- bad input

A, F32, I64 = (4, 32, 7, 7), torch.float32, torch.int64
BAD = {
    "rank": ([((32, 7, 7), F32), (A, F32)], {}, "a: expected a feature map [N, C, H, W], got shape [32, 7, 7]"),
    "W": ([(A, F32), ((4, 32, 7, 8), F32)], {}, "b: expected shape [4, 32, 7, 7] like a, got [4, 32, 7, 8]"),
    "dtype": ([(A, I64)] * 2, {}, "a: expected dtype float16, bfloat16, float32 or float64, got int64"),
    "negative radius": ([(A, F32)] * 2, {"radius": -1}, "radius: expected 0 to 7, got -1"),
    "large radius": ([(A, F32)] * 2, {"radius": 8}, "radius: expected 0 to 7, got 8"),
    "temperature": (
        [(A, F32)] * 2,
        {"match": "soft", "temperature": 0.0},
        "temperature: expected a finite number above 0, got 0",
    ),
    "eps": ([(A, F32)] * 2, {"eps": float("nan")}, "eps: expected a finite number above 0, got nan"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("fake_device", [None, "cpu", "cuda"])
def test_kernels_and_fake_kernels_name_what_is_wrong(case, fake_device):
    specs, options, message = BAD[case]

    def run():
        return xcos_ext.grid_match(*(torch.zeros(s, dtype=d, device=fake_device or "cpu") for s, d in specs), **options)

    with pytest.raises(RuntimeError) as error:
        if fake_device is None:
            run()
        else:
            with FakeTensorMode():
                run()
    assert f"grid_match: {message}" in str(error.value)


def test_raw_operators_check_their_arguments():
    a = torch.zeros(A)
    with pytest.raises(RuntimeError, match=r"grid_match: match: expected 0 \(best\) or 1 \(soft\), got 2"):
        torch.ops.xcos_ext.grid_match(a, a, 1, 2, T, True, 1e-6)
    with pytest.raises(RuntimeError, match=r"grid_match: match: expected 0 \(best\) with offsets, got 1"):
        torch.ops.xcos_ext.grid_match.offsets(a, a, 1, 1, T, True, 1e-6)
    with pytest.raises(RuntimeError, match=r"grad_similarity: expected shape \[4, 7, 7\], got \[4, 7\]"):
        torch.ops.xcos_ext.grid_match_backward(torch.zeros(4, 7), a, a, 1, 0, T, True, 1e-6, True, True)


def test_arguments_of_the_wrong_kind():
    a = torch.zeros(A)
    with pytest.raises(TypeError, match=r"grid_match: b: expected a torch.Tensor, got ndarray"):
        xcos_ext.grid_match(a, a.numpy())
    with pytest.raises(TypeError, match="radius: expected an integer, got float"):
        xcos_ext.grid_match(a, a, radius=1.0)
    with pytest.raises(TypeError, match="radius: expected a number, got a tensor"):
        xcos_ext.grid_match(a, a, radius=torch.tensor(1))
    with pytest.raises(TypeError, match="temperature: expected a number, got a tensor"):
        xcos_ext.grid_match(a, a, temperature=torch.tensor(0.1))
    with pytest.raises(RuntimeError, match=r"temperature: expected the default with match='best', .* got 0.5"):
        xcos_ext.grid_match(a, a, temperature=0.5)
    with pytest.raises(TypeError, match="temperature: expected a number, got NoneType"):
        xcos_ext.grid_match(a, a, temperature=None)
    with pytest.raises(RuntimeError, match="match: expected 'best' or 'soft', got 'worst'"):
        xcos_ext.grid_match(a, a, match="worst")
    with pytest.raises(RuntimeError, match="return_offsets: expected False with match='soft'"):
        xcos_ext.grid_match(a, a, match="soft", return_offsets=True)


@pytest.mark.parametrize("match", MATCHES)
def test_double_backward_is_refused_clearly(match, device):
    a = torch.randn(A, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(
        xcos_ext.grid_match(a, torch.randn(A, device=device), match=match).sum(), a, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"grid_match: double backward is not implemented; xcos_ext.reference"):
        (grad.square().sum() + a.sum()).backward()
