"""What design promises beyond values: edge inputs, NaN, determinism, bounded results, no hidden memory."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_gradient_close
from samples import DTYPES, MODES, differentiable, feature_maps, leaves, sample

import xcos_ext
from xcos_ext import reference


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch_gives_empty_results(mode, device):
    s = leaves(sample((0, 32, 7, 7), torch.float32, "contiguous", mode, device))
    maps = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=s.logits, return_maps=True)
    assert maps.score.shape == (0,) and maps.similarity.shape == (0, 7, 7) and maps.attention.shape == (0, 7, 7)
    sum(t.sum() for t in maps).backward()
    for t in differentiable(s):
        assert t.grad is not None and t.grad.shape == t.shape
        assert (t.grad == 0).all()
    assert xcos_ext.grid_cosine(s.a, s.b).shape == (0, 7, 7)


@pytest.mark.parametrize("eps", [1e-60, 1e-30, 1e-6, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_cells_have_cosine_and_gradient_zero(dtype, eps, device):
    a, b = feature_maps((4, 32, 7, 7), dtype, "contiguous", device)
    a[:, :, 2, 3] = 0
    b[:, :, 4, 1] = 0
    a[:, :, 6, 6] = 0
    b[:, :, 6, 6] = 0
    a.requires_grad_(), b.requires_grad_()
    s = xcos_ext.grid_cosine(a, b, eps=eps)
    for cell in ((2, 3), (4, 1), (6, 6)):
        assert (s[:, cell[0], cell[1]] == 0).all()
    s.sum().backward()
    assert (a.grad[:, :, 2, 3] == 0).all() and (b.grad[:, :, 4, 1] == 0).all()
    assert (a.grad[:, :, 6, 6] == 0).all() and (b.grad[:, :, 6, 6] == 0).all()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_norm_attention_of_a_pair_without_signal_is_uniform(device):
    a, b = feature_maps((3, 32, 7, 7), torch.float32, "contiguous", device)
    a[1] = 0
    a.requires_grad_()
    maps = xcos_ext.xcos_score(a, b, "norm", return_maps=True)
    torch.testing.assert_close(maps.attention[1], torch.full((7, 7), 1 / 49, device=device))
    assert maps.score[1] == 0
    (maps.score.sum() + maps.attention.square().sum()).backward()
    assert a.grad.isfinite().all() and (a.grad[1] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_pair(mode, bad, device):
    s = sample((5, 32, 7, 7), torch.float32, "contiguous", mode, device)
    clean = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=s.logits)
    a = s.a.clone()
    a[2, 5, 3, 3] = bad
    a.requires_grad_()
    maps = xcos_ext.xcos_score(a, s.b, s.attention, logits=s.logits, return_maps=True)
    others = [0, 1, 3, 4]
    assert maps.score[2].isnan() and maps.similarity[2, 3, 3].isnan()
    assert torch.equal(maps.score[others], clean[others])
    assert maps.similarity[2].isnan().sum() == 1, "and in its cell of S"
    maps.score.sum().backward()
    assert a.grad[others].isfinite().all() and a.grad[2].isnan().any()


@pytest.mark.parametrize("long", ["a", "b", "both"])
def test_a_cell_whose_norm_overflows(long, device):
    """README and docs/design.md state it: S is 0, or NaN if both are so long; norm attention and templates are NaN."""
    a, b = feature_maps((3, 32, 7, 7), torch.float32, "contiguous", device)
    for side, map_ in (("a", a), ("b", b)):
        if long in (side, "both"):
            map_[1, :, 2, 3] = 1e20
    given = torch.full((7, 7), 1 / 49, device=device)
    head = xcos_ext.XCosHead(32, 32, projection="none").eval().to(device)
    with torch.no_grad():
        parameters = head.attention.head_parameters()
        sides = head.templates(a), head.templates(b, role="gallery")
        for ours in (xcos_ext, reference):
            maps = [ours.xcos_score(a, b, w, return_maps=True) for w in (None, given, "norm")]
            maps.append(ours.xcos_head(a, b, parameters, return_maps=True))
            similarities = [m.similarity for m in maps] + [ours.grid_cosine(a, b), ours.grid_match(a, b, radius=0)]
            for s in similarities:
                assert s[1, 2, 3].isnan() if long == "both" else s[1, 2, 3] == 0
                assert s.isnan().sum() == (long == "both")
            assert [bool(m.score[1].isnan()) for m in maps] == [long == "both"] * 2 + [True, long == "both"]
            pairs = ours.xcos_matrix(*sides).isnan()
            assert pairs[1].all() == (long != "b") and pairs[:, 1].all() == (long != "a")
            assert not pairs[[0, 2]][:, [0, 2]].any()


@pytest.mark.parametrize("where", ["logits", "weights"])
def test_nan_in_the_attention_reaches_its_pair_only(where, device):
    s = sample((3, 32, 7, 7), torch.float32, "contiguous", where, device)
    for position in ((0, 0), (3, 3), (6, 6)):
        attention = s.attention.clone()
        attention[(1, *position)] = float("nan")
        score = xcos_ext.xcos_score(s.a, s.b, attention, logits=s.logits)
        assert score[1].isnan() and score[[0, 2]].isfinite().all()


def test_all_cells_masked_gives_nan_as_in_torch(device):
    s = sample((2, 32, 7, 7), torch.float32, "contiguous", "logits", device)
    logits = torch.full_like(s.attention, -torch.inf)
    assert xcos_ext.xcos_score(s.a, s.b, logits, logits=True).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_cosine_is_bounded(dtype, scale, device):
    a, _ = feature_maps((64, 32, 7, 7), dtype, "contiguous", device)
    a = (a.double() * scale).clamp(-6e4, 6e4).to(dtype)
    for sign in (1, -1):
        s = xcos_ext.grid_cosine(a, sign * a)
        assert (s.abs() <= 1 + 1e-6).all()
        torch.testing.assert_close(s, torch.full_like(s, sign), rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_deterministic_run_to_run_and_over_thread_counts(mode, device):
    s = leaves(sample((67, 32, 7, 7), torch.float32, "contiguous", mode, device))

    def run():
        score = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=s.logits)
        return [score.detach(), *torch.autograd.grad(score.sum(), differentiable(s))]

    threads = torch.get_num_threads()
    try:
        first = run()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for one, other in zip(first, run(), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


def test_a_pair_scores_the_same_alone_and_in_a_batch(device):
    s = sample((33, 32, 7, 7), torch.float32, "contiguous", "logits", device)
    together = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=True)
    for i in (0, 7, 32):
        alone = xcos_ext.xcos_score(s.a[i : i + 1], s.b[i : i + 1], s.attention[i : i + 1], logits=True)
        assert torch.equal(alone[0], together[i])


def test_more_elements_than_an_int_can_count():
    """2^31 elements and more, without the memory: one face against itself, expanded."""
    n = 2**31 // (32 * 49) + 100
    face = torch.randn(1, 32, 7, 7)
    score = xcos_ext.xcos_score(face.expand(n, -1, -1, -1), face.expand(n, -1, -1, -1))
    assert score.shape == (n,)
    torch.testing.assert_close(score[[0, n // 2, n - 1]], torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_more_elements_than_an_int_can_count_in_memory():
    """The same with real memory: half precision, 4 GiB a map."""
    n = 2**31 // (32 * 49) + 10
    a = torch.empty((n, 32, 7, 7), dtype=torch.bfloat16)
    a[:] = torch.randn(1, 32, 7, 7).bfloat16()
    a[-1] = -a[-1]
    score = xcos_ext.xcos_score(a, a[:1].expand(n, -1, -1, -1))
    torch.testing.assert_close(score[[0, n // 2, n - 1]], torch.tensor([1.0, 1.0, -1.0]), rtol=0, atol=1e-5)


def test_nothing_but_the_outputs_is_allocated():
    """Every layout that kernels read in place: contiguous, channels_last, expanded, sliced, mixed."""
    for layout in ("contiguous", "channels_last", "mixed", "expanded", "sliced"):
        s = leaves(sample((256, 32, 7, 7), torch.float32, layout, "logits"))
        assert _allocated(lambda s=s: xcos_ext.xcos_score(s.a, s.b, s.attention, logits=True)) == 256 * 4
        score = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=True)
        tensors, seed = differentiable(s), torch.ones(256)
        used = _allocated(lambda y=score, x=tensors, g=seed: torch.autograd.grad(y, x, g, retain_graph=True))
        assert used == sum(t.numel() * 4 for t in tensors), "the gradients alone"


def _allocated(function) -> int:
    """Bytes that torch's CPU allocator hands out during the call."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        keep = function()
    total = sum(
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    )
    del keep
    return total


