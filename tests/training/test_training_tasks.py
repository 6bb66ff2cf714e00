"""Training heads and models: from the closed form and from nothing, by every loss, and through the command."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_people import EACH, SOURCES

import xcos_ext
from xcos_ext import backbones
from xcos_ext.io.errors import XCosError
from xcos_ext.model import plug
from xcos_ext.training import BatchIndex, TrainConfig, train
from xcos_ext.training.data import Maps, Pictures, normalised
from xcos_ext.training.settings import ConfigError
from xcos_ext.training.tasks import create_task, load_experiment
from xcos_ext.training.tasks.config import BodyConfig, DataConfig, HeadExperiment, LossConfig, ModelConfig
from xcos_ext.training.tasks.head import HeadTask, ModelTask
from xcos_ext.training.tasks.sources import Sources, held_out_people

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = ModelConfig("net.pt", channels=None, hidden=4)
HELD_OUT = {f"P{i:02d}" for i in range(8)}


def experiment(loss: dict[str, Any] | None = None, batch: int = 24, **model: Any) -> HeadExperiment:
    return HeadExperiment(
        DataConfig("x"),
        dataclasses.replace(MODEL, **model),
        TrainConfig(steps=30, batch=batch, rate=0.03, workers=0, log_every=5),
        LossConfig(**(loss or {})),
        BodyConfig(rate_scale=0.1),
    )


def task(loss: dict[str, Any] | None = None, **model: Any) -> HeadTask:
    return HeadTask(SOURCES, experiment(loss, **model), HELD_OUT)


def run(made: HeadTask, **settings: Any) -> Any:
    return train(made, dataclasses.replace(made.experiment.train, **settings), show=False)


def losses(made: HeadTask, **settings: Any) -> list[float]:
    seen: list[float] = []
    config = dataclasses.replace(made.experiment.train, **settings)
    train(made, config, show=False, on_step=lambda step, values: seen.append(values["loss"]))
    return seen


class TestHead:
    def test_it_starts_as_the_closed_form(self) -> None:
        made = task()
        trained = made.trained
        first = trained[::EACH]
        closed = plug(SOURCES.recogniser, faces=list(SOURCES.maps.grids[0][first].split(4)))
        head = made.module.head
        grids = SOURCES.maps.grids[0][:10].float()
        with torch.no_grad():
            expected = closed.head(grids, grids.flip(0)).score
            torch.testing.assert_close(head(grids, grids.flip(0)).score, expected, rtol=1e-4, atol=1e-5)
        assert not head.training

    @pytest.mark.thorough
    @pytest.mark.parametrize(
        ("loss", "model"),
        [
            ({"cosine": 10.0}, {}),
            ({"cosine": 10.0}, {"channels": 4}),
            ({"cosine": 10.0, "balanced": True, "distance": "l1"}, {"attention": "norm"}),
            ({"cosine": 10.0}, {"attention": "learned", "symmetric": True}),
            ({"cosine": 10.0, "pairs": "drawn", "hard": 0.5}, {}),
            ({"cosine": 10.0, "detach": "attention"}, {}),
            ({"cosine": 10.0, "detach": "features"}, {"symmetric": False}),
            ({"cosine": 0.0, "contrast": 1.0, "contrast_kind": "triplet", "contrast_margin": 1.5}, {}),
            ({"cosine": 0.0, "contrast": 1.0, "contrast_kind": "contrastive"}, {}),
            (
                {"cosine": 0.0, "contrast": 1.0, "others": 0.0},
                {"start": "random", "channels": 6, "attention": "learned"},
            ),
            ({"cosine": 1.0, "identity": 0.1, "margin_scale": 8.0}, {"start": "random", "channels": 6}),
            ({"cosine": 0.0, "identity": 1.0, "margin_head": "cosface", "margin_scale": 8.0}, {}),
            ({"cosine": 10.0, "anchor": 0.1}, {}),
        ],
        ids=str,
    )
    def test_every_loss_falls(self, loss: dict[str, Any], model: dict[str, Any]) -> None:
        seen = losses(task(loss, **model), steps=60)
        assert seen[-1] < seen[0]

    @pytest.mark.parametrize("kind", ["infonce", "contrastive", "triplet"])
    def test_people_never_seen_are_told_apart_better(self, kind: str) -> None:
        torch.manual_seed(0)
        grids = SOURCES.maps.grids.float()
        noise = torch.randn(grids.shape) * 2 * grids.std()
        noise[:, :, grids.shape[2] // 3 :] *= 2
        hard = dataclasses.replace(SOURCES, maps=Maps((grids + noise).half(), SOURCES.maps.embeddings))
        loss = {"cosine": 0.0, "contrast": 1.0, "contrast_kind": kind, "others": 0.0}
        random = {"start": "random", "channels": 12, "attention": "learned", "symmetric": False}
        made = HeadTask(hard, experiment(loss, **random), HELD_OUT)
        before = made.evaluate(made.module)["auc"]
        seen = losses(made, steps=60)
        assert seen[-1] < 0.5 * seen[0] and made.evaluate(made.module)["auc"] > before + 0.05

    @pytest.mark.thorough
    def test_training_draws_scores_to_the_teachers_cosine(self) -> None:
        made = task({"cosine": 10.0})
        made.held_out = made.trained  # so few people say little about others
        before = made.evaluate(made.module)
        run(made, steps=80)
        after = made.evaluate(made.module)
        assert after["correlation"] > before["correlation"] + 0.05
        assert set(after) == {"auc", "eer", "tar_at_0.01", "tar_at_0.001", "correlation"}

    def test_held_out_people_are_never_seen(self) -> None:
        made = task({"cosine": 1.0, "pairs": "drawn", "hard": 0.5})
        held = {i for i, number in enumerate(SOURCES.pictures.people.tolist()) if f"P{number:02d}" in HELD_OUT}
        for pairs in ("drawn", "all"):
            made = task({"cosine": 1.0, "pairs": pairs})
            for step in range(20):
                drawn, _ = made.draw(BatchIndex(0, step), 12)
                assert not held & set(drawn.tolist())
        assert set(made.held_out.tolist()) == held

    def test_statistics_and_the_teacher_stay(self) -> None:
        made = task({"cosine": 10.0})
        buffers = {name: b.clone() for name, b in made.module.named_buffers()}
        weights = {name: t.clone() for name, t in SOURCES.recogniser.state_dict().items()}
        run(made, steps=5)
        assert all(torch.equal(b, buffers[name]) for name, b in made.module.named_buffers())
        assert all(torch.equal(t, weights[name]) for name, t in SOURCES.recogniser.state_dict().items())
        assert not SOURCES.recogniser.training

    def test_parts_are_the_same_however_they_are_computed(self) -> None:
        one, other = task({"cosine": 10.0}), task({"cosine": 10.0})
        for part in range(2):
            index = BatchIndex(4, 9, part, 2)
            a, b = one.batch(index, 12), other.batch(index, 12)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    def test_drawn_pairs_do_not_depend_on_the_split(self) -> None:
        made = task({"pairs": "drawn"})
        whole = made.draw(BatchIndex(0, 3), 24)[0].view(2, 12)
        parts = [made.draw(BatchIndex(0, 3, part, 3), 8)[0].view(2, 4) for part in range(3)]
        assert torch.equal(torch.cat(parts, 1), whole)

    def test_a_part_of_the_classes(self) -> None:
        made = task({"cosine": 0.0, "identity": 1.0, "class_share": 0.5, "others": 0.0})
        batch = made.batch(BatchIndex(0, 0), 8)
        assert len(batch["classes"]) == 8 and set(batch["labels"].tolist()) <= set(batch["classes"].tolist())
        run(made, steps=5)

    def test_the_anchor_holds(self) -> None:
        free, held = task({"cosine": 10.0}), task({"cosine": 10.0, "anchor": 100.0})
        moved = []
        for made in (free, held):
            start = made.start["cells.weight"].clone()
            run(made)
            moved.append(float((made.module.head.cells.weight.detach() - start).norm()))
        assert moved[1] < 0.5 * moved[0]

    @pytest.mark.parametrize(
        ("loss", "model", "message"),
        [
            ({"cosine": 0.0}, {}, "loss: expected a weight above 0 among cosine, contrast and identity, got none"),
            ({"contrast": 1.0, "pairs": "drawn"}, {}, r"loss.contrast: expected loss.pairs = 'all'"),
            ({}, {"start": "random"}, r"model.channels: expected a whole number with start = 'random', got none"),
            ({}, {"attention": "uniform"}, r"model.attention: expected 'residual', 'learned' or 'norm'"),
        ],
    )
    def test_settings_that_do_not_fit(self, loss: dict[str, Any], model: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            task(loss, **model)

    def test_too_few_people_are_known_at_once(self) -> None:
        with pytest.raises(XCosError, match="expected at least 32 people with 2 pictures or more to train on, got 16"):
            HeadTask(SOURCES, experiment(batch=64), HELD_OUT)

    def test_no_embeddings(self) -> None:
        without = dataclasses.replace(SOURCES, maps=Maps(SOURCES.maps.grids, None))
        with pytest.raises(ConfigError, match=r"loss.cosine: expected a recogniser with an output block"):
            HeadTask(without, experiment(), HELD_OUT)

    def test_held_out_people_by_every_rule(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("\ufeffP01 \n\nnobody\n", encoding="utf-8")
        (tmp_path / "pairs.txt").write_text("1\t1\nP02\t1\t2\nP03\t1\tP04\t1\n")
        names = SOURCES.pictures.names
        data = DataConfig("x", held_out_list=str(tmp_path / "list.txt"), pairs=str(tmp_path / "pairs.txt"), folds=(1,))
        assert held_out_people(data, names) == {"P01", "P02", "P03", "P04"}
        assert held_out_people(dataclasses.replace(data, held_out_share=0.5), names) > {"P01", "P02"}
        with pytest.raises(ConfigError, match=r"data.pairs: expected the pairs file that data.folds belong to"):
            held_out_people(DataConfig("x", folds=(1,)), names)
        with pytest.raises(XCosError, match=r"x.txt: cannot be read as a list of people"):
            held_out_people(DataConfig("x", held_out_list=str(tmp_path / "x.txt")), names)


class TestModel:
    def model(self, **loss: Any) -> ModelTask:
        return ModelTask(SOURCES, experiment({"cosine": 10.0} | loss), HELD_OUT)

    def test_the_body_learns_and_the_teacher_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.model(identity=0.1, margin_scale=8.0)
        body, teacher = made.module.body, SOURCES.recogniser

        def run_it(*_: Any) -> None:
            raise AssertionError("the teacher is run")

        for name in ("forward", "grid", "embed"):
            monkeypatch.setattr(teacher, name, run_it)
        before = {name: t.clone() for name, t in body.state_dict().items()}
        assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
        result = run(made, steps=10, clip=1.0)
        assert np.isfinite(result.loss)
        trained = {name for name, t in body.state_dict().items() if not torch.equal(t, before[name])}
        assert "body.0.weight" in trained and "body.1.weight" in trained
        assert not any("running" in name or "tracked" in name for name in trained)
        assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())

    def test_the_output_block_stays(self) -> None:
        made = self.model()
        made.module.body.output_prefixes = ("output.",)  # a SplitRecogniser does not say which keys are its block's
        again = ModelTask(SOURCES, made.experiment, HELD_OUT)
        assert all(p.requires_grad for p in again.module.body.body.parameters())

    def test_the_target_is_the_teachers_word_on_the_pictures_as_they_are(self) -> None:
        made = self.model()
        batch = made.batch(BatchIndex(0, 3), 8)
        images, embeddings = SOURCES.pictures.images, batch["embeddings"]
        assert SOURCES.maps.embeddings is not None
        places = [int((SOURCES.maps.embeddings[0] - row).abs().sum(1).argmin()) for row in embeddings]
        expected = torch.nn.functional.normalize(SOURCES.recogniser(normalised(SOURCES.recogniser, images[places])))
        torch.testing.assert_close(embeddings, expected)
        assert batch["people"].tolist() == SOURCES.pictures.people[places].tolist()
        assert not torch.equal(batch["images"], images[places])  # the body sees them altered

    def test_batch_norms_must_not_take_statistics(self) -> None:
        made = self.model()
        batch = made.batch(BatchIndex(0, 0), 8)
        made.loss(batch)
        made.module.body.train()
        with pytest.raises(XCosError, match="model: expected body and head in evaluation mode"):
            made.loss(batch)

    def test_in_bfloat16_the_head_stays_in_float(self) -> None:
        made = self.model()
        batch = made.batch(BatchIndex(0, 0), 8)
        exact, _ = made.loss(batch)
        with torch.autocast("cpu", torch.bfloat16):
            near, parts = made.loss(batch)
        assert near.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts.values())
        assert near.detach() != exact.detach() and near.detach() == pytest.approx(float(exact.detach()), rel=0.2)

    def test_it_starts_where_the_head_stands(self) -> None:
        made = self.model()
        start = task({"cosine": 10.0})
        expected = start.evaluate(start.module)
        assert made.evaluate(made.module)["auc"] == pytest.approx(expected["auc"], abs=1e-3)


# --- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of twelve people, an untrained network, and an experiment."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("train")
    for number, (picture, key) in enumerate(zip(SOURCES.pictures.images, SOURCES.pictures.keys, strict=True)):
        if number < 36:
            file = root / "crops" / f"{key}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)
    (root / "crops" / "P00" / "broken.png").write_bytes(b"x")
    torch.manual_seed(0)
    torch.save(backbones.create("mobilefacenet").state_dict(), root / "net.pt")
    (root / "head.toml").write_text(
        f"""
