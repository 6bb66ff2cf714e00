"""Models made ready for embedding many pictures."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import xcos_ext
from xcos_ext import backbones
from xcos_ext.card.calibration import Calibration
from xcos_ext.deploy import for_inference, inference
from xcos_ext.deploy.inference import can_pack, pack
from xcos_ext.model import XCosHead, XCosModel

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str) -> XCosModel:
    body = backbones.create(name, output=False)
    for module in body.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # new ones would fold to nothing
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return XCosModel(body, XCosHead(body.grid_shape[0]), name=name).eval()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["slim", "mobilefacenet", "mobilefacenet_relu", "ir_se_50"])
def test_features_stay_and_batch_norms_behind_convolutions_go(name: str) -> None:
    model = make(name)
    ready = for_inference(model)
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        wanted, got = model.features(images), ready.features(images)
        assert got.is_contiguous() and got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        half = for_inference(model, torch.bfloat16).features(images)
    assert half.dtype == torch.float32
    assert (half - wanted).norm() < 0.05 * wanted.norm()

    def norms(net: torch.nn.Module) -> int:
        return sum(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())

    assert norms(ready.backbone) <= 0.6 * norms(model.backbone)
    assert (norms(model.backbone) > 0) == (name != "slim")  # which never had any
    assert any(p.requires_grad for p in model.parameters())  # the model is untouched


def test_what_belongs_to_the_model_stays() -> None:
    model = make("slim")
    model.set_calibration(Calibration(0.3, "a test", {1e-2: 0.25, 1e-3: 0.35}))
    ready = for_inference(model)
    assert (ready.threshold, ready.fmr_thresholds, ready.preprocessing, ready.name) == (
        0.3, model.fmr_thresholds, model.preprocessing, "slim",
    )  # fmt: skip
    features = torch.randn(2, 32, 7, 7)
    assert torch.equal(model.score(*features.split(1)), ready.score(*features.split(1)))


def test_training_mode_and_other_dtypes_are_refused() -> None:
    model = make("slim")
    with pytest.raises(ValueError, match=r"dtype: expected float32, bfloat16, float16 or None, got torch\.int8"):
        for_inference(model, torch.int8)
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        for_inference(model.train())


def test_the_heads_block_is_folded_and_templates_stay() -> None:
    model = make("slim")
    assert isinstance(model.head, XCosHead)
    norm = model.head.conv1x1[1]
    norm.running_mean.normal_(0, 0.5)  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    ready = for_inference(model)
    assert isinstance(ready.head, XCosHead) and not any(isinstance(m, torch.nn.BatchNorm2d) for m in ready.head.conv1x1)
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        features = model.features(images)
        torch.testing.assert_close(ready.features(images), features, rtol=1e-3, atol=1e-4)
        wanted, got = model.templates(features), ready.templates(features)
    assert torch.equal(wanted.features, got.features)
    assert xcos_ext.xcos_matrix(got, ready.templates(features, "gallery")).shape == (2, 2)
    assert isinstance(model.head.conv1x1[1], torch.nn.BatchNorm2d)  # the model is untouched


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["slim", "mobilefacenet", "mobilefacenet_relu"])
def test_packed_weights_change_nothing_but_the_time(name: str, dtype: torch.dtype) -> None:
    model = make(name)
    plain, packed = for_inference(model, dtype, packed=False), for_inference(model, dtype)
    assert not plain.backbone.packed and packed.backbone.packed == can_pack(dtype)
    close = 1e-4 if dtype == torch.float32 else 0.03
    with torch.no_grad():
        for n in (1, 3):
            images = torch.randn(n, 3, 112, 112)
            wanted, got = plain.features(images), packed.features(images)
            assert got.shape == wanted.shape and got.is_contiguous()
            assert (got - wanted).norm() <= close * wanted.norm()


@pytest.mark.skipif(not can_pack(), reason="torch without oneDNN")
def test_activations_and_residual_sums_go_into_the_convolutions() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.same = torch.nn.Conv2d(4, 4, 3, padding="same")
            self.clip = torch.nn.ReLU6()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + self.b(self.clip(self.a(x)))  # both fused
            y = self.c(y).relu() + y.mean((2, 3), keepdim=True)  # a sum with broadcasting: not of this kind
            z = self.a(y)
            return self.same(z) + z  # a text for padding stays as it is; z has two users

    body = torch.fx.symbolic_trace(Net().eval())
    x = torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last)
    packed = pack(body, x)
    kinds = [type(module).__name__ for name, module in packed.named_modules() if name.startswith("packed_")]
    assert sorted(kinds) == ["_Packed", "_Packed", "_Packed", "_PackedSum"]
    assert isinstance(packed.same, torch.nn.Conv2d) and not hasattr(packed, "clip")
    with torch.no_grad():
        for images in (x, x[:1], torch.randn(3, 4, 5, 6)):
            torch.testing.assert_close(packed(images), body(images), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(body(images), body(images.clone()))  # the original is untouched


def test_copies_and_gradients_go_through_plain_weights() -> None:
    ready = for_inference(make("slim"))
    images = torch.randn(2, 3, 112, 112)
    copied = copy.deepcopy(ready)
    assert ready.backbone.packed == can_pack() and not copied.backbone.packed
    with torch.no_grad():
        torch.testing.assert_close(copied.features(images), ready.features(images), rtol=1e-4, atol=1e-4)
    images.requires_grad_()
    ready.features(images).square().sum().backward()
    assert images.grad is not None and bool(images.grad.abs().sum() > 0)


def test_large_batches_go_through_in_pieces() -> None:
    ready = for_inference(make("mobilefacenet"))
    body = ready.backbone
    assert 8 <= body.piece <= 32  # 128 channels at 56 x 56 pixels in fp32 are 1.5 MiB a picture
    images, sizes = torch.randn(7, 3, 112, 112), []
    run = body._run
    body.piece, body._run = 3, lambda part: (sizes.append(part.shape[0]), run(part))[1]
    with torch.no_grad():
        pieces = ready.features(images)
        assert sizes == [3, 3, 1]
        torch.testing.assert_close(pieces, torch.cat([ready.features(x[None]) for x in images]), rtol=1e-4, atol=1e-3)


def test_a_convolution_that_onednn_refuses_leaves_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(inference, "pack", refuse)
    model = make("slim")
    ready = for_inference(model)
    images = torch.randn(1, 3, 112, 112)
    assert not ready.backbone.packed
    with torch.no_grad():
        torch.testing.assert_close(ready.features(images), model.features(images), rtol=1e-3, atol=1e-3)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not can_pack()


def test_models_are_prepared_in_threads_while_others_run() -> None:
    """While torch.fx follows a network, it patches nn.Module for every thread."""
    model, images = make("slim"), torch.randn(1, 3, 112, 112)
    call = nn.Module.__call__
    with torch.no_grad():
        wanted = [m.features(images) for m in (model, for_inference(model))]

    def work(i: int) -> torch.Tensor:
        with torch.no_grad():
            return (for_inference(model) if i % 2 else model).features(images)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(made, wanted[i % 2]) for i, made in enumerate(pool.map(work, range(12))))
    assert nn.Module.__call__ is call


def test_prepared_models_can_be_pickled() -> None:
    ready, images = for_inference(make("slim"), packed=False), torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(pickle.loads(pickle.dumps(ready)).features(images), ready.features(images))
