"""Heads and XCosModel: scores equal the reference, shapes, gradients through the whole model, fingerprints, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import TinyBackbone
from torch import nn

from xcos_ext import backbones, reference
from xcos_ext.card.preprocessing import IMAGENET
from xcos_ext.faces import AlignedFace
from xcos_ext.model import ClosedFormHead, XCosAttention, XCosHead, XCosModel
from xcos_ext.model.model import Preprocessing
from xcos_ext.ops import XCosScore


def attention(**options: object) -> XCosAttention:
    return XCosAttention(4, 3, **({"symmetric": False} | options))  # type: ignore[arg-type]


HEADS = {
    "softmax": lambda: XCosHead(6, 4, attention=attention(temperature=0.7)),
    "min-shift": lambda: XCosHead(6, 4, attention=attention(normalize="min-shift")),
    "symmetric": lambda: XCosHead(6, 4, attention=attention(symmetric=True)),
    "uniform": lambda: XCosHead(6, 4, attention="uniform"),
    "norm": lambda: XCosHead(6, 4, attention="norm"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_score_is_the_reference(kind: str) -> None:
    head = HEADS[kind]().eval()
    a, b = head.features(torch.randn(3, 6, 7, 7)), head.features(torch.randn(3, 6, 7, 7))
    result = head.score(a, b, return_maps=True)
    weights = {"uniform": None, "norm": "norm"}.get(kind, head.attention(a, b) if head.attention else None)
    expected = reference.xcos_score(a, b, weights, return_maps=True)
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.score(a, b), result.score)
    torch.testing.assert_close((result.attention * result.similarity).sum((1, 2)), result.score)


def test_symmetric_score_does_not_depend_on_the_order() -> None:
    head = HEADS["symmetric"]().eval()
    a, b = torch.randn(3, 4, 7, 7), torch.randn(3, 4, 7, 7)
    torch.testing.assert_close(head.score(a, b), head.score(b, a))


def test_default_head_is_the_published_one() -> None:
    head = XCosHead()
    names = {k: tuple(v.shape) for k, v in head.state_dict().items() if k.startswith("conv1x1")}
    assert names == {
        "conv1x1.0.weight": (32, 512, 1, 1),
        "conv1x1.0.bias": (32,),
        "conv1x1.1.weight": (32,),
        "conv1x1.1.bias": (32,),
        "conv1x1.1.running_mean": (32,),
        "conv1x1.1.running_var": (32,),
        "conv1x1.1.num_batches_tracked": (),
        "conv1x1.2.weight": (32,),
    }
    identity = head.identity(head.features(torch.randn(2, 512, 7, 7)))
    assert identity.shape == (2, 1568)
    torch.testing.assert_close(identity.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    model = XCosModel(TinyBackbone(), HEADS[kind]())
    images = torch.randn(4, 3, 112, 112)
    model(images, images.flip(0)).score.square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing


def test_forward_and_features() -> None:
    model = XCosModel(TinyBackbone(), HEADS["softmax"](), threshold=0.25, name="tiny").eval()
    a, b = torch.randn(2, 3, 112, 112), torch.randn(2, 3, 112, 112)
    result = model(a, b)
    assert isinstance(result, XCosScore)
    assert [tuple(part.shape) for part in result] == [(2,), (2, 7, 7), (2, 7, 7)]
    features = model.features(a)
    assert features.shape == (2, 4, 7, 7)
    torch.testing.assert_close(model.score(features, model.features(b)), result.score)
    assert (model.threshold, model.name, model.architecture) == (0.25, "tiny", "custom")


def test_any_module_can_be_the_backbone() -> None:
    model = XCosModel(nn.Conv2d(3, 6, 16, 16), HEADS["norm"]()).eval()
    assert model.features(torch.randn(1, 3, 112, 112)).shape == (1, 4, 7, 7)
    with pytest.raises(RuntimeError, match="not a Recogniser"):
        model.embedding(torch.randn(1, 3, 112, 112))


def test_fingerprint_follows_weights_head_and_preprocessing() -> None:
    torch.manual_seed(1)
    model = XCosModel(TinyBackbone(), HEADS["softmax"]()).eval()
    first = model.fingerprint()
    assert len(first) == 16 and first == model.fingerprint()
    for _ in range(2):  # running the model in training mode moves only what it should
        model.features(torch.zeros(1, 3, 112, 112))
    assert model.fingerprint() == first
    other = XCosModel(model.backbone, model.head, preprocessing=IMAGENET)
    assert other.fingerprint() != first
    warm = XCosHead(6, 4, attention=attention(temperature=0.8))
    warm.load_state_dict(model.head.state_dict())
    assert XCosModel(model.backbone, warm).fingerprint() != first
    with torch.no_grad():
        model.backbone.conv.bias[0] += 1e-6
    assert model.fingerprint() != first


def test_closed_form_head_checks_its_tensors() -> None:
    weight, constant = torch.randn(5, 6), torch.zeros(5)
    good = ClosedFormHead(weight, scale=torch.ones(6, 7, 7), constant=constant, grid_shape=(6, 7, 7))
    assert good.features(torch.randn(2, 6, 7, 7)).shape == (2, 5, 7, 7)
    with pytest.raises(ValueError, match=r"weight: expected \[49, 5, 6\], got \[5, 6\]"):
        ClosedFormHead(weight, constant=constant, grid_shape=(6, 7, 7))
    with pytest.raises(ValueError, match=r"mean: expected \[5, 7, 7\], got \[5\]"):
        ClosedFormHead(weight, scale=torch.ones(6, 7, 7), mean=constant, constant=constant, grid_shape=(6, 7, 7))
    with pytest.raises(ValueError, match=r"grid: expected \[N, 6, 7, 7\], got \[2, 6, 14, 14\]"):
        good.features(torch.randn(2, 6, 14, 14))


def test_errors_name_argument_expected_and_got() -> None:
    model = XCosModel(TinyBackbone(), HEADS["norm"]())
    good = torch.randn(1, 3, 112, 112)
    with pytest.raises(ValueError, match=r"images: expected \[N, 3, 112, 112\], got \[1, 3, 96, 96\]"):
        model.features(torch.randn(1, 3, 96, 96))
    with pytest.raises(ValueError, match=r"images_b: expected \[N, 3, 112, 112\], got \[3, 112, 112\]"):
        model(good, good[0])
    with pytest.raises(TypeError, match=r"images: expected normalised floating-point images, got torch.uint8"):
        model.features(torch.zeros(1, 3, 112, 112, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="built without its output block"):
        XCosModel(backbones.create("mobilefacenet", output=False), XCosHead()).eval().embedding(good)
    with pytest.raises(ValueError, match="threshold: expected a finite number or None"):
        XCosModel(TinyBackbone(), HEADS["norm"](), threshold=float("nan"))
    model = XCosModel(TinyBackbone(), HEADS["norm"](), threshold=np.float32(0.5))
    assert type(model.threshold) is float
    for wrong, error in ((float("inf"), ValueError), ("0.3", TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"threshold: expected a (finite )?number or None, got"):
            model.threshold = wrong
    assert model.threshold == 0.5
    a, b = torch.zeros(1, 4, 7, 7), torch.zeros(2, 4, 7, 7)
    with pytest.raises(ValueError, match=r"features_b: expected shape \[1, 4, 7, 7\] like features_a, got \[2, 4, 7"):
        HEADS["symmetric"]().score(a, b)
    with pytest.raises(TypeError, match="features_a, features_b: expected tensors"):
        model.score(a.numpy(), b.numpy())  # type: ignore[call-overload]
    closed = ClosedFormHead(torch.randn(5, 6), scale=torch.ones(6, 7, 7), constant=torch.zeros(5), grid_shape=(6, 7, 7))
    for head in (HEADS["symmetric"]().eval(), XCosHead(6, 4, attention="norm").eval(), closed):
        grid = torch.randn(2, head.in_channels, 7, 7)  # the backbone's map, of which F was not made
        for name, call in (
            ("features_a", lambda x, head=head: head.score(x, x)),
            ("templates: features", head.templates),
        ):
            with pytest.raises(
                ValueError, match=rf"^{name}: expected \[N, {head.channels}, H, W\], .*head.features\(map\)"
            ):
                call(grid)
            with pytest.raises(
                ValueError, match=rf"^{name}: expected \[N, {head.channels}, H, W\], got \[2, 9, 7, 7\]$"
            ):
                call(torch.randn(2, 9, 7, 7))
            call(head.features(grid))
    with pytest.raises(TypeError, match="return_maps: expected True or False, got str"):
        XCosHead(6, 4, attention="norm").score(a, a, return_maps="no")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        model.features_of([], batch_size=0)
    with pytest.raises(ValueError, match="in_channels, channels: expected positive integers, got 4 and 0"):
        XCosHead(4, 0)
    for nothing in (np.zeros((1, 3, 28, 28), np.float32), None, []):
        with pytest.raises(TypeError, match=r"images: expected a tensor \[N, 3, 112, 112\], got"):
            model.features(nothing)
    with pytest.raises(ValueError, match=r"grid: expected \[N, 6, H, W\]"):
        XCosHead(6, 4, attention="uniform").features(torch.randn(1, 5, 7, 7))
    with pytest.raises(ValueError, match="attention: expected 4 channels, got one for 32"):
        XCosHead(6, 4, attention=XCosAttention())
    with pytest.raises(ValueError, match="attention: expected an XCosAttention"):
        XCosHead(6, 4, attention="corr")  # type: ignore[arg-type]


class TestPreprocessing:
    def test_values(self) -> None:
        face = np.arange(112 * 112 * 3, dtype=np.int64).reshape(112, 112, 3).astype(np.uint8)
        out = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))([face, face])
        assert out.shape == (2, 3, 112, 112) and out.dtype == torch.float32 and out.is_contiguous()
        for channel, (mean, std) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)]):
            expected = (face[:, :, channel] / 255 - mean) / std
            np.testing.assert_allclose(out[1, channel].numpy(), expected, atol=1e-6)

    def test_one_face_a_batch_and_none(self) -> None:
        face = np.full((112, 112, 3), 255, np.uint8)
        assert torch.equal(Preprocessing()(face), torch.ones(1, 3, 112, 112))
        assert torch.equal(Preprocessing()(np.stack([face, face])), torch.ones(2, 3, 112, 112))
        assert Preprocessing()([]).shape == (0, 3, 112, 112)

    def test_errors(self) -> None:
        with pytest.raises(TypeError, match=r"faces\[0\]: expected a uint8 array, got float64"):
            Preprocessing()([np.zeros((112, 112, 3))])
        with pytest.raises(ValueError, match=r"faces\[1\]: .*\(112, 112, 3\), got \(100, 112, 3\)"):
            Preprocessing()([np.zeros((112, 112, 3), np.uint8), np.zeros((100, 112, 3), np.uint8)])
        face = np.zeros((112, 112, 3), np.uint8)
        for given, name in ((np.ma.masked_array(face), "faces"), ([face, np.ma.masked_array(face)], r"faces\[1\]")):
            with pytest.raises(TypeError, match=f"^{name}: expected an array without a mask"):
                Preprocessing()(given)
        with pytest.raises(TypeError, match=r"faces\[0\]: expected a uint8 array, got AlignedFace; its .rgb is"):
            Preprocessing()([AlignedFace(face, "x", None, 1)])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="std: expected three positive numbers"):
            Preprocessing(std=(1.0, 0.0, 1.0))
        with pytest.raises(ValueError, match="mean: expected three finite numbers"):
            Preprocessing(mean=(0.5, 0.5))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="size: expected two positive integers"):
            Preprocessing(size=(0, 112))
