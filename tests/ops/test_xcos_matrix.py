"""xcos_matrix against the eager head and the reference: values, gradients, shapes, bad faces, bad requests."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closeness import assert_gradient_close
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES
from template_samples import (
    EAGER_ATOL,
    F64,
    KINDS,
    PAIRS_ATOL,
    PAIRS_MEAN,
    eager,
    features,
    head,
    leaves,
    random_parameters,
    random_templates,
    real_features,
    sides,
)

import xcos_ext
from xcos_ext import reference
from xcos_ext.ops.templates import Templates, result_dtype

pytestmark = pytest.mark.usefixtures("one_thread")


IMPLEMENTATIONS = {"operator": xcos_ext.xcos_matrix, "reference": reference.xcos_matrix}

# Alone, around the widths of vectors and of tiles, and more than one block of each.
COUNTS = ((1, 1), (1, 17), (17, 1), (2, 3), (7, 9), (15, 16), (16, 33), (5, 65), (33, 31), (4, 257))


def exact(p: Templates, g: Templates, attention: torch.Tensor | str = "own") -> torch.Tensor:
    """The reference in fp64 on the stored values."""
    if isinstance(attention, torch.Tensor):
        attention = attention.double()
    return reference.xcos_matrix(p.to(F64), g.to(F64), attention)


def assert_scores(
    actual: torch.Tensor, p: Templates, g: Templates, attention: torch.Tensor | str = "own", factor: float = 1.0
) -> None:
    assert actual.shape == (len(p), len(g)) and actual.dtype == result_dtype(p.dtype)
    expected = exact(p, g, attention)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=PAIRS_ATOL[p.dtype] * factor, equal_nan=True)
    if actual.numel() >= 256 and p.features.shape[1] * p.channels >= 256:  # enough terms for their errors to cancel
        mean = (actual - expected).abs().nanmean().item()
        assert mean <= PAIRS_MEAN[p.dtype] * factor, f"mean error {mean:.3g}"


class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_the_eager_head_pair_by_pair(self, name: str, kind: str, dtype: torch.dtype, device: str) -> None:
        net = head(kind)
        a, b = features(5), features(7)
        b[3] = a[2]
        with torch.no_grad():
            p, g = net.templates(a, dtype=dtype).to(device), net.templates(b, "gallery", dtype).to(device)
            scores = IMPLEMENTATIONS[name](p, g)
            torch.testing.assert_close(scores.double().cpu(), eager(net, a, b), rtol=0, atol=EAGER_ATOL[dtype])

    @pytest.mark.thorough
    @pytest.mark.real_data
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_real_faces(self, shared_data, dtype: torch.dtype, device: str) -> None:
        net, grid = real_features(shared_data, 160)
        a, b = grid[:40], grid[20:]
        with torch.no_grad():
            p, g = net.templates(a, dtype=dtype).to(device), net.templates(b, "gallery", dtype).to(device)
            scores = xcos_ext.xcos_matrix(p, g)
            expected = eager(net, a, b)
        assert expected.std() > 0.01
        torch.testing.assert_close(scores.double().cpu(), expected, rtol=0, atol=EAGER_ATOL[dtype])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", ["uniform", "norm", "map", "maps"])
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_attention_known_beforehand(self, name: str, kind: str, dtype: torch.dtype, device: str) -> None:
        a, b = features(6), features(9)
        a[1], b[2, :, 3:] = 0, 0
        p, g = Templates.from_features(a, dtype).to(device), Templates.from_features(b, dtype).to(device)
        weights = torch.rand(6, 7, 7, dtype=F64, device=device) / 49
        attention = {"map": weights[0], "maps": weights}.get(kind, kind)
        scores = IMPLEMENTATIONS[name](p, g, attention)
        assert scores.dtype == result_dtype(dtype)
        given = {"uniform": None, "map": weights[0].cpu(), "maps": weights.repeat_interleave(9, 0).cpu()}
        expected = xcos_ext.xcos_score(a.repeat_interleave(9, 0), b.repeat(6, 1, 1, 1), given.get(kind, kind))
        torch.testing.assert_close(scores.double().cpu(), expected.view(6, 9), rtol=0, atol=EAGER_ATOL[dtype])
        assert_scores(scores, p, g, attention)

    @pytest.mark.parametrize("own", ["uniform", "norm"])
    def test_own_attention_may_be_fixed(self, own: str, device: str) -> None:
        p, g = random_templates(3, parameters=own).to(device), random_templates(4, parameters=own).to(device)
        assert torch.equal(xcos_ext.xcos_matrix(p, g), xcos_ext.xcos_matrix(p, g, own))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", ["softmax", "symmetric", "min-shift"])
    @pytest.mark.parametrize("counts", COUNTS, ids=str)
    def test_sizes_that_fill_no_tile(self, counts: tuple[int, int], kind: str, dtype: torch.dtype, device: str) -> None:
        p, g = sides(*counts, kind, dtype=dtype, device=device)
        assert_scores(xcos_ext.xcos_matrix(p, g), p, g)

    @pytest.mark.thorough
    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(
        probes=st.integers(0, 40),
        gallery=st.integers(0, 70),
        channels=st.integers(1, 70),
        hidden=st.integers(1, 35),
        grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        kind=st.sampled_from(sorted(KINDS)),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 999),
    )
    def test_any_shape(
        self,
        probes: int,
        gallery: int,
        channels: int,
        hidden: int,
        grid: tuple[int, int],
        kind: str,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        p, g = sides(probes, gallery, kind, hidden=hidden, dtype=dtype, channels=channels, grid=grid)
        assert_scores(xcos_ext.xcos_matrix(p, g), p, g)

    @pytest.mark.thorough
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        probes=st.integers(0, 40),
        gallery=st.integers(0, 70),
        channels=st.integers(1, 70),
        grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        kind=st.sampled_from(["uniform", "norm", "map", "maps"]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 999),
    )
    def test_any_shape_of_fixed_attention(
        self, probes: int, gallery: int, channels: int, grid: tuple[int, int], kind: str, dtype: torch.dtype, seed: int
    ) -> None:
        torch.manual_seed(seed)
        shape = {"channels": channels, "grid": grid, "dtype": dtype}
        p, g = random_templates(probes, **shape), random_templates(gallery, **shape)
        weights = torch.rand(probes, *grid, dtype=result_dtype(dtype)) / (grid[0] * grid[1])
        shared = torch.rand(grid, dtype=result_dtype(dtype)) / (grid[0] * grid[1])
        attention = {"map": shared, "maps": weights}.get(kind, kind)
        factor = 5 if dtype == torch.bfloat16 else 1  # one cell alone has its half ulp, 2^-8, twice
        assert_scores(xcos_ext.xcos_matrix(p, g, attention), p, g, attention, factor)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shift", [0.0, 300.0, -3e4])
    def test_softmax_of_large_logits(self, shift: float, dtype: torch.dtype, device: str) -> None:
        """What is common to all cells cancels before the exponential; differences of 100 leave one cell."""
        p, g = sides(4, 20, "warm", dtype=dtype)
        p = dataclasses.replace(p, bias=(p.bias * 20).round() + shift)
        p, g = p.to(device), g.to(device)
        # fp32 logits of 3e4 have an ulp of 2e-3.
        assert_scores(xcos_ext.xcos_matrix(p, g), p, g, factor=1e3 if shift < -1e3 else 60 if shift else 10)

    @pytest.mark.parametrize("kind", ["min-shift", "symmetric min-shift"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_min_shift_of_equal_logits_is_uniform(self, kind: str, dtype: torch.dtype, device: str) -> None:
        p, g = sides(3, 18, kind, dtype=dtype)
        flat = dataclasses.replace(p.parameters, weight=torch.zeros_like(p.parameters.weight))
        sides_ = [dataclasses.replace(s, attention=flat, bias=torch.ones_like(s.bias)).to(device) for s in (p, g)]
        scores = xcos_ext.xcos_matrix(*sides_)
        expected = xcos_ext.xcos_matrix(*sides_, "uniform")
        torch.testing.assert_close(scores, expected, rtol=0, atol=PAIRS_ATOL[dtype])

    @pytest.mark.parametrize("kind", ["softmax", "symmetric"])
    def test_one_batch_against_itself(self, kind: str, device: str) -> None:
        net = head(kind)
        x = features(18)
        with torch.no_grad():
            both = net.templates(x, "both").to(device)
            apart = xcos_ext.xcos_matrix(net.templates(x).to(device), net.templates(x, "gallery").to(device))
            scores = xcos_ext.xcos_matrix(both, both)
        torch.testing.assert_close(scores, apart, rtol=0, atol=1e-14)
        torch.testing.assert_close(scores.diagonal(), torch.ones(18, dtype=F64, device=device))
        assert torch.allclose(scores, scores.T, rtol=0, atol=1e-13) == (kind == "symmetric")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", ["softmax", "symmetric"])
    def test_views_are_read_in_place_or_copied_but_never_misread(
        self, kind: str, dtype: torch.dtype, device: str
    ) -> None:
        parameters = random_parameters(kind, dtype=dtype)
        wide = random_templates(40, "both", parameters=parameters, dtype=dtype).to(device)
        p, g = wide[1:38:3].as_probe(), wide[::2].as_gallery()
        plain = [s[torch.arange(len(s))] for s in (p, g)]  # contiguous copies
        expected = xcos_ext.xcos_matrix(*plain)
        assert torch.equal(xcos_ext.xcos_matrix(p, g), expected)  # the same faces: the same bits
        one = dataclasses.replace(
            plain[0][:1], **{n: getattr(plain[0][:1], n).expand(9, *getattr(plain[0], n).shape[1:]) for n in PARTS}
        )
        assert torch.equal(xcos_ext.xcos_matrix(one, g), expected[:1].expand(9, -1))
        turned = dataclasses.replace(
            g,
            features=g.features.transpose(1, 2).contiguous().transpose(1, 2),
            projection=g.projection.transpose(2, 3).contiguous().transpose(2, 3),
        )
        assert torch.equal(xcos_ext.xcos_matrix(p, turned), expected)

    def test_autocast_has_no_effect(self, device: str) -> None:
        p, g = sides(4, 5, dtype=torch.float32, device=device)
        for attention in ("own", "uniform", "norm"):
            expected = xcos_ext.xcos_matrix(p, g, attention)
            with torch.autocast(device, torch.bfloat16):
                assert torch.equal(xcos_ext.xcos_matrix(p, g, attention), expected)


PARTS = ("features", "norms", "projection", "bias")


class TestBadFaces:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("attention", ["own", "norm", "uniform", "maps"])
    @pytest.mark.parametrize("kind", ["softmax", "symmetric", "min-shift"])
    def test_nan_and_infinity_stay_in_their_pairs(
        self, kind: str, attention: str, bad: float, dtype: torch.dtype, device: str
    ) -> None:
        net = head(kind)
        a, b = features(5), features(35)
        clean = [net.templates(a, dtype=dtype).detach().to(device)]
        clean.append(net.templates(b, "gallery", dtype).detach().to(device))
        a[2, 7, 3, 4] = bad
        b[17, :, 0, 0] = bad
        p = net.templates(a, dtype=dtype).detach().to(device)
        g = net.templates(b, "gallery", dtype).detach().to(device)
        weights = torch.rand(5, 7, 7, dtype=result_dtype(dtype), device=device) if attention == "maps" else attention
        scores, expected = xcos_ext.xcos_matrix(p, g, weights), xcos_ext.xcos_matrix(*clean, weights)
        hit = torch.zeros(5, 35, dtype=torch.bool, device=device)
        hit[2], hit[:, 17] = True, True
        assert scores[hit].isnan().all()
        torch.testing.assert_close(scores[~hit], expected[~hit], rtol=0, atol=PAIRS_ATOL[dtype])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("side", ["probe", "gallery"])
    def test_a_loud_face_does_not_drown_its_neighbours(self, side: str, dtype: torch.dtype) -> None:
        """Projections a thousand times the others' are the business of one face's own pairs."""
        p, g = sides(20, 64, dtype=dtype)
        (p if side == "probe" else g).projection[5] *= 1000
        error = (xcos_ext.xcos_matrix(p, g) - exact(p, g)).abs()
        rest = torch.ones_like(error, dtype=torch.bool)
        rest[(5 if side == "probe" else slice(None)), (5 if side == "gallery" else slice(None))] = False
        assert error[rest].max() <= PAIRS_ATOL[dtype]

    @pytest.mark.parametrize("kind", KINDS)
    def test_faces_without_any_signal(self, kind: str, device: str) -> None:
        net = head(kind)
        a = features(3)
        a[1] = 0
        both = net.templates(a, "both").detach().to(device)
        scores = xcos_ext.xcos_matrix(both, both)
        assert (scores[1] == 0).all() and (scores[:, 1] == 0).all() and scores.isfinite().all()

    @pytest.mark.parametrize("attention", ["own", "uniform", "norm", "maps"])
    @pytest.mark.parametrize("counts", [(0, 5), (5, 0), (0, 0)], ids=str)
    def test_nobody_there(self, counts: tuple[int, int], attention: str, device: str) -> None:
        p, g = sides(*counts, dtype=torch.float32, device=device)
        how = torch.rand(counts[0], 7, 7, device=device) if attention == "maps" else attention
        for implementation in IMPLEMENTATIONS.values():
            scores = implementation(p, g, how)
            assert scores.shape == counts and scores.dtype == torch.float32


class TestSameBits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["softmax", "symmetric"])
    def test_for_every_number_of_threads(self, kind: str, dtype: torch.dtype) -> None:
        p, g, tensors = leaves(*sides(19, 70, kind, dtype=dtype))
        grad = torch.randn(19, 70)
        results = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                scores = xcos_ext.xcos_matrix(p, g)
                results.append((scores.detach(), *torch.autograd.grad(scores, tensors, grad)))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", ["softmax", "symmetric", "min-shift"])
    def test_alone_as_in_a_batch(self, kind: str, dtype: torch.dtype, device: str) -> None:
        p, g = sides(20, 45, kind, dtype=dtype, device=device)
        scores = xcos_ext.xcos_matrix(p, g)
        for i, j in ((0, 0), (7, 44), (19, 16), (16, 31)):
            assert torch.equal(xcos_ext.xcos_matrix(p[i], g[j]), scores[i : i + 1, j : j + 1])
        assert torch.equal(xcos_ext.xcos_matrix(p[3:8], g[5:44]), scores[3:8, 5:44])


def compare_gradients(p: Templates, g: Templates, grad: torch.Tensor, floor: float = 1e-3) -> None:
    """All eight gradients against those of the reference in fp64 on the same stored values."""
    dtype, device = p.dtype, p.device
    ours_p, ours_g, ours = leaves(p, g)
    ref_p, ref_g, theirs = leaves(p, g, F64)
    actual = torch.autograd.grad(xcos_ext.xcos_matrix(ours_p, ours_g), ours, grad.to(device, result_dtype(dtype)))
    expected = torch.autograd.grad(reference.xcos_matrix(ref_p, ref_g), theirs, grad.to(device))
    names = [f"{side} {name}" for side in ("probe", "gallery") for name in ("features", "projection", "bias")]
    for name, tensor, one, other in zip([*names, "weight", "slope"], ours, actual, expected, strict=True):
        assert one.dtype == tensor.dtype and one.shape == tensor.shape, name
        # Storage rounds what is stored as features are; biases and parameters are fp32 throughout.
        assert_gradient_close(one, other, dtype if one.dtype == dtype else torch.float32, floor)


class TestGradients:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("counts", [(1, 1), (5, 7), (17, 33)], ids=str)
    def test_matches_the_reference(self, counts: tuple[int, int], kind: str, dtype: torch.dtype, device: str) -> None:
        p, g = sides(*counts, kind, dtype=dtype, device=device)
        compare_gradients(p, g, torch.randn(counts, dtype=F64))

    @pytest.mark.thorough
    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(
        counts=st.tuples(st.integers(0, 20), st.integers(0, 35)),
        channels=st.integers(1, 40),
        hidden=st.integers(1, 20),
        grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
        kind=st.sampled_from(sorted(KINDS)),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 999),
    )
    def test_any_shape(
        self,
        counts: tuple[int, int],
        channels: int,
        hidden: int,
        grid: tuple[int, int],
        kind: str,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        p, g = sides(*counts, kind, hidden=hidden, dtype=dtype, channels=channels, grid=grid)
        # A grid of one or two cells has gradients that are 0 as differences of terms of size 1.
        compare_gradients(p, g, torch.randn(counts, dtype=F64), floor=1.0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradcheck(self, kind: str, device: str) -> None:
        p, g, tensors = leaves(*sides(2, 3, kind, hidden=2, channels=3, grid=(2, 3), device=device))

        def score(*values: torch.Tensor) -> torch.Tensor:
            parameters = dataclasses.replace(p.parameters, weight=values[6], slope=values[7])
            parts = [dict(zip(("features", "projection", "bias"), values[i : i + 3], strict=True)) for i in (0, 3)]
            return xcos_ext.xcos_matrix(
                dataclasses.replace(p, attention=parameters, **parts[0]),
                dataclasses.replace(g, attention=parameters, **parts[1]),
            )

        assert torch.autograd.gradcheck(score, tensors)

    @pytest.mark.parametrize("kind", KINDS)
    def test_end_to_end_to_features_and_the_networks_parameters(self, kind: str, device: str) -> None:
        """As the eager head's own gradients, through one batch against itself."""
        net = head(kind).to(device)
        x = features(6).to(device).requires_grad_()
        wanted = [x, *net.attention.parameters()]
        grad = torch.randn(6, 6, dtype=F64, device=device)
        both = net.templates(x, "both")
        actual = torch.autograd.grad(xcos_ext.xcos_matrix(both, both), wanted, grad)
        expected = torch.autograd.grad(eager(net, x, x), wanted, grad)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("attention", ["uniform", "norm", "map", "maps"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_fixed_attention(self, dtype: torch.dtype, attention: str, device: str) -> None:
        grads = []
        a, b = features(5), features(6)
        a[1, :, 2, 2] = 0
        weights = torch.rand((7, 7) if attention == "map" else (5, 7, 7), dtype=F64) / 49
        grad = torch.randn(5, 6, dtype=F64, device=device)
        for function, kind in ((xcos_ext.xcos_matrix, dtype), (reference.xcos_matrix, F64)):
            # The reference on the same rounded values.
            stored = [Templates.from_features(x, dtype).to(device, kind) for x in (a, b)]
            wanted = (
                [t for s in stored for t in (s.features, s.norms)]
                if attention == "norm"
                else [s.features for s in stored]
            )
            for tensor in wanted:
                tensor.requires_grad_()
            how: torch.Tensor | str = attention
            if attention.startswith("map"):
                how = weights.to(device, result_dtype(kind)).requires_grad_()
                wanted.append(how)
            scores = function(*stored, how)
            grads.append(torch.autograd.grad(scores, wanted, grad.to(scores.dtype)))
        for one, other in zip(*grads, strict=True):
            assert_gradient_close(one, other, one.dtype)

    @pytest.mark.process
    def test_memory_does_not_grow_with_the_pairs(self) -> None:
        """512 x 512 pairs forward and backward; what is between u, v and the score would be 0.8 GB."""
        script = """
import resource, sys
sys.path.insert(0, {folder!r})
import torch, xcos_ext
from template_samples import leaves, sides

torch.manual_seed(0)
p, g, tensors = leaves(*sides(512, 512, dtype=torch.float32))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
xcos_ext.xcos_matrix(p[:8], g[:8]).sum().backward()
before = peak()
torch.autograd.grad(xcos_ext.xcos_matrix(p, g).square().sum(), tensors)
print(peak() - before)
"""
        code = script.format(folder=str(Path(__file__).resolve().parents[1] / "support"))
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
        # The gradients themselves take 10 MB.
        assert int(run.stdout) < 64 * 1024, f"{run.stdout.strip()} KiB more at the peak"

    def test_only_the_wanted_gradients_are_computed(self, device: str) -> None:
        p, g = sides(3, 4, dtype=torch.float32, device=device)
        everything = torch.autograd.grad(
            xcos_ext.xcos_matrix(*(made := leaves(p, g))[:2]), made[2], torch.ones(3, 4, device=device)
        )
        for i in range(8):
            one, other, tensors = leaves(p, g)
            for j, tensor in enumerate(tensors):
                tensor.requires_grad_(j == i)
            xcos_ext.xcos_matrix(one, other).sum().backward()
            assert [t.grad is not None for t in tensors] == [j == i for j in range(8)]
            torch.testing.assert_close(tensors[i].grad, everything[i])

    def test_nothing_wanted(self, device: str) -> None:
        p, g = sides(3, 4, dtype=torch.float32, device=device)
        assert not xcos_ext.xcos_matrix(p, g).requires_grad
        one, other, _ = leaves(p, g)
        with torch.no_grad():
            assert not xcos_ext.xcos_matrix(one, other).requires_grad

    def test_at_ties_the_second_face_takes_the_gradient(self, device: str) -> None:
        """So the slope at 0 is that of torch's PReLU: u = -v means that the activation stands at 0."""
        p, g = sides(2, 3, "symmetric", device=device)
        g = dataclasses.replace(g, projection=p.projection[:1].expand(3, -1, -1, -1).contiguous())
        p = dataclasses.replace(p, projection=p.projection[:1].expand(2, -1, -1, -1).contiguous())
        one, other, tensors = leaves(p, g)
        grads = torch.autograd.grad(xcos_ext.xcos_matrix(one, other).square().sum(), [tensors[1], tensors[4]])
        assert (grads[0][:, 0] == 0).all() and (grads[1][:, 1] == 0).all()
        compare_gradients(p, g, torch.randn(2, 3, dtype=F64))

    def test_logits_of_zero_have_the_slope_as_gradient(self, device: str) -> None:
        p, g = sides(2, 3, device=device)
        zero = dataclasses.replace(p.parameters, weight=torch.zeros_like(p.parameters.weight))
        p, g = (dataclasses.replace(s, attention=zero, bias=torch.zeros_like(s.bias)) for s in (p, g))
        compare_gradients(p, g, torch.randn(2, 3, dtype=F64))

    def test_expanded_gradient_of_a_sum(self, device: str) -> None:
        """sum().backward() hands in one number for all pairs; nothing may read past it."""
        one, other, tensors = leaves(*sides(9, 18, device=device))
        xcos_ext.xcos_matrix(one, other).sum().backward()
        again = leaves(one.detach(), other.detach())
        expected = torch.autograd.grad(reference.xcos_matrix(*again[:2]).sum(), again[2])
        for tensor, grad in zip(tensors, expected, strict=True):
            assert_gradient_close(tensor.grad, grad, F64)

    def test_gradient_of_a_slice_of_the_matrix(self, device: str) -> None:
        one, other, tensors = leaves(*sides(9, 18, device=device))
        grads = torch.autograd.grad(xcos_ext.xcos_matrix(one, other)[2:4, ::3].sum(), tensors[0])[0]
        assert (grads[:2] == 0).all() and (grads[4:] == 0).all() and (grads[2:4] != 0).any()

    def test_a_bad_face_spoils_only_itself_and_its_partners(self, device: str) -> None:
        """A loss over the other pairs does not see it."""
        p, g = sides(5, 6, dtype=torch.float32, device=device)
        p.features[2, 5] = torch.nan
        one, other, tensors = leaves(p, g)
        scores = xcos_ext.xcos_matrix(one, other)
        grad = torch.ones_like(scores)
        grads = torch.autograd.grad(scores, tensors, grad)
        rest = torch.tensor([0, 1, 3, 4], device=device)
        assert grads[0][rest].isfinite().all() and grads[1][rest].isfinite().all()

    @pytest.mark.parametrize("attention", ["own", "uniform", "norm"])
    def test_double_backward(self, attention: str, device: str) -> None:
        """Learned attention refuses and says what can do it; fixed attention either does it or refuses."""
        one, other, tensors = leaves(*sides(3, 4, device=device))
        scores = xcos_ext.xcos_matrix(one, other, attention)
        try:
            grad = torch.autograd.grad(scores.square().sum(), tensors[0], create_graph=True)[0]
            second = torch.autograd.grad(grad.square().sum(), tensors[0])[0]
        except RuntimeError as error:
            assert "xcos_matrix: double backward is not implemented; xcos_ext.reference.xcos_matrix" in str(error)
            return
        assert attention != "own"
        again = leaves(one.detach(), other.detach())
        grad = torch.autograd.grad(
            reference.xcos_matrix(*again[:2], attention).square().sum(), again[2][0], create_graph=True
        )[0]
        torch.testing.assert_close(second, torch.autograd.grad(grad.square().sum(), again[2][0])[0])

    def test_the_reference_can_be_differentiated_twice(self) -> None:
        one, other, tensors = leaves(*sides(2, 2, "symmetric", hidden=2, channels=2, grid=(2, 2)))
        grad = torch.autograd.grad(reference.xcos_matrix(one, other).square().sum(), tensors, create_graph=True)
        assert all(t.isfinite().all() for t in torch.autograd.grad(sum(t.square().sum() for t in grad), tensors))


class TestRefusals:
    def test_sides_are_checked(self) -> None:
        p, g = sides(2, 3)
        for function in IMPLEMENTATIONS.values():
            with pytest.raises(TypeError, match="xcos_matrix: probes: expected Templates, got Tensor"):
                function(features(2), g)
            with pytest.raises(RuntimeError, match="xcos_matrix: probes: expected templates of role 'probe'"):
                function(g, g)
            with pytest.raises(RuntimeError, match=r"xcos_matrix: gallery: .*different heads"):
                function(p, sides(2, 3)[1])
            with pytest.raises(RuntimeError, match="xcos_matrix: gallery: expected dtype float64 like probes"):
                function(p, g.to(torch.float16))
            with pytest.raises(RuntimeError, match="xcos_matrix: attention: expected 'own', "):
                function(p, g, "corr")

    @pytest.mark.parametrize("attention", ["own", "uniform", "norm"])
    def test_a_matrix_that_would_not_fit(self, attention: str) -> None:
        """3 million by 4 million scores are 48 TB; the faces here are one face seen many times."""
        p, g = sides(1, 1, hidden=1, channels=1, grid=(1, 1), dtype=torch.float32)

        def many(t: Templates, faces: int) -> Templates:
            return dataclasses.replace(t, **{n: getattr(t, n).expand(faces, *getattr(t, n).shape[1:]) for n in PARTS})

        with pytest.raises(RuntimeError, match=r"xcos_matrix: .*(48|43\.\d+|44) ?Ti?B.*xcos_topk"):
            xcos_ext.xcos_matrix(many(p, 3_000_000), many(g, 4_000_000), attention)

    @pytest.mark.slow
    def test_more_than_two_to_the_31_pairs(self) -> None:
        """Indices of scores do not fit 32 bits. Needs 9 GB of memory."""
        faces = 46_400
        p, g = sides(200, 200, hidden=1, channels=1, grid=(1, 1), dtype=torch.float32)
        which = torch.arange(faces) % 200
        scores = xcos_ext.xcos_matrix(p[which], g[which])
        assert scores.numel() > 2**31
        small = xcos_ext.xcos_matrix(p, g)
        assert torch.equal(scores[-200:, -200:], small[which[-200:]][:, which[-200:]])
        assert torch.equal(scores[23_000:23_200, 40_000:40_200], small)


def test_result_is_as_large_as_said() -> None:
    p, g = sides(3, 4, dtype=torch.float16)
    assert xcos_ext.xcos_matrix(p, g).is_contiguous()
