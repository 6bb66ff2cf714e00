"""The model that the package ships: what its card says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from xcos_ext.cli.app import xcos
from xcos_ext.evaluation import calibrate, evaluate
from xcos_ext.evaluation.datasets import LFW
from xcos_ext.io.errors import ModelError
from xcos_ext.io.models import REGISTRY, local_file
from xcos_ext.io.shipped import DATA, default_weights
from xcos_ext.model import XCosHead, XCosModel, load_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "examples" / "photographs"
UNSEEN = (6, 7)  # folds, from 0, whose people the model has never seen


@pytest.fixture(scope="module")
def model() -> XCosModel:
    return load_model()


def test_the_file_is_small_and_in_half_precision() -> None:
    file = default_weights()
    assert file.stat().st_size < 6_000_000
    with safe_open(str(file), "pt") as opened:
        kinds = {opened.get_tensor(name).dtype for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    assert kinds <= {torch.float16, torch.int64}


def test_the_model_is_small_and_calibrated(model: XCosModel) -> None:
    assert model.architecture == "slim" and not model.training
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert set(model.fmr_thresholds) == {1e-1, 1e-2, 1e-3}
    assert model.threshold is not None and model.fmr_curve is not None
    assert model.fmr_thresholds[1e-2] < model.threshold < model.fmr_thresholds[1e-3]
    assert model.fmr_curve.at(model.fmr_thresholds[1e-2]).rate == pytest.approx(1e-2, rel=1e-3)
    features = model.features(model.preprocessing(np.zeros((1, 112, 112, 3), np.uint8)))
    assert features.shape == (1, 32, 7, 7)


def test_the_score_does_not_depend_on_the_order_of_the_faces(model: XCosModel) -> None:
    a, b = torch.randn(2, 5, 32, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(model.score(a, b), model.score(b, a))


def test_two_photographs_are_verified_without_naming_a_model(tmp_path: Path) -> None:
    photographs = [str(PHOTOGRAPHS / name) for name in ("astronaut.jpg", "astronaut-masked.jpg")]
    runner = CliRunner(env={"XCOS_MODEL": None})
    result = runner.invoke(xcos, ["verify", *photographs, "--out", str(tmp_path / "why.png")])
    assert result.exit_code == 0, result.output
    assert "same person" in result.output and "xcos-slim" in result.output
    assert (tmp_path / "why.png").stat().st_size > 10_000


def test_an_installation_without_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("xcos_ext.io.shipped._DEFAULT_WEIGHTS", tmp_path / "gone.safetensors")
    with pytest.raises(ModelError, match=r"no model: .*gone\.safetensors is missing from this installation"):
        load_model()


def test_models_are_stored_in_half_precision_or_not_at_all(model: XCosModel, tmp_path: Path) -> None:
    save_model(model, tmp_path / "again.safetensors", dtype=torch.float16)
    again = load_model(tmp_path / "again.safetensors")
    assert again.fingerprint() == model.fingerprint()  # it was in fp16 before
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point dtype or None, got torch\.int8"):
        save_model(model, tmp_path / "x.safetensors", dtype=torch.int8)
    large = load_model()
    with torch.no_grad():
        next(large.parameters()).fill_(1e6)
    with pytest.raises(ModelError, match=r"model: 1 tensors do not fit into torch\.float16"):
        save_model(large, tmp_path / "x.safetensors", dtype=torch.float16)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.thorough
@pytest.mark.real_data
def test_it_tells_people_apart_whom_it_has_never_seen(model: XCosModel, shared_data: Path) -> None:
    lfw = LFW(shared_data / "lfw112.zip", shared_data / "pairs.txt", folds=UNSEEN)
    result = evaluate(model, lfw, replicates=0)
    report = result.variants["own"].report
    assert report.accuracy is not None
    assert report.accuracy.mean >= 0.98  # its card says 0.9850
    scores = result.variants["own"].scores
    with torch.no_grad():
        features = model.features_of([lfw.read(key) for key in lfw.keys], 64)
    assert lfw.people is not None
    threshold = calibrate(model, features, list(lfw.people), decision_fmr=0.005).threshold
    right = (scores >= threshold) == lfw.genuine
    assert right.mean() >= 0.965
    # Its own threshold claims what holds on CFP too, where scores of different people are higher: no false match here.
    assert model.threshold is not None and model.threshold > threshold
    accepted = scores >= model.threshold
    assert accepted[~lfw.genuine].mean() <= 0.005
    assert (accepted == lfw.genuine).mean() >= 0.934  # its card says 0.9392


def test_the_shipped_model_goes_by_its_name() -> None:
    model = load_model("slim")
    assert model.threshold is not None and model.fmr_curve is not None
    assert model.architecture == "slim"
    assert isinstance(model.head, XCosHead) and model.head.attention is None  # norm attention
    faces = model.preprocessing(np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8))
    with torch.no_grad():
        features = model.features(faces)
        assert float(model.score(features[:1], features[:1])) == pytest.approx(1, abs=1e-5)
    assert model.fingerprint() == load_model().fingerprint() == "33d726267f00f4d9"  # results files name it


def test_every_model_that_lies_in_the_package_is_one_that_it_offers() -> None:
    offered = {entry.file for entry in REGISTRY.values() if entry.kind == "model" and not entry.urls}
    assert {file.name for file in DATA.glob("xcos_*")} == offered == {"xcos_slim.safetensors"}


@pytest.mark.parametrize("name", ["faithful", "local", "Slim", "best"])
def test_other_names_are_told_what_there_is(name: str) -> None:
    with pytest.raises(ModelError, match=rf"^{name}: no such file, and no such name.* Known are slim, sface, \w+$"):
        load_model(name)


def test_a_file_of_the_shipped_models_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_file("slim", "model") == DATA / "xcos_slim.safetensors"
    (tmp_path / "slim").write_bytes(b"mine")
    assert local_file("slim", "model") == Path("slim")
    assert local_file("other.pt", "model") == Path("other.pt")
    assert local_file(None) == default_weights()


def test_loading_leaves_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    load_model()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model, file = load_model(), tmp_path / "kept.safetensors"
    save_model(model, file)
    before = file.read_bytes()
    model.fmr_thresholds = {0.1: float("nan")}
    with pytest.raises(ModelError, match="model: fmr_thresholds: expected rates"):
        save_model(model, file)
    model.fmr_thresholds = {}
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="model: expected finite weights, got NaN or infinity in 1 tensors: backbone"):
        save_model(model, file)
    assert file.read_bytes() == before
    with pytest.raises(TypeError, match="path: expected the path of a file, a name or an address, got int"):
        load_model(5)  # type: ignore[arg-type]