task = "head"
[data]
pictures = "{root}/crops"
held_out_share = 0.3
cache = "{root}/cache"
[model]
recogniser = "{root}/net.pt"
channels = 4
hidden = 4
[loss]
cosine = 10.0
[train]
steps = 4
batch = 8
rate = 0.01
workers = 0
log_every = 2
"""
    )
    return root


def command(*arguments: str) -> int:
    from xcos_ext.cli.app import xcos

    status = xcos.main(list(arguments), prog_name="xcos", standalone_mode=False)
    assert isinstance(status, int)
    return status


def test_the_command_trains_and_resumes(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    config = str(files / "head.toml")
    assert command("train", config, "--out", str(out), "--json") == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["steps"] == 4 and result["files"] == [str(out / "model.safetensors")]
    assert "1 left out, cannot be decoded: P00/broken.png" in shown.err
    model = xcos_ext.load_model(out / "model.safetensors")
    assert model.head.config()["attention"]["residual"] and model.head.channels == 4
    faces = SOURCES.pictures.images[:4].permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        features = model.features(model.preprocessing(faces))
        templates = model.templates(features, "both")
        scores = xcos_ext.xcos_matrix(templates, templates)
        torch.testing.assert_close(scores[0, 1:], model.score(features[:1].expand(3, -1, -1, -1), features[1:]))
    assert command("train", config, "--out", str(out)) == 2
    assert "holds a training already" in capsys.readouterr().err
    assert command("train", config, "--out", str(out), "--resume") == 0
    assert "4 (4 before)" in capsys.readouterr().out
    assert command("train", config, "--out", str(out), "--resume", "--set", "loss.cosine=5") == 2
    assert "task.loss.cosine (checkpoint 10.0, now 5.0)" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_command_trains_a_body(files: Path, tmp_path: Path) -> None:
    options = ["--set", "task=model", "--set", "train.steps=2", "--set", "body.rate_scale=0.01"]
    assert command("train", str(files / "head.toml"), "--out", str(tmp_path), *options) == 0
    model = xcos_ext.load_model(tmp_path / "model.safetensors")
    before = xcos_ext.model.load_recogniser(files / "net.pt").state_dict()
    after = model.backbone.state_dict()
    assert not torch.equal(after["conv1.conv.weight"], before["conv1.conv.weight"])
    assert torch.equal(after["linear.weight"], before["linear.weight"])  # the output block takes no part
    assert torch.equal(after["conv1.bn.running_mean"], before["conv1.bn.running_mean"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.stepz=3"], "train.stepz: no such setting; did you mean train.steps?"),
        (["--set", "loss.cosine=-1"], "loss.cosine: expected greater than or equal to 0, got -1"),
        (["--set", "model.start=middle"], "model.start: expected 'closed-form' or 'random', got 'middle'"),
        (
            ["--set", "task=hed"],
            "task: expected one of head, model, or a module as package.module, got 'hed'; did you mean head?",
        ),
        (["--set", "data.pictures=nowhere"], "nowhere: no such folder"),
        (["--set", "model.recogniser=nowhere.pt"], "nowhere.pt: no such file"),
        (["--set", "train.batch=7", "--set", "train.accumulate=2"], "train.batch: expected a multiple of 2"),
        (["--set", "train.batch=80"], "expected at least 40 people with 2 pictures or more to train on"),
        (["--set", "train"], "--set train: expected table.key=value"),
    ],
)
def test_mistakes_are_one_line(
    files: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", str(files / "head.toml"), "--out", str(tmp_path / "out"), *options) == 2
    shown = capsys.readouterr().err.splitlines()
    assert message in shown[-1]
    assert not (tmp_path / "out").exists()


def test_recipes_can_be_read() -> None:
    files = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.toml"))
    assert len(files) == 5 and all(load_experiment(file).train.steps > 0 for file in files)


def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "task.py").write_text(
        """
