"""xcos_maps against the eager head and the reference: maps, contributions, gradients, chunks, bad pairs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES
from template_samples import (
    EAGER_ATOL,
    F64,
    KINDS,
    PAIRS_ATOL,
    features,
    head,
    leaves,
    random_templates,
    real_features,
    sides,
)

import xcos_ext
from xcos_ext import reference
from xcos_ext.ops.templates import Templates, result_dtype
from xcos_ext.ops.templates import cells as module

pytestmark = pytest.mark.usefixtures("one_thread")


PAIRS = torch.tensor([[0, 3], [4, 0], [2, 2], [2, 2], [1, 5]])


class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_eager_heads_maps(self, kind: str, dtype: torch.dtype, device: str) -> None:
        net = head(kind)
        a, b = features(5), features(6)
        with torch.no_grad():
            p, g = net.templates(a, dtype=dtype).to(device), net.templates(b, "gallery", dtype).to(device)
            maps = xcos_ext.xcos_maps(p, g, PAIRS.to(device), threshold=0.3)
            expected = net.score(a[PAIRS[:, 0]], b[PAIRS[:, 1]], return_maps=True)
        atol = EAGER_ATOL[dtype]
        for one, other in zip(maps[:3], expected, strict=True):
            assert one.dtype == result_dtype(dtype)
            torch.testing.assert_close(one.double().cpu(), other, rtol=0, atol=atol)
        torch.testing.assert_close(
            maps.contribution.double().cpu(), expected.attention * (expected.similarity - 0.3), rtol=0, atol=atol
        )

    @pytest.mark.parametrize("attention", ["own", "uniform", "norm", "map", "maps"])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_entries_of_the_reference(self, dtype: torch.dtype, kind: str, attention: str, device: str) -> None:
        p, g = sides(5, 6, kind, dtype=dtype, device=device)
        weights = torch.rand(5, 7, 7, dtype=F64, device=device).to(result_dtype(dtype)) / 49
        how = {"map": weights[0], "maps": weights}.get(attention, attention)
        wide = how.double() if isinstance(how, torch.Tensor) else how
        maps = xcos_ext.xcos_maps(p, g, PAIRS.to(device), how, threshold=-0.1)
        exact = reference.xcos_maps(p.to(F64), g.to(F64), PAIRS.to(device), wide, threshold=-0.1)
        for one, other in zip(maps, exact, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=PAIRS_ATOL[dtype])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_add_up_to_the_matrix(self, kind: str, dtype: torch.dtype, device: str) -> None:
        p, g = sides(5, 6, kind, dtype=dtype, device=device)
        pairs = torch.cartesian_prod(torch.arange(5), torch.arange(6)).to(device)
        for attention in ("own", "uniform", "norm"):
            maps = xcos_ext.xcos_maps(p, g, pairs, attention, threshold=0.25)
            matrix = xcos_ext.xcos_matrix(p, g, attention)
            atol = 2 * PAIRS_ATOL[dtype]
            torch.testing.assert_close(maps.score.view(5, 6), matrix, rtol=0, atol=atol)
            torch.testing.assert_close(maps.contribution.sum((1, 2)), maps.score - 0.25, rtol=0, atol=atol)
            torch.testing.assert_close(
                maps.attention.sum((1, 2)), torch.ones_like(maps.score), rtol=0, atol=PAIRS_ATOL[dtype]
            )

    @pytest.mark.thorough
    @pytest.mark.real_data
    def test_hits_on_real_faces(self, shared_data, device: str) -> None:
        net, grid = real_features(shared_data, 160)
        with torch.no_grad():
            p, g = net.templates(grid[:10]).to(device), net.templates(grid, "gallery").to(device)
            hits = xcos_ext.xcos_topk(p, g, 3)
            rows = torch.arange(10, device=device).repeat_interleave(3)
            maps = xcos_ext.xcos_maps(p, g, torch.stack((rows, hits.indices.flatten()), 1), threshold=0.5)
            expected = net.score(grid[rows.cpu()], grid[hits.indices.flatten().cpu()], return_maps=True)
        torch.testing.assert_close(maps.score, hits.values.flatten(), rtol=0, atol=1e-12)
        for one, other in zip(maps[:3], expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-10)

    @pytest.mark.thorough
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        probes=st.integers(1, 9),
        gallery=st.integers(1, 9),
        pairs=st.integers(0, 30),
        channels=st.integers(1, 40),
        hidden=st.integers(1, 20),
        grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        kind=st.sampled_from(sorted(KINDS)),
        attention=st.sampled_from(["own", "uniform", "norm"]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 999),
    )
    def test_any_shape(
        self,
        probes: int,
        gallery: int,
        pairs: int,
        channels: int,
        hidden: int,
        grid: tuple[int, int],
        kind: str,
        attention: str,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        p, g = sides(probes, gallery, kind, hidden=hidden, dtype=dtype, channels=channels, grid=grid)
        chosen = torch.stack((torch.randint(probes, (pairs,)), torch.randint(gallery, (pairs,))), 1)
        maps = xcos_ext.xcos_maps(p, g, chosen, attention)
        exact = reference.xcos_maps(p.to(F64), g.to(F64), chosen, attention)
        assert maps.contribution is None and maps.similarity.shape == (pairs, *grid)
        for one, other in zip(maps[:3], exact[:3], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=PAIRS_ATOL[dtype])

    def test_pairs_in_chunks_are_the_pairs_at_once(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        p, g = sides(5, 6, "symmetric", device=device)
        pairs = torch.stack((torch.randint(5, (23,)), torch.randint(6, (23,))), 1).to(device)
        weights = torch.rand(5, 7, 7, dtype=F64, device=device)
        for attention in ("own", weights):
            whole = xcos_ext.xcos_maps(p, g, pairs, attention, threshold=0.1)
            with monkeypatch.context() as patched:
                patched.setattr(module, "CHUNK", 4)
                parts = xcos_ext.xcos_maps(p, g, pairs, attention, threshold=0.1)
            for one, other in zip(whole, parts, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-14)

    def test_no_pairs_and_no_faces(self, device: str) -> None:
        p, g = sides(2, 3, dtype=torch.float16, device=device)
        none = torch.zeros(0, 2, dtype=torch.int64, device=device)
        for probes, gallery in ((p, g), (p[:0], g[:0])):
            maps = xcos_ext.xcos_maps(probes, gallery, none, threshold=0.0)
            assert [tuple(part.shape) for part in maps] == [(0,), (0, 7, 7), (0, 7, 7), (0, 7, 7)]

    def test_nan_stays_in_its_pairs(self, device: str) -> None:
        net = head()
        x = features(3)
        x[1, 0, 6, 6] = torch.nan
        both = net.templates(x, "both").detach().to(device)
        pairs = torch.tensor([[0, 2], [0, 1], [1, 2], [2, 2]], device=device)
        maps = xcos_ext.xcos_maps(both, both, pairs)
        assert maps.score.isnan().tolist() == [False, True, True, False]
        assert maps.similarity[1].isnan().sum() == 1  # only the cell itself

    def test_autocast_has_no_effect(self, device: str) -> None:
        p, g = sides(5, 6, dtype=torch.float32, device=device)
        expected = xcos_ext.xcos_maps(p, g, PAIRS.to(device), threshold=0.1)
        with torch.autocast(device, torch.bfloat16):
            for one, other in zip(xcos_ext.xcos_maps(p, g, PAIRS.to(device), threshold=0.1), expected, strict=True):
                assert torch.equal(one, other)


class TestGradients:
    @pytest.mark.parametrize("kind", KINDS)
    def test_gradcheck(self, kind: str, device: str) -> None:
        p, g, tensors = leaves(*sides(2, 3, kind, hidden=2, channels=3, grid=(2, 3), device=device))
        pairs = torch.tensor([[0, 2], [1, 1], [1, 1]], device=device)

        def maps(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            parameters = dataclasses.replace(p.parameters, weight=values[6], slope=values[7])
            parts = [dict(zip(("features", "projection", "bias"), values[i : i + 3], strict=True)) for i in (0, 3)]
            one = dataclasses.replace(p, attention=parameters, **parts[0])
            return xcos_ext.xcos_maps(
                one, dataclasses.replace(g, attention=parameters, **parts[1]), pairs, threshold=0.1
            )[:4]

        assert torch.autograd.gradcheck(maps, tensors, fast_mode=True)

    def test_gradient_of_scores_is_that_of_the_matrix(self, device: str) -> None:
        p, g, tensors = leaves(*sides(5, 6, "symmetric", device=device))
        pairs = PAIRS.to(device)
        actual = torch.autograd.grad(xcos_ext.xcos_maps(p, g, pairs).score.square().sum(), tensors)
        scores = xcos_ext.xcos_matrix(p, g)[pairs[:, 0], pairs[:, 1]]
        expected = torch.autograd.grad(scores.square().sum(), tensors)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    def test_given_maps_learn(self, device: str) -> None:
        p, g = sides(5, 6, device=device)
        weights = torch.rand(5, 7, 7, dtype=F64, device=device, requires_grad=True)
        xcos_ext.xcos_maps(p, g, PAIRS.to(device), weights).score.sum().backward()
        assert (weights.grad[:3] != 0).any() and (weights.grad[3] == 0).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("pairs", "error", "message"),
        [
            ([[0, 1]], TypeError, "index_pairs: expected a tensor, got list"),
            (torch.zeros(4, dtype=torch.int64), RuntimeError, r"index_pairs: expected shape \[M, 2\] of rows .*\[4\]"),
            (torch.zeros(4, 3, dtype=torch.int64), RuntimeError, r"index_pairs: expected shape \[M, 2\] .* \[4, 3\]"),
            (torch.zeros(4, 2), RuntimeError, "index_pairs: expected dtype int64, got float32"),
            (torch.tensor([[0, 0], [2, 0]]), RuntimeError, "expected probe indices from 0 to 1 in column 0, got 2"),
            (torch.tensor([[0, 3], [1, 0]]), RuntimeError, "expected gallery indices from 0 to 2 in column 1, got 3"),
            (torch.tensor([[0, -1]]), RuntimeError, "got -1; index -1 marks a missing place of a top-k: leave it out"),
            (torch.tensor([[-2, 0]]), RuntimeError, "probe indices from 0 to 1 in column 0, got -2$"),
        ],
    )
    def test_pairs(self, pairs: object, error: type[Exception], message: str, device: str) -> None:
        with pytest.raises(error, match=message):
            xcos_ext.xcos_maps(*sides(2, 3, device=device), pairs)

    def test_threshold(self) -> None:
        p, g = sides(5, 6)
        with pytest.raises(RuntimeError, match="xcos_maps: threshold: expected a finite number or None, got nan"):
            xcos_ext.xcos_maps(p, g, PAIRS, threshold=float("nan"))
        with pytest.raises(TypeError, match="xcos_maps: threshold: expected a number, got a tensor"):
            xcos_ext.xcos_maps(p, g, PAIRS, threshold=torch.tensor(0.5))  # type: ignore[arg-type]

    def test_sides(self) -> None:
        p, g = sides(5, 6)
        for function in (xcos_ext.xcos_maps, reference.xcos_maps):
            with pytest.raises(RuntimeError, match="xcos_maps: probes: expected templates of role 'probe' or 'both'"):
                function(g, p, PAIRS)
            with pytest.raises(RuntimeError, match=r"xcos_maps: gallery: .*different heads"):
                function(p, sides(5, 6)[1], PAIRS)
            with pytest.raises(RuntimeError, match="xcos_maps: gallery: expected grid 7x7 like probes, got 5x5"):
                function(p, random_templates(3, grid=(5, 5)), PAIRS)
            with pytest.raises(TypeError, match="xcos_maps: probes: expected Templates, got Tensor"):
                function(features(5), g, PAIRS)
        assert isinstance(Templates.from_features(features(1)), Templates)
