"""Heads that match cells with their neighbourhoods: scores, files, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import xcos_ext
from xcos_ext import backbones
from xcos_ext.evaluation import all_pair_scores, calibrate, fmr_curve, fmr_threshold
from xcos_ext.model import ClosedFormHead, XCosAttention, XCosHead, XCosModel, load_model, save_model


def closed_form() -> ClosedFormHead:
    return ClosedFormHead(torch.randn(5, 6), scale=torch.rand(6, 4, 3), constant=torch.randn(5), grid_shape=(6, 4, 3))


def learned(attention) -> XCosHead:
    return XCosHead(6, 8, attention=attention).eval()


HEADS = {
    "closed form": closed_form,
    "learned": lambda: learned(XCosAttention(8)),
    "min-shift": lambda: learned(XCosAttention(8, normalize="min-shift")),
    "norm": lambda: learned("norm"),
    "uniform": lambda: learned("uniform"),
}


@pytest.mark.parametrize("match", ["best", "soft"])
@pytest.mark.parametrize("kind", HEADS)
def test_matched_s_and_the_attention_of_the_pair(kind, match):
    head = HEADS[kind]()
    a, b = torch.randn(2, 3, head.channels, 4, 3)
    plain = head.score(a, b, return_maps=True)
    head.set_matching(1, match, 0.2)
    maps = head.score(a, b, return_maps=True)
    assert torch.equal(maps.attention, plain.attention)
    soft = {"temperature": 0.2} if match == "soft" else {}
    assert torch.equal(maps.similarity, xcos_ext.grid_match(a, b, radius=1, match=match, **soft))
    torch.testing.assert_close(maps.score, (maps.attention * maps.similarity).sum((1, 2)))
    assert torch.equal(head.score(a, b), maps.score)
    head.set_matching(0)
    assert torch.equal(head.score(a, b), plain.score)


@pytest.mark.parametrize("kind", HEADS)
def test_templates_are_refused(kind):
    head = HEADS[kind]()
    features = torch.randn(2, head.channels, 4, 3)
    head.templates(features)
    head.set_matching(2)
    with pytest.raises(
        RuntimeError, match="templates: expected a head that compares cells in their places, got radius 2"
    ):
        head.templates(features)
    head.set_matching(0)
    head.templates(features)


def test_settings_of_heads_in_place_are_what_they_were():
    """Fingerprints and files of models that do not match stay the same."""
    for make in HEADS.values():
        assert "matching" not in make().config()
    head = XCosHead(6, 8)
    head.set_matching(2, "soft", 0.05)
    assert head.config()["matching"] == {"radius": 2, "match": "soft", "temperature": 0.05}
    again = XCosHead.from_config(head.config())
    assert (again.radius, again.match, again.match_temperature) == (2, "soft", 0.05)


@pytest.mark.parametrize("kind", ["learned", "closed form"])
def test_files_keep_the_setting(kind, tmp_path):
    backbone = backbones.create("mobilefacenet").eval()
    learned = kind == "learned"
    model = XCosModel(backbone, XCosHead(512, 8)).eval() if learned else xcos_ext.plug(backbone, centre=False)
    before = model.fingerprint()
    model.head.set_matching(1, "soft", 0.3)
    assert model.fingerprint() != before
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert (loaded.head.radius, loaded.head.match, loaded.head.match_temperature) == (1, "soft", 0.3)
    a, b = torch.randn(2, 2, model.head.channels, 7, 7)
    torch.testing.assert_close(loaded.score(a, b), model.score(a, b))
    with pytest.raises(RuntimeError, match=r"call head\.set_matching\(0\) first"):
        loaded.templates(a)


def test_calibration_is_of_the_matching_it_was_made_with():
    curve = fmr_curve(np.arange(100) / 100)
    model = XCosModel(torch.nn.Identity(), XCosHead(6, 6, attention="norm", projection="none"), threshold=0.3).eval()
    model.fmr_thresholds[0.1], model.fmr_curve = 0.4, curve
    model.head.set_matching(1)
    assert (model.threshold, model.fmr_thresholds, model.fmr_curve) == (None, {}, None)
    assert copy.deepcopy(model).threshold is None
    model.head.set_matching(0)
    assert (model.threshold, model.fmr_thresholds, model.fmr_curve) == (0.3, {0.1: 0.4}, curve)

    model.head.set_matching(1)
    features, people = torch.randn(30, 6, 7, 7), [f"p{i}" for i in range(30)]
    scores, _ = all_pair_scores(model, features, people)
    first, second = np.triu_indices(30, 1)
    np.testing.assert_allclose(scores, model.score(features[first], features[second]).detach().numpy(), atol=1e-6)
    model.set_calibration(calibrate(model, features, people, decision_fmr=0.1, fmrs=(0.1,)))
    assert model.threshold == model.fmr_thresholds[0.1] == fmr_threshold(scores, 0.1)
    model.head.set_matching(2)
    assert model.threshold is None


def test_files_keep_no_threshold_of_another_matching(tmp_path):
    model = XCosModel(backbones.create("mobilefacenet"), XCosHead(512, 8), threshold=0.3).eval()
    model.head.set_matching(1)
    save_model(model, tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").threshold is None
    model.threshold = 0.4
    save_model(model, tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").threshold == 0.4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1,), "radius: expected an integer from 0 to 7, got -1"),
        ((8,), "radius: expected an integer from 0 to 7, got 8"),
        ((1.0,), "radius: expected an integer from 0 to 7, got 1.0"),
        ((1, "worst"), "match: expected 'best' or 'soft', got 'worst'"),
        ((1, "soft", 0.0), "temperature: expected a finite number above 0, got 0.0"),
    ],
)
def test_bad_settings(arguments, message):
    head = XCosHead(6, 8)
    with pytest.raises(ValueError, match=message):
        head.set_matching(*arguments)
    assert head.radius == 0
