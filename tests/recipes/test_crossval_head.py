"""The cross-validation of a head's training: no tested person is trained on, and what is written down."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from training_people import EACH, PEOPLE, SOURCES, network

from recipes import crossval_head as example
from xcos_ext.backbones import registry
from xcos_ext.evaluation import evaluate
from xcos_ext.evaluation.datasets import LFW
from xcos_ext.model import load_model

pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures named as LFW's, two folds of pairs, an experiment."""
    from PIL import Image

    root = tmp_path_factory.mktemp("lfw")
    for number, picture in enumerate(SOURCES.pictures.images):
        person, index = f"P{number // EACH:02d}", number % EACH + 1
        file = root / "crops" / person / f"{person}_{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)
    folds = [[f"P{person:02d}" for person in range(start, start + 6)] for start in (0, 6)]
    lines = ["2\t4"]
    for people in folds:
        lines += [f"{person}\t1\t2" for person in people[:4]]
        lines += [f"{a}\t1\t{b}\t1" for a, b in itertools.pairwise(people[:5])]
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    (root / "head.toml").write_text(
        f"""
task = "head"
[data]
pictures = "{root}/crops"
pairs = "{root}/pairs.txt"
[model]
recogniser = "net.pt"
channels = 4
[train]
steps = 2
batch = 8
workers = 0
"""
    )
    return root


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures carry LFW's names, and the network is one that files can name."""
    keys = tuple(f"P{i:02d}/P{i:02d}_{j + 1:04d}.png" for i in range(PEOPLE) for j in range(EACH))
    named = dataclasses.replace(SOURCES, pictures=dataclasses.replace(SOURCES.pictures, keys=keys))
    monkeypatch.setattr(example, "load_sources", lambda *_, **__: named)
    monkeypatch.setattr(SOURCES.recogniser, "architecture", "toy", raising=False)
    monkeypatch.setitem(registry._REGISTRY, "toy", network)


@pytest.mark.thorough
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("task", ["head", "model"])
def test_every_fold_is_scored_by_a_head_that_never_saw_it(
    files: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[set[str], int]] = []

    original = example.HeadTask.__init__

    def watched(made: example.HeadTask, *arguments: Any, **named: Any) -> None:
        original(made, *arguments, **named)
        seen.append((set(arguments[2]), len(made.trained)))

    monkeypatch.setattr(example.HeadTask, "__init__", watched)
    out = tmp_path / "result.json"
    arguments = [str(files / "head.toml"), "--json", str(out), "--threads", "1", "--set", f"task={task}"]
    kept = ["--models", str(tmp_path / "models")]
    assert example.main([*arguments, "--label", "one", *kept]) == 0
    printed = capsys.readouterr().out
    held_out = [{f"P{i:02d}" for i in range(start, start + 5)} for start in (0, 6)]
    assert [people for people, _ in seen] == held_out  # once each
    assert {count for _, count in seen} == {(PEOPLE - 5) * EACH}
    assert example.main([*arguments, "--label", "other", "--folds", "1", "2", *kept]) == 0  # nothing to train
    assert example.main([*arguments, "--label", "again"]) == 0
    results = json.loads(out.read_text())
    assert list(results) == ["one", "other", "again"] and results["one"]["pairs"] == 16
    assert results["one"]["held_out_together"] == [[1], [2]]
    assert results["one"]["scores"] == results["other"]["scores"] == results["again"]["scores"]
    assert results["one"]["settings"]["data"]["pictures"] == "crops"
    variants = [f"trained, {name}" for name in ("norm", "uniform", "corr", "symmetric")]
    assert list(results["one"]["scores"]) == ["trained", "start", *variants, "cosine"]
    for name, row in results["one"]["scores"].items():
        assert 0 <= row["accuracy"]["mean"] <= 1 and len(row["accuracy"]["folds"]) == 2
        low, high = row["intervals"]["auc"]
        assert low <= row["auc"] <= high
        assert f"| {name} | {100 * row['accuracy']['mean']:.2f} ±" in printed
    model = load_model(tmp_path / "models" / "folds-1" / "model.safetensors")
    lfw = LFW(files / "crops", files / "pairs.txt", folds=[0])
    scores = evaluate(model, lfw, replicates=0).variants["own"].scores
    best = results["one"]["scores"]["trained"]["accuracy"]["folds"][0]
    assert max(((scores >= cut) == lfw.genuine).mean() for cut in scores) >= best  # the file is what was scored


@pytest.mark.thorough
@pytest.mark.usefixtures("known")
def test_folds_can_be_held_out_together(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (files / "pairs.txt").read_text().splitlines()
    lines[0] = "3\t4"
    (tmp_path / "pairs.txt").write_text("\n".join([*lines, *lines[1:9]]) + "\n")  # fold 3 is fold 1 once more
    monkeypatch.chdir(tmp_path)
    arguments = [str(files / "head.toml"), "--json", "out.json", "--threads", "1", "--set", "data.pairs=pairs.txt"]
    assert example.main([*arguments, "--together", "2", "--label", "x", "--folds", "1", "3", "2"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())["x"]
    assert result["held_out_together"] == [[1, 3], [2]] and len(result["seconds_per_part"]) == 2


def test_mistakes_are_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in (("train.stepz=1", "train.stepz: no such setting"), ("data.pairs=none", "and data.pairs")):
        with pytest.raises(SystemExit):
            example.main([str(files / "head.toml"), "--set", change])
        assert message in capsys.readouterr().err
