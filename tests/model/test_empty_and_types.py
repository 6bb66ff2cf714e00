"""No pictures, other float types, and pixels that were never normalised."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from networks import TinyBackbone

import xcos_ext
from xcos_ext import backbones
from xcos_ext.deploy import for_inference
from xcos_ext.explain import explain
from xcos_ext.explain.explainers import create
from xcos_ext.explain.explainers.interface import EmbeddingCosine, as_pair_model
from xcos_ext.model import CellProjection, ClosedFormHead, XCosAttention, XCosHead, XCosModel
from xcos_ext.model.loading import _bare

NOBODY = torch.zeros(0, 3, 112, 112)
HEADS: dict[str, Any] = {
    "learned": lambda: XCosHead(6, 4),
    "ordered": lambda: XCosHead(6, 4, attention=XCosAttention(4, symmetric=False)),
    "residual": lambda: XCosHead(6, 4, attention=XCosAttention(4, residual=True)),
    "cells": lambda: XCosHead(6, 4, attention="norm", projection=CellProjection((6, 7, 7), 5, 4)),
    "uniform": lambda: XCosHead(6, 6, attention="uniform", projection="none"),
    "closed form": lambda: ClosedFormHead(
        torch.eye(6), scale=torch.ones(6, 7, 7), constant=torch.zeros(6), grid_shape=(6, 7, 7)
    ),
}


@pytest.mark.parametrize("name", ["slim", "mobilefacenet", "mobilefacenet_relu", "ir_se_50", "iresnet18"])
def test_no_pictures_through_every_backbone(name: str) -> None:
    body = _bare(lambda: backbones.create(name)).eval()
    assert body.grid(NOBODY).shape == (0, *body.grid_shape)
    if body.embedding_size is not None:
        assert body(NOBODY).shape == (0, body.embedding_size)


@pytest.mark.parametrize("kind", HEADS)
def test_no_pictures_through_a_model(kind: str) -> None:
    model = XCosModel(TinyBackbone(), HEADS[kind]()).eval()
    channels = model.head.channels
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            features = model.features(NOBODY)
            assert features.shape == model.features_of([]).shape == (0, channels, 7, 7)
            assert [m.shape for m in model(NOBODY, NOBODY)] == [(0,), (0, 7, 7), (0, 7, 7)]
            assert model.score(features, features).shape == (0,)
            assert [len(model.templates(features, role)) for role in ("probe", "gallery", "both")] == [0, 0, 0]
    assert xcos_ext.xcos_matrix(model.templates(features), model.templates(features, "gallery")).shape == (0, 0)


def test_no_pictures_through_the_shipped_model() -> None:
    model = xcos_ext.load_model().requires_grad_(False)
    for form in (model, for_inference(model)):
        assert [tuple(m.shape) for m in form(NOBODY, NOBODY)] == [(0,), (0, 7, 7), (0, 7, 7)]
        assert form.features_of([]).shape == (0, 32, 7, 7)
    body = model.backbone
    assert isinstance(body, backbones.Recogniser)
    for images in (torch.randn(2, 3, 112, 112), torch.randn(2, 3, 112, 112).to(memory_format=torch.channels_last)):
        traced = torch.jit.trace(lambda x: body.grid(x), images[:1], check_trace=False)
        assert torch.equal(traced(images), body.grid(images))  # no batch size is baked in


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.thorough
def test_models_of_any_float_type_take_pictures(dtype: torch.dtype) -> None:
    model = xcos_ext.load_model()
    other = copy.deepcopy(model).to(dtype)
    faces = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
    wanted, got = explain(model, *faces), explain(other, *faces)
    assert got.score == pytest.approx(wanted.score, abs=2e-2 if dtype.itemsize == 2 else 1e-5)
    assert other.features_of(list(faces)).dtype == dtype
    with torch.no_grad():
        assert for_inference(other).features_of(list(faces)).dtype == torch.float32
    pictures = model.preprocessing(faces)
    for method in ("xcos", "gradcam", "xssab"):
        maps = create(method)(as_pair_model(other), pictures[:1], pictures[1:])
        assert maps.similar.dtype == torch.float32 and bool(maps.similar.isfinite().all()), method


def test_a_recogniser_of_another_float_type_takes_pictures() -> None:
    body = backbones.create("mobilefacenet", embedding_size=8).double().eval()
    assert body(torch.zeros(1, 3, 112, 112)).dtype == torch.float64
    cosine = EmbeddingCosine(body, threshold=0.3)
    maps = create("gradcam")(cosine, torch.randn(1, 3, 112, 112), torch.randn(1, 3, 112, 112))
    assert bool(maps.similar.isfinite().all())


def test_pixels_that_were_never_normalised_are_refused() -> None:
    model = XCosModel(TinyBackbone(), XCosHead(6, 4)).eval().requires_grad_(False)
    fine, raw = torch.randn(1, 3, 112, 112), torch.randint(0, 256, (1, 3, 112, 112)).float()
    message = r"expected pixels normalised to -1 \.\. 1, got 0 \.\. 255; call model\.preprocessing\(faces\) first"
    with pytest.raises(ValueError, match=f"^images_b: {message}"):
        model(fine, raw)
    with pytest.raises(ValueError, match=f"^images: {message}"):
        model.features(raw.half())
    # Noise and attacks leave the range a little; what is not finite stays in its pair.
    for images in (3 * fine.clamp(-3, 3), torch.full_like(fine, torch.nan), torch.full_like(fine, torch.inf)):
        assert model(fine, images).score.shape == (1,)
    # Training augments as it likes; graphs depend on no values.
    assert model.train()(fine, raw).score.shape == (1,)
    model.eval()
    assert torch.jit.trace(lambda x: model.features(x), fine, check_trace=False)(raw).shape == (1, 4, 7, 7)
    assert torch.vmap(model.features)(raw[None]).shape == (1, 1, 4, 7, 7)
