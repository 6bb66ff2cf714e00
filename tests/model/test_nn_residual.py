"""Heads that start from the closed form: attention that corrects norm attention, cells with a matrix for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from template_samples import attention, eager, features
from test_nn_attention import by_hand
from torch import Tensor, nn

import xcos_ext
from xcos_ext import backbones
from xcos_ext.model import CellProjection, ClosedFormHead, XCosAttention, XCosHead, XCosModel, load_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def closed_form(
    channels: int = 6, dim: int = 10, axes: int | None = 4, *, separable: bool = True, spread: bool = True
) -> ClosedFormHead:
    """A closed-form head of random numbers, fp64."""
    random = [torch.randn(*shape, dtype=F64) for shape in ((dim, channels), (49, dim, channels), (channels, 7, 7))]
    return ClosedFormHead(
        random[0] if separable else random[1],
        scale=random[2] if separable else None,
        spread=torch.rand(49, 49, dtype=F64) if spread else None,
        mean=torch.randn(dim, 7, 7, dtype=F64),
        basis=None if axes is None else torch.randn(49, axes, dim, dtype=F64),
        constant=torch.zeros(dim, dtype=F64),
        grid_shape=(channels, 7, 7),
    )


class TestResidualAttention:
    @pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"symmetric": True}], ids=str)
    def test_it_starts_as_norm_attention(self, options: dict[str, object]) -> None:
        net = XCosAttention(12, residual=True, **options).double().eval()  # type: ignore[arg-type]
        a, b = features(5, 12), features(5, 12)
        a[0, :, 2, 3] = 0
        expected = xcos_ext.xcos_score(a, b, "norm", return_maps=True)
        torch.testing.assert_close(net(a, b), expected.attention, rtol=0, atol=1e-6)  # the zero cell counts as 1e-6
        torch.testing.assert_close(net(a[1:], b[1:]), expected.attention[1:], rtol=1e-12, atol=0)

    def test_a_pair_without_signal_is_uniform_with_finite_gradients(self) -> None:
        net = XCosAttention(4, residual=True).eval()
        a = torch.zeros(2, 4, 7, 7, requires_grad=True)
        weights = net(a, torch.zeros(2, 4, 7, 7))
        torch.testing.assert_close(weights, torch.full((2, 7, 7), 1 / 49))
        (weights * torch.randn(7, 7)).sum().backward()
        assert a.grad is not None and torch.isfinite(a.grad).all()

    def test_formula(self) -> None:
        net = attention("residual")
        a, b = features(3), features(3)
        state = net.state_dict()
        # The published network with a last batch norm and activation that do nothing.
        neutral = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - 1e-5}
        state |= {f"attention.4.{name}": torch.tensor([value], dtype=F64) for name, value in neutral.items()}
        state["attention.5.weight"] = torch.ones(1, dtype=F64)
        own = by_hand(state, a, b)
        logs = a.norm(dim=1).log() + b.norm(dim=1).log()
        torch.testing.assert_close(net.logits(a, b), own + 1.7 * logs, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("kind", ["residual", "symmetric residual"])
    def test_all_pairs_are_the_pair_form(self, kind: str) -> None:
        net = attention(kind)
        a, b = features(4), features(5)
        a[0, :, 1, 1] = 0
        expected = eager(net, a, b)
        probes, gallery = net.templates(a), net.templates(b, "gallery")
        torch.testing.assert_close(xcos_ext.xcos_matrix(probes, gallery), expected, rtol=0, atol=1e-12)
        hits = xcos_ext.xcos_topk(probes, gallery, k=5)
        torch.testing.assert_close(hits.values, expected.sort(1, descending=True).values, rtol=0, atol=1e-12)
        maps = xcos_ext.xcos_maps(probes, gallery, torch.tensor([[0, 1], [3, 4]]), threshold=0.1)
        torch.testing.assert_close(maps.attention, net(a[[0, 3]], b[[1, 4]]), rtol=0, atol=1e-12)
        both = net.templates(a, "both")
        torch.testing.assert_close(xcos_ext.xcos_matrix(both, both), eager(net, a, a), rtol=0, atol=1e-12)

    def test_gradients_of_all_pairs_are_those_of_pairs(self) -> None:
        net = attention("residual", 8)

        def gradients(through: str) -> list[Tensor]:
            net.zero_grad()
            torch.manual_seed(4)
            x = features(4, 8).requires_grad_()
            if through == "pairs":
                scores = eager(net, x, x)
            else:
                t = net.templates(x, "both")
                scores = xcos_ext.xcos_matrix(t, t)
            (scores * torch.linspace(-1, 1, 16, dtype=F64).view(4, 4)).sum().backward()
            assert x.grad is not None
            return [x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

        for ours, theirs in zip(gradients("all"), gradients("pairs"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_stored_in_half_precision(self, dtype: torch.dtype) -> None:
        net = attention("residual").float()
        a, b = features(6, dtype=torch.float32), features(6, dtype=torch.float32)
        scores = xcos_ext.xcos_matrix(net.templates(a, dtype=dtype), net.templates(b, "gallery", dtype=dtype))
        tolerance = 3e-3 if dtype == torch.float16 else 2e-2
        torch.testing.assert_close(scores, eager(net, a, b), rtol=0, atol=tolerance)

    def test_templates_of_another_kind_are_told_apart(self) -> None:
        plain, residual = XCosAttention(8).eval(), XCosAttention(8, residual=True).eval()
        x = features(2, 8, dtype=torch.float32)
        with pytest.raises(RuntimeError, match="gallery"):
            xcos_ext.xcos_matrix(plain.templates(x), residual.templates(x, "gallery"))

    def test_min_shift_is_refused(self) -> None:
        with pytest.raises(ValueError, match="residual: expected normalize='softmax', got 'min-shift'"):
            XCosAttention(normalize="min-shift", residual=True)

    def test_the_first_step_moves_the_last_layer_and_the_second_all(self) -> None:
        head = XCosHead.from_closed_form(closed_form()).double().eval()
        optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
        x, y = torch.randn(6, 6, 7, 7, dtype=F64), torch.randn(6, 6, 7, 7, dtype=F64)
        for _ in range(2):
            optimiser.zero_grad()
            score = head.score(head.features(x), head.features(y))
            (score - 0.5).square().mean().backward()
            optimiser.step()
        gradients = {name: p.grad for name, p in head.named_parameters()}
        shift = gradients.pop("attention.attention.3.bias")  # the same for every cell: softmax cancels it
        assert shift is not None and shift.abs().max() < 1e-12
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


class TestCellProjection:
    @pytest.mark.parametrize("separable", [True, False])
    @pytest.mark.parametrize("spread", [True, False])
    @pytest.mark.parametrize("axes", [None, 4])
    def test_a_head_from_the_closed_form_scores_as_it(self, separable: bool, spread: bool, axes: int | None) -> None:
        closed = closed_form(axes=axes, separable=separable, spread=spread)
        head = XCosHead.from_closed_form(closed).double().eval()
        a, b = torch.randn(4, 6, 7, 7, dtype=F64), torch.randn(4, 6, 7, 7, dtype=F64)
        assert torch.equal(head.features(a), closed.features(a))
        torch.testing.assert_close(head(a, b).score, closed(a, b).score, rtol=1e-12, atol=1e-12)
        norm = XCosHead.from_closed_form(closed, "norm")
        assert torch.equal(norm(a, b).score, closed(a, b).score)

    def test_its_tensors_are_copies(self) -> None:
        closed = closed_form()
        head = XCosHead.from_closed_form(closed)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
        assert closed.weight.abs().max() > 0 and closed.mean is not None and closed.mean.abs().max() > 0

    def test_a_random_one_is_a_projection_of_every_cell(self) -> None:
        cells = CellProjection((6, 3, 2), 5, 4).double()
        x = torch.randn(2, 6, 3, 2, dtype=F64)
        assert cells.basis is not None
        expected = torch.einsum("kd,dc,nchw->nkhw", cells.basis[0], cells.weight, x)
        torch.testing.assert_close(cells(x), expected)

    def test_half_precision_maps_and_autocast(self) -> None:
        cells = CellProjection((6, 7, 7), 5)
        x = torch.randn(2, 6, 7, 7).half()
        with torch.autocast("cpu", torch.bfloat16):
            inside = cells(x)
        assert inside.dtype == torch.float32 and torch.equal(inside, cells(x.float()))

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"grid: expected \[N, 6, 7, 7\], got \[1, 6, 5, 7\]"):
            CellProjection((6, 7, 7), 5)(torch.randn(1, 6, 5, 7))
        with pytest.raises(ValueError, match=r"channels: expected 1\.\.5 or None, got 6"):
            CellProjection((6, 7, 7), 5, 6)
        with pytest.raises(ValueError, match="projection: expected one from 6 to 4 channels, got one from 6 to 5"):
            XCosHead(6, 4, projection=CellProjection((6, 7, 7), 5))
        with pytest.raises(ValueError, match="projection: expected a CellProjection, 'shared' or 'none', got 'x'"):
            XCosHead(6, 4, projection="x")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="projection: expected 6 channels, as the map has, with 'none', got 4"):
            XCosHead(6, 4, projection="none")
        with pytest.raises(ValueError, match="attention: expected 'norm' or an XCosAttention with residual=True"):
            XCosHead.from_closed_form(closed_form(), XCosAttention(4))

    def test_no_projection(self) -> None:
        head = XCosHead(8, 8, projection="none").eval()
        x = torch.randn(2, 8, 7, 7)
        assert head.features(x) is x
        assert not any(name.startswith("conv1x1") for name, _ in head.named_parameters())


def test_files_keep_every_form_of_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = backbones.create("mobilefacenet", output=False)
    forms: dict[str, XCosHead] = {
        "shared": XCosHead(512, 8, attention=XCosAttention(8, 4, residual=True)),
        "cells": XCosHead.from_closed_form(closed_form(512, 10, 4).float()),
        "matrices": XCosHead(512, 4, attention="norm", projection=CellProjection((512, 7, 7), 4, separable=False)),
    }
    images = torch.randn(2, 3, 112, 112)
    fingerprints = set()
    for name, head in forms.items():
        for module in head.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels == 1:
                nn.init.normal_(module.weight)
        model = XCosModel(body, head, name=name).eval()
        save_model(model, tmp_path / "x.safetensors")
        loaded = load_model(tmp_path / "x.safetensors")
        assert loaded.head.config() == head.config()
        assert loaded.fingerprint() == model.fingerprint()
        fingerprints.add(model.fingerprint())
        with torch.no_grad():
            assert torch.equal(loaded(images, images.flip(0)).score, model(images, images.flip(0)).score)
    assert len(fingerprints) == 3
