"""The script behind the default model: parts, figures, files; on generated faces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes import train_default_model as example
from xcos_ext import backbones
from xcos_ext.evaluation import evaluate
from xcos_ext.evaluation.datasets import LFW
from xcos_ext.model import load_model

Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDS, EACH = 4, 4  # people of a fold


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mosaics named as LFW's pictures, four folds of pairs, a random teacher, an experiment."""
    root = tmp_path_factory.mktemp("distill")
    rng = np.random.default_rng(0)
    lines = [f"{FOLDS}\t{EACH}"]
    for fold in range(FOLDS):
        people = [f"P{fold}{i}" for i in range(EACH)]
        for person in people:
            mosaic = rng.integers(30, 226, (7, 7, 3))
            (root / "faces" / person).mkdir(parents=True)
            for number in (1, 2):
                noisy = np.clip(mosaic + rng.integers(-20, 21, mosaic.shape), 0, 255).astype(np.uint8)
                picture = Image.fromarray(noisy).resize((112, 112), Image.Resampling.BICUBIC)
                picture.save(root / "faces" / person / f"{person}_{number:04d}.png")
        lines += [f"{person}\t1\t2" for person in people]
        lines += [f"{person}\t1\t{people[(i + 1) % EACH]}\t2" for i, person in enumerate(people)]
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    torch.save(backbones.create("mobilefacenet_relu").state_dict(), root / "teacher.pt")
    (root / "experiment.toml").write_text(
        f"""
task = "recipes.distill"
[data]
pictures = "{root}/faces"
pairs = "{root}/pairs.txt"
cache = "{root}/cache"
[student]
teacher = "{root}/teacher.pt"
channels = 8
[bank]
size = 64
amp = false
[train]
steps = 2
batch = 8
workers = 0
"""
    )
    return root


@pytest.mark.thorough
def test_each_part_is_trained_without_its_people_and_scored_by_its_own_model(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    create = example.create_task

    def watched(experiment: Any, progress: Any) -> Any:
        task = create(experiment, progress)
        names = task.sources.pictures.names
        used = {names[int(task.sources.pictures.people[i])] for i in task.sources.bank.first[task.trained]}
        assert not {name for name in used if int(name[1]) + 1 in experiment.data.folds}
        seen.append(experiment.data.folds)
        return task

    monkeypatch.setattr(example, "create_task", watched)
    common = [str(files / "experiment.toml"), "--out", str(tmp_path / "runs"), "--threads", "1"]
    assert example.main([*common, "--only", "2"]) == 0  # one process might do this part, another the other
    assert seen == [(3, 4)] and capsys.readouterr().out == ""
    results = [tmp_path / name for name in ("figures.json", "roc.png", "shipped.safetensors")]
    wanted = [f"--{option}={path}" for option, path in zip(("json", "plot", "ship"), results, strict=True)]
    assert example.main([*common, *wanted]) == 0
    assert seen == [(3, 4), (1, 2)]  # what is trained already is not trained again
    printed = capsys.readouterr().out
    figures = json.loads(results[0].read_text())
    assert figures["pairs"] == 2 * FOLDS * EACH and figures["people"] == FOLDS * EACH
    assert list(figures["variants"]) == ["own", "norm", "corr", "uniform", "teacher"]
    assert list(figures["models"]) == ["1-2", "3-4"]
    assert figures["experiment"]["data"]["pictures"] == "faces"  # no folders of this machine
    for name, variant in figures["variants"].items():
        assert f"| {name} | {100 * variant['accuracy']['mean']:.2f} [" in printed
    shipped = load_model(results[2])
    lfw = LFW(files / "faces", files / "pairs.txt", folds=[2, 3])
    scores = evaluate(shipped, lfw, replicates=0).variants["own"].scores
    model = load_model(tmp_path / "runs" / "folds-3-4" / "model.safetensors")
    np.testing.assert_allclose(scores, evaluate(model, lfw, replicates=0).variants["own"].scores, atol=0.02)
    assert results[1].stat().st_size > 5000


def test_mistakes_are_named(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [str(files / "experiment.toml"), "--out", str(tmp_path / "runs")]
    assert example.main([*common, "--set", "data.pairs=none"]) == 2
    assert "expected task = 'recipes.distill' and data.pairs" in capsys.readouterr().err
    assert example.main([*common, "--set", "train.stepz=3"]) == 2
    assert "train.stepz: no such setting" in capsys.readouterr().err
