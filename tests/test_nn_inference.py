"""Models made ready for embedding many pictures."""

from __future__ import annotations

import pytest
import torch

from xcos_ext import backbones
from xcos_ext.calibration import Calibration
from xcos_ext.nn import XCosHead, XCosModel, for_inference

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str) -> XCosModel:
    body = backbones.create(name, output=False)
    for module in body.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # new ones would fold to nothing
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return XCosModel(body, XCosHead(body.grid_shape[0]), name=name).eval()


@pytest.mark.parametrize("name", ["compact", "mobilefacenet", "mobilefacenet_relu", "ir_se_50"])
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

    assert norms(ready.backbone) < 0.6 * norms(model.backbone)
    assert norms(model.backbone) > 0 and any(p.requires_grad for p in model.parameters())  # the model is untouched


def test_what_belongs_to_the_model_stays() -> None:
    model = make("compact")
    model.set_calibration(Calibration(0.3, "a test", {1e-2: 0.25, 1e-3: 0.35}))
    ready = for_inference(model)
    assert (ready.threshold, ready.fmr_thresholds, ready.preprocessing, ready.name) == (
        0.3, model.fmr_thresholds, model.preprocessing, "compact",
    )  # fmt: skip
    features = torch.randn(2, 32, 7, 7)
    assert torch.equal(model.score(*features.split(1)), ready.score(*features.split(1)))


def test_training_mode_and_other_dtypes_are_refused() -> None:
    model = make("compact")
    with pytest.raises(ValueError, match=r"dtype: expected float32, bfloat16, float16 or None, got torch\.int8"):
        for_inference(model, torch.int8)
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        for_inference(model.train())