def test_tiny_norms_below_eps_are_clamped(device):
    a, b = feature_maps((2, 8, 3, 3), torch.float64, "contiguous", device)
    a, b = (a * 1e-9).requires_grad_(), b.requires_grad_()
    wide_a, wide_b = a.detach().requires_grad_(), b.detach().requires_grad_()
    out, expected = xcos_ext.grid_cosine(a, b), reference.grid_cosine(wide_a, wide_b)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)
    out.sum().backward()
    expected.sum().backward()
    assert_gradient_close(a.grad, wide_a.grad, torch.float64)
    assert_gradient_close(b.grad, wide_b.grad, torch.float64)


@pytest.mark.cuda
def test_cuda_graph_capture_and_side_streams():
    """No synchronisation, no allocation outside torch: the operators can be captured and replayed."""
    s = sample((64, 32, 7, 7), torch.float16, "contiguous", "logits", "cuda")
    expected = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        xcos_ext.xcos_score(s.a, s.b, s.attention, logits=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = xcos_ext.xcos_score(s.a, s.b, s.attention, logits=True)
    s.a.copy_(s.b)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured, expected)
    torch.testing.assert_close(captured, torch.ones_like(captured), rtol=0, atol=1e-5)


@pytest.mark.cuda
def test_no_synchronisation_on_cuda():
    s = leaves(sample((64, 32, 7, 7), torch.float16, "contiguous", "logits", "cuda"))
    xcos_ext.xcos_score(s.a, s.b, s.attention, logits=True).sum().backward()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        xcos_ext.xcos_score(s.a, s.b, s.attention, logits=True).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
