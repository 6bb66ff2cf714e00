"""``xcos evaluate faithfulness`` on generated faces and a small network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import commands
import numpy as np
import pytest
import torch
from click.testing import Result
from commands import strict
from drawn import TwoFaces
from torch import nn

from xcos_ext import backbones
from xcos_ext.cli.options import integers
from xcos_ext.evaluation.faithfulness import measure
from xcos_ext.model import XCosModel, plug

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread", "network")

FEW = ("--count", "2", "--bootstrap", "20")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures each of people who are random mosaics; a list of two folds, 3 and 8."""
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for person in range(8):
        mosaic = rng.integers(30, 226, (7, 7, 3))
        (folder / f"p{person}").mkdir()
        for number in range(3):
            noisy = np.clip(mosaic + rng.integers(-6, 7, mosaic.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).resize((112, 112), Image.Resampling.NEAREST).save(folder / f"p{person}/{number}.png")
    lines = ["a,b,genuine,fold"]
    for first, fold in ((0, 3), (4, 8)):
        for p in range(first, first + 4):
            lines.append(f"p{p}/0.png,p{p}/1.png,1,{fold}")
            lines.append(f"p{p}/0.png,p{first + (p + 1) % 4}/1.png,0,{fold}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


def small_recogniser() -> backbones.Recogniser:
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Flatten(), nn.Linear(147, 40))
    return backbones.SplitRecogniser(nn.AvgPool2d(16), tail, grid_shape=(3, 7, 7), embedding_size=40).eval()


def small_model(threshold: float | None = 0.3) -> XCosModel:
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (8, 112, 112, 3), dtype=np.uint8)
    model = plug(small_recogniser(), pictures)
    model.threshold, model.name = threshold, "small"
    return model


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network in place of those in files, which are read and checked elsewhere."""
    monkeypatch.setattr("xcos_ext.cli.faithfulness.load", lambda path, device: small_model())
    monkeypatch.setattr("xcos_ext.model.load_recogniser", lambda path: small_recogniser())
    monkeypatch.setattr("xcos_ext.evaluation.faithfulness.measure._TIMED", 3)


def run(root: Path, *arguments: str | Path) -> Result:
    common = ("--pairs", root / "pairs.csv", "--root", root, "--aligned")
    return commands.run("evaluate", "faithfulness", *common, *arguments)


def test_pictures_with_several_faces_are_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xcos_ext.faces.create_detector", lambda spec: TwoFaces())
    more = ("--explainer", "xcos", "--protocol", "locality", "--json")
    common = ("--pairs", root / "pairs.csv", "--root", root)
    result = commands.run("evaluate", "faithfulness", *common, *FEW, *more)
    several = strict(result.stdout)["models"][0]["several_faces"]
    assert several and f"{several[0]}: 2 faces found, took the most prominent" in result.stderr


def test_tables_curves_and_figures(root: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "all.json", tmp_path / "curves.png"
    result = run(root, *FEW, "--explainer", "xcos", "--out", out, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for words in (
        "Region swap, an impostor's region in a genuine pair",
        "Region swap, a region of B's person in an impostor pair",
        "Deletion and insertion: area under verification accuracy",
        "Deletion and insertion: area under rank-1 identification rate",
        "Locality",
        "Patch replacement",
        "Time for the maps of one pair, ms (cpu)",
        "right cheek",
        "same person",
        "95 % intervals: bootstrap over people, 20 replicates",
    ):
        assert " ".join(words.split()) in " ".join(result.stdout.split()), words
    for name in ("xcos", "random", "centre"):
        assert name in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.json", "curves.png"]
    with Image.open(plot) as picture:
        assert min(picture.size) > 600
    data = strict(out.read_text())
    assert data["complete"] and data["pairs"] == {
        "file": str(root / "pairs.csv"),
        "format": "csv",
        "folds": None,
        "aligned": True,
    }
    (model,) = data["models"]
    assert model["model"] == "small" and model["threshold"] == 0.3 and model["complete"] and model["device"] == "cpu"
    assert model["explainers"] == ["xcos", "random", "centre"] == list(model["seconds_a_pair"])
    swaps = model["region_swap"]["rows"]
    # The list has two pictures of everybody, so A of a genuine pair has no third one for the control.
    assert len(swaps) == 3 * 3 * 10  # directions and pastes, explainers, regions with their mean
    centre = [row for row in swaps if row["explainer"] == "centre"]
    assert {row["difference"]["value"] for row in centre} == {row["centred"]["value"] for row in centre} == {0.5}
    assert len(model["deletion"]["rows"]) == len(model["identification"]["rows"]) == 3 * 2 * 2
    assert model["locality"]["pairs"] == 4 and len(model["patch"]["rows"]) == 9
    assert data["settings"]["count"] == 2 and data["settings"]["fills"] == ["zero"]


@pytest.mark.thorough
def test_json_is_the_same_again(root: Path) -> None:
    options = (*FEW, "--explainer", "xcos-similarity", "--protocol", "region-swap", "--protocol", "locality", "--json")

    def figures(seed: str) -> Any:
        result = run(root, *options, "--seed", seed)
        assert result.exit_code == 0, result.output
        (model,) = strict(result.stdout)["models"]
        assert model["deletion"] is model["identification"] is model["patch"] is None
        return {name: model[name] for name in ("region_swap", "locality")}

    first = figures("0")
    assert figures("0") == first and figures("1") != first


@pytest.mark.thorough
def test_folds_sizes_blends_and_fills(root: Path) -> None:
    options = ("--folds", "8", "--size", "small", "--size", "large", "--blend", "soft", "--match-colour", "--pixels")
    more = ("--fill", "blur", "--fill", "mean-face", "--protocol", "region-swap", "--protocol", "locality")
    result = run(root, *FEW, *options, *more, "--explainer", "xcos", "--json")
    assert result.exit_code == 0, result.output
    data = strict(result.stdout)
    assert data["pairs"]["folds"] == [8]
    swaps = data["models"][0]["region_swap"]
    assert (swaps["blend"], swaps["match_colour"]) == ("soft", True)
    assert {row["size"] for row in swaps["rows"]} == {"small", "large"} and "pixels" in swaps["rows"][0]
    assert [row["fill"] for row in data["models"][0]["locality"]["rows"]] == ["blur", "mean-face"]


@pytest.mark.thorough
def test_a_teacher_beside_and_instead(root: Path, tmp_path: Path) -> None:
    weights = tmp_path / "teacher.pt"
    weights.write_bytes(b"in place of a network")
    options = (*FEW, "--protocol", "region-swap", "--teacher", weights)
    both = run(root, *options, "--plot", tmp_path / "p.svg")
    assert both.exit_code == 0, both.output
    assert "small" in both.stdout and "cosine" in both.stdout
    assert "the equal error rate's on these pairs" in both.stdout
    assert "xcos: xcos is left out: model: expected an xCos model" in both.stderr
    assert {"p.svg", "p-2.svg"} <= {path.name for path in tmp_path.iterdir()}
    alone = strict(run(root, *options, "--only-teacher", "--json").stdout)
    (model,) = alone["models"]
    assert model["threshold_from_pairs"] and model["threshold"] is not None
    assert set(model["skipped"]) >= {"xcos", "xcos-similarity", "xcos-attention"}


def test_an_interruption_leaves_what_was_done(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(measure._FUNCTIONS, "patch", interrupted)
    options = ("--protocol", "locality", "--protocol", "patch", "--explainer", "xcos", "--out", tmp_path / "part.json")
    result = run(root, *FEW, *options)
    assert result.exit_code == 130
    data = strict((tmp_path / "part.json").read_text())
    assert not data["complete"] and data["models"][0]["locality"] is not None and data["models"][0]["patch"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_pictures_without_a_face(root: Path) -> None:
    broken = root / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "x.png").write_bytes(b"no picture")
    lines = (root / "pairs.csv").read_text().splitlines()
    (root / "more.csv").write_text("\n".join([*lines, "broken/x.png,p0/0.png,0,3"]))
    arguments = ("--pairs", root / "more.csv", "--count", "8", "--protocol", "region-swap", "--explainer", "xcos")
    result = run(root, *arguments, "--bootstrap", "0")
    assert result.exit_code == 0, result.output
    if "1 pictures could not be used" in result.stdout:
        assert "x.png: not a picture" in result.stderr
    data = strict(run(root, *arguments, "--bootstrap", "0", "--json").stdout)
    failed = data["models"][0]["failed_pictures"]
    draws = {draw["direction"]: draw for draw in data["models"][0]["region_swap"]["draws"]}
    assert draws["genuine-into-impostor"]["pairs"] == 8
    assert draws["genuine-into-impostor"]["passed_over"] == len(failed)
    (broken / "x.png").unlink()


def test_trouble(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trouble(words: str, *arguments: str | Path) -> None:
        commands.trouble(run(root, *arguments), words)

    trouble("--explainer: expected some of xcos, ", "--explainer", "lime")
    trouble("--folds: expected some of 3, 8, got 7", "--folds", "7,8")
    trouble("'--folds': expected numbers with commas between, such as 7,8, got 'x'", "--folds", "x")
    trouble("count: expected 1..8, the genuine pairs that there are, got 9", "--count", "9", "--explainer", "xcos")
    trouble("'--bootstrap': expected 0 or at least 20, got 3", "--bootstrap", "3")
    trouble("expected a file ending in .json", "--out", tmp_path / "x.txt")
    trouble("expected a file ending in .png", "--plot", tmp_path / "x.gif")
    trouble("--only-teacher: expected --teacher WEIGHTS", "--only-teacher")
    trouble("'--device': expected cpu, cuda, cuda:N or auto, got 'toaster'", "--device", "toaster", *FEW)
    trouble("no such file or folder", "--pairs", tmp_path / "none")
    trouble("'magic'", "--protocol", "magic")
    monkeypatch.setattr("xcos_ext.cli.faithfulness.load", lambda path, device: small_model(None))
    trouble("xcos cannot explain this model: model: expected a decision threshold", *FEW, "--explainer", "xcos")


def test_folds() -> None:
    assert integers("7,8") == (7, 8) and integers(" 3 ") == (3,) and integers("1,1") == (1,)
    with pytest.raises(click.BadParameter, match="such as 7,8"):
        integers("7-8")
