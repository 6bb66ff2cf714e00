"""xcos_topk against the sorted matrix: order, ties, missing places, exclusions, bad requests, memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES
from template_samples import (
    F64,
    KINDS,
    PAIRS_ATOL,
    features,
    head,
    random_templates,
    real_features,
    sides,
)
from torch import Tensor

import xcos_ext
from xcos_ext import reference
from xcos_ext.ops.templates import Templates, result_dtype

pytestmark = pytest.mark.usefixtures("one_thread")


IMPLEMENTATIONS = {"operator": xcos_ext.xcos_topk, "reference": reference.xcos_topk}


def check(
    hits: Any, p: Templates, g: Templates, k: int, attention: Tensor | str = "own", allowed: Tensor | None = None
) -> None:
    """Each place holds a face whose exact score is, up to rounding, the best one left; no face twice."""
    values, indices = hits
    assert values.shape == indices.shape == (len(p), k)
    assert values.dtype == result_dtype(p.dtype) and indices.dtype == torch.int64
    wide = attention.double() if isinstance(attention, Tensor) else attention
    exact = reference.xcos_matrix(p.to(F64), g.to(F64), wide)
    candidate = ~exact.isnan() if allowed is None else allowed & ~exact.isnan()
    exact = torch.where(candidate, exact, -torch.inf)
    best = torch.nn.functional.pad(exact, (0, max(0, k - len(g))), value=-torch.inf).sort(1, descending=True)[0][:, :k]
    atol = 2 * PAIRS_ATOL[p.dtype]
    torch.testing.assert_close(values.double(), best, rtol=0, atol=atol)
    missing = values == -torch.inf
    assert torch.equal(missing, indices == -1)
    scores = exact.gather(1, indices.clamp_min(0)) if len(g) else torch.full_like(best, -torch.inf)
    torch.testing.assert_close(torch.where(missing, -torch.inf, scores), best, rtol=0, atol=atol)
    for row in indices:
        found = row[row >= 0]
        assert len(found.unique()) == len(found)
    falling = values[:, 1:] <= values[:, :-1]
    equal = (values[:, 1:] == values[:, :-1]) & ~missing[:, 1:]
    assert falling.all() and (indices[:, 1:] > indices[:, :-1])[equal].all()


class TestOrder:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_the_best_of_the_matrix(self, name: str, kind: str, dtype: torch.dtype, device: str) -> None:
        p, g = sides(9, 133, kind, dtype=dtype, device=device)
        check(IMPLEMENTATIONS[name](p, g, 10), p, g, 10)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("attention", ["uniform", "norm", "map", "maps"])
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_attention_known_beforehand(self, name: str, attention: str, dtype: torch.dtype, device: str) -> None:
        p, g = (random_templates(n, dtype=dtype).to(device) for n in (6, 90))
        weights = torch.rand(6, 7, 7, dtype=result_dtype(dtype), device=device) / 49
        how = {"map": weights[0], "maps": weights}.get(attention, attention)
        check(IMPLEMENTATIONS[name](p, g, 7, how), p, g, 7, how)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", ["softmax", "symmetric"])
    def test_the_same_bits_as_the_matrix(self, kind: str, dtype: torch.dtype, device: str) -> None:
        p, g = sides(20, 300, kind, dtype=dtype, device=device)
        values, indices = xcos_ext.xcos_topk(p, g, 300)
        matrix = xcos_ext.xcos_matrix(p, g)
        assert torch.equal(values, matrix.gather(1, indices))
        assert torch.equal(values, matrix.topk(300, 1).values)

    @pytest.mark.thorough
    @pytest.mark.real_data
    def test_real_faces_find_themselves_and_their_pictures(self, shared_data, device: str) -> None:
        net, grid = real_features(shared_data, 160)
        with torch.no_grad():
            p, g = net.templates(grid[::4]).to(device), net.templates(grid, "gallery").to(device)
        hits = xcos_ext.xcos_topk(p, g, 5)
        check(hits, p, g, 5)
        mine = torch.arange(0, 160, 4, device=device)
        assert torch.equal(hits.indices[:, 0], mine)
        torch.testing.assert_close(hits.values[:, 0], torch.ones(40, dtype=F64, device=device))
        others = xcos_ext.xcos_topk(p, g, 4, exclude=mine)
        assert torch.equal(others.indices, hits.indices[:, 1:])

    @pytest.mark.parametrize("attention", ["own", "uniform", "norm"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_ties_go_to_the_lowest_index(self, dtype: torch.dtype, attention: str, device: str) -> None:
        p, g = sides(4, 6, dtype=dtype, device=device)
        repeated = g[torch.arange(96) % 6]
        for implementation in IMPLEMENTATIONS.values():
            values, indices = implementation(p, repeated, 40, attention)
            copies = indices % 6
            for row in range(4):
                for start in (0, 16):  # each face's sixteen copies in order, then the next face's
                    assert len(copies[row, start : start + 16].unique()) == 1
                    assert torch.equal(indices[row, start : start + 16].sort()[0], indices[row, start : start + 16])
                    assert (values[row, start : start + 16] == values[row, start]).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_ties_among_faces_of_different_strength(self, dtype: torch.dtype) -> None:
        """A face's score does not depend on its neighbours, so its second picture in the gallery comes right after."""
        p, g = sides(8, 150, dtype=dtype)
        g.projection.mul_(torch.linspace(0.3, 3, 150).view(-1, 1, 1, 1))
        order = torch.randperm(150)
        twice, face = Templates.cat([g, g[order]]), torch.cat((torch.arange(150), order))
        indices = xcos_ext.xcos_topk(p, twice, 300).indices
        assert torch.equal(face[indices[:, ::2]], face[indices[:, 1::2]])
        assert (indices[:, ::2] < 150).all()

    @pytest.mark.thorough
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        probes=st.integers(0, 20),
        gallery=st.integers(0, 200),
        k=st.integers(1, 230),
        kind=st.sampled_from(["own", "uniform", "norm"]),
        dtype=st.sampled_from(DTYPES),
        limit=st.one_of(st.none(), st.floats(-0.2, 0.2)),
        exclusion=st.sampled_from(["none", "ids", "many ids", "mask", "masks"]),
        seed=st.integers(0, 999),
    )
    def test_any_request(
        self,
        probes: int,
        gallery: int,
        k: int,
        kind: str,
        dtype: torch.dtype,
        limit: float | None,
        exclusion: str,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        p, g = sides(probes, gallery, hidden=2, dtype=dtype, channels=5, grid=(2, 3))
        exclude = {
            "none": None,
            "ids": torch.randint(-1, gallery + 1, (probes,)),
            "many ids": torch.randint(-1, gallery + 1, (probes, 4)),
            "mask": torch.rand(gallery) < 0.3,
            "masks": torch.rand(probes, gallery) < 0.3,
        }[exclusion]
        hits = xcos_ext.xcos_topk(p, g, k, kind, min_score=limit, exclude=exclude)
        allowed = torch.ones(probes, gallery, dtype=torch.bool)
        if limit is not None:
            own = xcos_ext.xcos_matrix(p, g, kind)
            if ((own - limit).abs() < 1e-6).any():
                return  # rounding decides
            allowed &= own >= limit
        if exclude is not None and exclude.dtype == torch.bool:
            allowed &= ~exclude
        elif exclude is not None:
            ids = exclude if exclude.dim() == 2 else exclude[:, None]
            allowed &= ~(torch.arange(gallery) == ids.unsqueeze(2)).any(1)
        check(hits, p, g, k, kind, allowed)


class TestPlaces:
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_fewer_faces_than_places(self, name: str, device: str) -> None:
        p, g = sides(3, 4, device=device)
        values, indices = IMPLEMENTATIONS[name](p, g, 7)
        assert (values[:, 4:] == -torch.inf).all() and (indices[:, 4:] == -1).all()
        assert torch.equal(indices[:, :4].sort(1)[0], torch.arange(4, device=device).expand(3, 4))
        check((values, indices), p, g, 7)

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    @pytest.mark.parametrize("attention", ["own", "uniform", "norm"])
    def test_empty_gallery_and_no_probes(self, name: str, attention: str, device: str) -> None:
        p, g = sides(3, 4, dtype=torch.float16, device=device)
        values, indices = IMPLEMENTATIONS[name](p, g[:0], 5, attention)
        assert (values == -torch.inf).all() and (indices == -1).all()
        assert values.shape == indices.shape == (3, 5) and values.dtype == torch.float32
        values, indices = IMPLEMENTATIONS[name](p[:0], g, 5, attention)
        assert values.shape == indices.shape == (0, 5) and indices.dtype == torch.int64

    def test_ties_across_blocks_of_scores(self, device: str) -> None:
        p, g = sides(70, 6, dtype=torch.float32, device=device)
        indices = xcos_ext.xcos_topk(p, g[torch.arange(9000) % 6], 1500).indices
        assert torch.equal(indices, torch.arange(1500, device=device) * 6 + indices[:, :1])

    @pytest.mark.parametrize("k", [1, 2, 3, 31, 32, 33, 1000, 2047, 2048])
    def test_any_number_of_places(self, k: int, device: str) -> None:
        p, g = sides(3, 1500, hidden=2, channels=4, grid=(2, 2), device=device)
        check(xcos_ext.xcos_topk(p, g, k), p, g, k)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_nan_is_no_hit(self, name: str, dtype: torch.dtype, device: str) -> None:
        net = head()
        a, b = features(4), features(40)
        a[1, 0, 0, 0] = torch.nan
        b[5] = torch.nan
        p = net.templates(a, dtype=dtype).detach().to(device)
        g = net.templates(b, "gallery", dtype).detach().to(device)
        values, indices = IMPLEMENTATIONS[name](p, g, 40)
        assert (values[1] == -torch.inf).all() and (indices[1] == -1).all()
        assert not (indices == 5).any() and not values.isnan().any()
        assert (indices[[0, 2, 3], :39] >= 0).all() and (indices[:, 39] == -1).all()

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_min_score(self, name: str, device: str) -> None:
        p, g = sides(5, 60, device=device)
        everything = IMPLEMENTATIONS[name](p, g, 60)
        limit = everything.values[2, 7].item()
        values, indices = IMPLEMENTATIONS[name](p, g, 60, min_score=limit)
        keep = everything.values >= limit
        assert torch.equal(values, torch.where(keep, everything.values, -torch.inf))
        assert torch.equal(indices, torch.where(keep, everything.indices, -1))
        assert keep[2].sum() == 8  # the limit itself is a hit
        none = IMPLEMENTATIONS[name](p, g, 3, min_score=2.0)
        assert (none.indices == -1).all() and (none.values == -torch.inf).all()

    def test_min_score_is_compared_in_the_scores_precision(self, device: str) -> None:
        """A limit taken from an fp32 score admits that score."""
        p, g = sides(5, 60, dtype=torch.float32, device=device)
        everything = xcos_ext.xcos_topk(p, g, 60)
        for place in (0, 3, 31):
            limit = everything.values[1, place].item()
            hits = xcos_ext.xcos_topk(p, g, 60, min_score=limit)
            assert (hits.indices[1] >= 0).sum() == place + 1

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_exclusions(self, name: str, device: str) -> None:
        net = head()
        x = features(30)
        both = net.templates(x, "both").detach().to(device)
        top = IMPLEMENTATIONS[name]
        own = torch.arange(30, device=device)
        without_self = top(both, both, 29, exclude=own)
        assert not (without_self.indices == own[:, None]).any() and (without_self.indices >= 0).all()
        ids = torch.stack((own, (own + 1) % 30, torch.full_like(own, -1)), 1)
        mask = torch.zeros(30, 30, dtype=torch.bool, device=device)
        mask[own, own] = mask[own, (own + 1) % 30] = True
        by_ids, by_mask = top(both, both, 30, exclude=ids), top(both, both, 30, exclude=mask)
        assert torch.equal(by_ids.indices, by_mask.indices) and torch.equal(by_ids.values, by_mask.values)
        assert (by_ids.indices[:, 28:] == -1).all() and (by_ids.indices[:, :28] >= 0).all()
        odd = own % 2 == 1
        even = top(both, both, 15, exclude=odd)
        assert (even.indices % 2 == 0).all()
        assert torch.equal(even.indices, top(both, both, 15, exclude=odd.expand(30, 30)).indices)
        nobody = top(both, both, 3, exclude=torch.ones(30, dtype=torch.bool, device=device))
        assert (nobody.indices == -1).all()
        every = top(both, both, 3, exclude=torch.full((30,), -1, device=device))
        assert torch.equal(every.indices, top(both, both, 3).indices)

    def test_masks_of_any_layout(self, device: str) -> None:
        p, g = sides(6, 70, device=device)
        mask = torch.rand(70, 6, device=device) < 0.5
        for given_mask in (mask.T, mask.T.contiguous(), mask[:, :1].T.expand(6, -1), mask.T.repeat(1, 2)[:, ::2]):
            hits = xcos_ext.xcos_topk(p, g, 20, exclude=given_mask)
            expected = xcos_ext.xcos_topk(p, g, 20, exclude=given_mask.clone(memory_format=torch.contiguous_format))
            assert torch.equal(hits.indices, expected.indices)
            assert not given_mask.gather(1, hits.indices.clamp_min(0))[hits.indices >= 0].any()
        row = torch.rand(140, device=device) < 0.5
        hits = xcos_ext.xcos_topk(p, g, 20, exclude=row[::2])
        assert not row[::2][hits.indices[hits.indices >= 0]].any()


class TestParts:
    def test_a_gallery_in_parts(self, device: str) -> None:
        """Parts searched one after the other, each with its place in the whole."""
        p, g = sides(5, 200, device=device)
        exclude = torch.randint(0, 200, (5, 9), device=device)
        whole = xcos_ext.xcos_topk(p, g, 12, exclude=exclude)
        parts = [xcos_ext.xcos_topk(p, g[s : s + 70], 12, exclude=exclude, first_index=s) for s in range(0, 200, 70)]
        values, order = torch.cat([part.values for part in parts], 1).sort(dim=1, descending=True, stable=True)
        assert torch.equal(values[:, :12], whole.values)
        assert torch.equal(torch.cat([part.indices for part in parts], 1).gather(1, order)[:, :12], whole.indices)

    @pytest.mark.parametrize("attention", ["own", "uniform", "norm", "maps"])
    def test_many_blocks(self, attention: str, device: str) -> None:
        """More probes and faces than any block of scores holds at once."""
        p, g = sides(700, 9000, hidden=2, channels=4, grid=(2, 2), dtype=torch.float32, device=device)
        how = torch.rand(700, 2, 2, device=device) if attention == "maps" else attention
        hits = xcos_ext.xcos_topk(p, g, 5, how)
        expected = xcos_ext.xcos_matrix(p, g, how).topk(5, 1)
        torch.testing.assert_close(hits.values, expected.values, rtol=0, atol=1e-6)
        same = (hits.indices == expected.indices) | (hits.values - expected.values).abs().le(1e-6)
        assert same.all() and (hits.indices == expected.indices).float().mean() > 0.999

    @pytest.mark.parametrize("attention", ["own", "uniform", "norm"])
    def test_same_bits_for_every_number_of_threads(self, attention: str) -> None:
        p, g = sides(19, 900, dtype=torch.float32)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(xcos_ext.xcos_topk(p, g, 20, attention))
        finally:
            torch.set_num_threads(before)
        for values, indices in results[1:]:
            if attention == "own":
                assert torch.equal(values, results[0].values) and torch.equal(indices, results[0].indices)
            torch.testing.assert_close(values, results[0].values, rtol=0, atol=1e-6)

    @pytest.mark.process
    def test_memory_does_not_grow_with_the_pairs(self) -> None:
        """64 x 100,000 scores alone would be 25 MB, their logits 1.2 GB; the gallery is one face seen many times."""
        script = """
import dataclasses, resource, sys
sys.path.insert(0, {folder!r})
import torch, xcos_ext
from template_samples import sides

torch.manual_seed(0)
p, g = sides(64, 1, dtype=torch.float16)
parts = ("features", "norms", "projection", "bias")
def seen(faces):
    return dataclasses.replace(g, **{{n: getattr(g, n).expand(faces, *getattr(g, n).shape[1:]) for n in parts}})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for attention in ("own", "uniform", "norm"):
    xcos_ext.xcos_topk(p, seen(100), 10, attention)
before = peak()
for attention in ("own", "uniform", "norm"):
    hits = xcos_ext.xcos_topk(p, seen(100_000), 10, attention)
    assert (hits.indices == torch.arange(10)).all()
print(peak() - before)
"""
        code = script.format(folder=str(Path(__file__).resolve().parents[1] / "support"))
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
        assert int(run.stdout) < 64 * 1024, f"{run.stdout.strip()} KiB more at the peak"

    @pytest.mark.slow
    def test_more_than_two_to_the_31_pairs(self) -> None:
        p, g = sides(50, 48, hidden=1, channels=1, grid=(1, 1), dtype=torch.float32)
        many = g[torch.arange(46_000_000) % 48]
        values, indices = xcos_ext.xcos_topk(p, many, 3)
        best, which = xcos_ext.xcos_matrix(p, g).max(1)
        assert torch.equal(values, best[:, None].expand(-1, 3))
        # One cell and one channel: half of the faces score alike, so the first three of these are the hits.
        assert (xcos_ext.xcos_matrix(p, g).gather(1, indices % 48) == best[:, None]).all()
        assert torch.equal(indices[:, 0], (xcos_ext.xcos_matrix(p, g) == best[:, None]).int().argmax(1))
        assert which.shape == (50,)


class TestRefusals:
    @pytest.mark.parametrize(
        ("k", "message"),
        [
            (0, "k: expected 1 to 2048, got 0"),
            (-1, "k: expected 1 to 2048, got -1"),
            (2049, "k: expected 1 to 2048, got 2049"),
        ],
    )
    def test_places(self, k: int, message: str) -> None:
        with pytest.raises(RuntimeError, match=f"xcos_topk: {message}"):
            xcos_ext.xcos_topk(*sides(2, 3), k)

    @pytest.mark.parametrize(
        "exclude",
        [
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(2, 2, 2, dtype=torch.int64),
            torch.zeros(2, dtype=torch.float32),
            torch.zeros(2, dtype=torch.bool),
            torch.zeros(3, 4, dtype=torch.bool),
            torch.zeros(2, dtype=torch.int64, device="meta"),
            torch.zeros(4, dtype=torch.bool).to_sparse(),
        ],
        ids=["ids", "rank", "dtype", "mask", "masks", "device", "layout"],
    )
    def test_exclusions(self, exclude: Tensor) -> None:
        with pytest.raises(RuntimeError, match=r"xcos_topk: exclude: expected .*, got "):
            xcos_ext.xcos_topk(*sides(2, 4), 1, exclude=exclude)

    def test_types(self) -> None:
        p, g = sides(2, 4)
        with pytest.raises(TypeError, match="xcos_topk: exclude: expected "):
            xcos_ext.xcos_topk(p, g, 1, exclude=[1, 2])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="xcos_topk: k: expected "):
            xcos_ext.xcos_topk(p, g, 1.5)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=r"xcos_topk: min_score: expected .*, got nan"):
            xcos_ext.xcos_topk(p, g, 1, min_score=float("nan"))

    def test_sides_are_checked(self) -> None:
        p, g = sides(2, 3)
        for function in IMPLEMENTATIONS.values():
            name = "xcos_topk" if function is xcos_ext.xcos_topk else "xcos_matrix"  # the reference sorts the matrix
            with pytest.raises(TypeError, match=f"{name}: gallery: expected Templates, got Tensor"):
                function(p, features(2), 1)
            with pytest.raises(RuntimeError, match=f"{name}: gallery: expected templates of role 'gallery'"):
                function(p, p, 1)
            with pytest.raises(RuntimeError, match=rf"{name}: gallery: .*different heads"):
                function(p, sides(2, 3)[1], 1)
            with pytest.raises(RuntimeError, match=f"{name}: gallery: expected channels 32 like probes, got 8"):
                function(p, random_templates(2, channels=8), 1)
            with pytest.raises(RuntimeError, match=f"{name}: attention: expected shape"):
                function(p, g, 1, torch.ones(7, 6))

    def test_hits_have_no_gradient(self) -> None:
        """Scores of hits with a gradient come from xcos_maps."""
        p, g = sides(2, 3)
        p = dataclasses.replace(p, features=p.features.clone().requires_grad_())
        assert not xcos_ext.xcos_topk(p, g, 2).values.requires_grad
