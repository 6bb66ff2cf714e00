"""What a score means: the curve from score to false match rate, in files, on the terminal and in the figure."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from drawn import background, draw_face
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from xcos_ext import backbones
from xcos_ext import evaluation as ev
from xcos_ext.card import Calibration, FMRCurve
from xcos_ext.cli.app import xcos
from xcos_ext.faces import align_face
from xcos_ext.io.errors import ModelError
from xcos_ext.model import PlugStatistics, XCosHead, XCosModel, load_model, plug, save_model

CURVE = FMRCurve((0.0, 0.1, 0.3, 0.5), (1.0, 0.1, 0.01, 0.001), (1.0, 0.12, 0.015, 0.004), 0.003, 1000, 46)


def test_interpolation_is_monotone_and_exact_at_its_points() -> None:
    for score, rate, upper in zip(CURVE.scores[:3], CURVE.rates, CURVE.upper95, strict=False):
        assert CURVE.at(score) == pytest.approx((rate, upper, True))
    assert CURVE.at(0.2).rate == pytest.approx(math.sqrt(0.1 * 0.01))
    rates = [CURVE.at(score).rate for score in np.linspace(-1, 1, 500)]
    assert all(b <= a for a, b in itertools.pairwise(rates))
    assert CURVE.at(-5).rate == 1


def test_what_cannot_be_told_is_not_claimed() -> None:
    for score in (0.5, 0.6, 100.0):  # 0.001 is one false match in 1,000: below what the sample can tell
        found = CURVE.at(score)
        assert (found.rate, found.resolved) == (0.003, False)
        assert str(found) == "below 0.30 %, the smallest this calibration resolves"
    assert str(CURVE.at(0.3)) == "1.0 %, at most 1.5 % with 95 % confidence"
    assert str(CURVE.at(0.0)) == "100 %"
    with pytest.raises(ValueError, match="score: expected a finite number, got nan"):
        CURVE.at(math.nan)


BAD = [
    ({"scores": [0.0, 0.1, 0.1, 0.5]}, "scores: expected an ascending sequence"),
    ({"scores": [0.0, 0.1]}, "expected as many finite numbers as scores"),
    ({"scores": [], "rates": [], "upper95": []}, "at least one"),
    ({"scores": [0.0, 0.1, 0.3, math.inf]}, "finite"),
    ({"rates": [1.0, 0.1, 0.2, 0.001]}, "rates: expected rates in"),
    ({"rates": [1.0, 0.1, 0.01, 0.0]}, "rates: expected rates in"),
    ({"upper95": [1.0, 0.05, 0.015, 0.004]}, "upper95: expected bounds that are not below"),
    ({"smallest": 0}, "smallest: expected a rate"),
    ({"pairs": 0}, "pairs, people: expected positive"),
    ({"scores": "high"}, None),
    ({"people": "many"}, None),
    ({"rates": None}, None),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_tables_of_another_form(change: dict[str, Any], message: str | None) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FMRCurve.from_dict(CURVE.as_dict() | change)


def test_plain_values_round_trip() -> None:
    assert FMRCurve.from_dict(json.loads(json.dumps(CURVE.as_dict()))) == CURVE
    calibration = Calibration(0.3, "by hand", {0.1: 0.1, 0.01: 0.3}, 1000, CURVE)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.as_dict()))) == calibration
    without = dataclasses.replace(calibration, curve=None)
    assert Calibration.from_dict(json.loads(json.dumps(without.as_dict()))) == without
    old = without.as_dict() | {"genuine_pairs": 0}  # as the previous version wrote it
    del old["curve"]
    assert Calibration.from_dict(old) == without
    with pytest.raises(ValueError, match="thresholds that rise as the rate falls"):
        Calibration.from_dict(calibration.as_dict() | {"fmr": {"0.1": 0.4, "0.01": 0.3}})


@pytest.fixture(scope="module")
def model() -> XCosModel:
    torch.manual_seed(0)
    made = plug(backbones.create("mobilefacenet", embedding_size=16), centre=False)
    made.set_calibration(Calibration(0.4, "by hand", {0.1: 0.1, 0.01: 0.3}, 1000, CURVE))
    return made


@pytest.fixture
def saved(model: XCosModel, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rewrite(path: Path, change: dict[str, str | None]) -> None:
    with safe_open(str(path), "pt") as opened:
        metadata = opened.metadata() | change
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})


def test_saved_with_the_weights(saved: Path, model: XCosModel) -> None:
    loaded = load_model(saved)
    assert loaded.fmr_curve == CURVE
    assert (loaded.threshold, loaded.fmr_thresholds) == (0.4, {0.1: 0.1, 0.01: 0.3})
    assert loaded.fingerprint() == model.fingerprint()


def test_files_of_the_previous_version_load(saved: Path) -> None:
    rewrite(saved, {"fmr_curve": None})
    loaded = load_model(saved)
    assert loaded.fmr_curve is None and loaded.fmr_thresholds == {0.1: 0.1, 0.01: 0.3}


BAD_THRESHOLDS = ["{", "[]", '{"2": 0.1}', '{"0.1": NaN}', '{"x": 1}', '{"0.1": 0.5, "0.01": 0.3}']
BAD_CURVES = ["{", "[]", "3", '"x"', "{}", *(json.dumps(CURVE.as_dict() | change) for change, _ in BAD)]


@pytest.mark.parametrize(
    ("key", "value"), [*(("fmr_curve", v) for v in BAD_CURVES), *(("fmr_thresholds", v) for v in BAD_THRESHOLDS)]
)
def test_bad_calibrations_in_a_file(saved: Path, key: str, value: str) -> None:
    rewrite(saved, {key: value})
    with pytest.raises(ModelError, match=rf"{saved}: damaged metadata: {key}"):
        load_model(saved)


# --- verify and the figure


def verify(model: Path, folder: Path, *more: str) -> Any:
    photograph = background(240, 240)
    crop = align_face(photograph, draw_face(photograph, (120, 120), 120))
    brighter = np.minimum(crop, 250) + 5  # of a picture and itself there is nothing to say
    names = [str(folder / name) for name in ("crop.png", "brighter.png")]
    for name, pixels in zip(names, (crop, brighter), strict=True):
        Image.fromarray(pixels).save(name)
    arguments = ["verify", *names, "--aligned", "--model", str(model), *more]
    return CliRunner(env={"XCOS_MODEL": None}).invoke(xcos, arguments)


def test_verify_says_what_the_score_means(saved: Path, tmp_path: Path) -> None:
    result = verify(saved, tmp_path, "--out", str(tmp_path / "why.svg"))
    assert result.exit_code == 0, result.output
    line = (
        r"^meaning +false match rate at this score below 0\.30 %, the smallest this calibration resolves "
        r"\(1,000 impostor pairs of 46 people\)$"
    )
    assert re.search(line, result.stdout, re.M)
    data = json.loads(verify(saved, tmp_path, "--json").stdout)
    assert data["fmr"] == {
        "rate": 0.003,
        "upper95": 0.003,
        "resolved": False,
        "smallest_resolved": 0.003,
        "impostor_pairs": 1000,
        "people": 46,
        "domains": [],
    }


def test_verify_without_a_calibration(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, {"fmr_curve": None})
    result = verify(saved, tmp_path)
    assert result.exit_code == 0 and "meaning" not in result.stdout
    assert json.loads(verify(saved, tmp_path, "--json").stdout)["fmr"] is None


def test_figure_carries_the_meaning() -> None:
    import matplotlib.text

    from xcos_ext.explain import verification_figure
    from xcos_ext.ops import XCosScore

    similarity = torch.full((1, 7, 7), 0.3)
    result = XCosScore(torch.tensor([0.3]), similarity, torch.full((1, 7, 7), 1 / 49))
    meaning = f"false match rate at this score {CURVE.at(0.3)}"
    figure = verification_figure(None, None, result, 0.25, meaning=meaning)
    assert any(text.get_text() == meaning for text in figure.findobj(matplotlib.text.Text))


# --- the shipped ones


def test_shipped_statistics_carry_curves() -> None:
    files = sorted((Path(backbones.__file__).parent.parent / "data").glob("mobilefacenet_*.safetensors"))
    assert len(files) == 2
    for file in files:
        for calibration in PlugStatistics.load(file).calibrations.values():
            curve = calibration.curve
            assert curve is not None and (curve.people, curve.pairs) == (1468, calibration.impostor_pairs)
            for rate, threshold in {**calibration.fmr, 5e-3: calibration.threshold}.items():
                assert curve.at(threshold).rate == pytest.approx(rate, rel=1e-3)
            assert ev.fmr_upper_bound(0, curve.pairs) * 0.99 <= curve.smallest < 2e-5


def test_a_claim_over_several_sets_is_the_worst_of_theirs() -> None:
    """Thresholds are the highest that a set asks for, the curve nowhere below a set's own, and the set is named."""
    torch.manual_seed(0)
    model = XCosModel(torch.nn.Identity(), XCosHead(4, 4, attention="norm")).eval()
    easy, hard = torch.randn(120, 4, 7, 7), torch.randn(120, 4, 7, 7) + 0.6  # the hard set's faces are alike
    people = [f"p{i}" for i in range(120)]
    rates = {"decision_fmr": 0.02, "fmrs": (0.1, 0.02)}
    alone = [ev.calibrate(model, faces, people, **rates) for faces in (easy, hard)]
    both = ev.calibrate(model, torch.cat((easy, hard)), people * 2, domains=["A"] * 120 + ["B"] * 120, **rates)
    assert alone[0].threshold < alone[1].threshold == both.threshold
    assert both.fmr == alone[1].fmr
    assert both.impostor_pairs == 2 * 120 * 119 // 2
    assert both.curve is not None
    assert both.curve.people == 240
    assert both.curve.sample == "14,280 impostor pairs of 240 people; the worse of A and B"
    for score in np.linspace(-0.5, 1.2, 35):
        own = both.curve.at(score)
        for part in alone:
            assert part.curve is not None
            assert own.rate >= part.curve.at(score).rate - 1e-12
            assert own.upper95 >= part.curve.at(score).upper95 - 1e-12
    assert FMRCurve.from_dict(both.curve.as_dict()) == both.curve
    old = both.curve.as_dict()
    del old["domains"]  # as files of earlier versions are
    assert FMRCurve.from_dict(old).domains == ()
    with pytest.raises(ValueError, match=r"^people: 0 impostor pairs cannot tell"):
        ev.calibrate(model, easy[:0], [], domains=[], **rates)
    with pytest.raises(TypeError, match=r"^domains: "):  # one text is not taken for its letters
        dataclasses.replace(both.curve, domains="LFW")
    hostile = dataclasses.replace(both.curve, domains=("A", "\x1b[31mB"))
    assert "\x1b" not in hostile.sample
    with pytest.raises(ValueError, match=r"^domains: expected 240 names, got 1$"):
        ev.calibrate(model, torch.cat((easy, hard)), people * 2, domains=["A"])
    with pytest.raises(ValueError, match=r"^people: 3 impostor pairs of B cannot tell"):
        ev.calibrate(model, easy, people, domains=["A"] * 117 + ["B"] * 3, **rates)