from pydantic.dataclasses import dataclass
from xcos_ext.training import TrainConfig

@dataclass(frozen=True)
class Experiment:
    task: str
    train: TrainConfig

def create(experiment, progress):
    return experiment.task
"""
    )
    (tmp_path / "own" / "empty.py").touch()
    file = tmp_path / "x.toml"
    file.write_text('task = "own.task"\n[train]\nsteps = 1\nbatch = 1\n')
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=r"x.toml: task: there is no module own.task in .*; run the command from the"):
        load_experiment(file)
    monkeypatch.chdir(tmp_path)
    assert create_task(load_experiment(file)) == "own.task"  # type: ignore[comparison-overlap]
    with pytest.raises(ConfigError, match=r"task: there is no module own.other in"):
        load_experiment(file, ["task=own.other"])
    with pytest.raises(ConfigError, match=r"task: expected a module with Experiment and create, got own.empty"):
        load_experiment(file, ["task=own.empty"])


@pytest.mark.thorough
@pytest.mark.real_data
def test_real_faces_from_the_closed_form(shared_data: Path, tmp_path: Path) -> None:
    """A short run on few people: scores of people held out come nearer to the recogniser's cosine."""
    from xcos_ext.model import load_recogniser
    from xcos_ext.training.data import cached_maps, people_of_share, read_pictures

    recogniser = load_recogniser(shared_data / "mobilefacenet_arcface.pt").requires_grad_(False)
    pictures = read_pictures(shared_data / "lfw112.zip", chosen=lambda name: name.startswith(("A", "B")))
    few = pictures.of_people(people_of_share(pictures.names, 0.25))[:240]
    some = Pictures(
        pictures.images[few],
        pictures.people[few],
        pictures.names,
        tuple(pictures.keys[i] for i in few.tolist()),
        fingerprint="few",
    )
    real = Sources(recogniser, some, cached_maps(recogniser, some, tmp_path))
    held_out = {some.names[i] for i in some.people.unique().tolist()[::3]}
    made = HeadTask(real, experiment({"cosine": 100.0}, batch=16), held_out)
    before = made.evaluate(made.module)
    run(made, rate=0.001)
    after = made.evaluate(made.module)
    assert after["correlation"] > before["correlation"]
