"""Faces altered, teachers that answer, a narrow network made of a wide one, and a student that learns from several."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recipes import altered, average, gather, in_minutes, pack, surgery, teachers
from recipes.sface import SFace
from recipes.student import (
    AlterConfig,
    CellEvidence,
    Experiment,
    Sources,
    StudentConfig,
    StudentTask,
    WeightConfig,
    _cells_loss,
    load_sources,
)
from recipes.swaps import SwapConfig
from recipes.teachers import Answers, TargetSpace
from xcos_ext import backbones
from xcos_ext.backbones import MobileFaceNetReLU, Recogniser, SlimFaceNet
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosHead, XCosModel, load_model, save_model
from xcos_ext.model.cells import cell_matrices
from xcos_ext.training import BatchIndex, ConfigError, TrainConfig, train
from xcos_ext.training.data import normalised, read_pictures
from xcos_ext.training.tasks.config import DataConfig

pytestmark = pytest.mark.usefixtures("one_thread")

PEOPLE, EACH, CHANNELS = 6, 3, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(count: int, size: int = 112) -> Tensor:
    """Smooth coloured pictures, uint8 [count, 3, size, size]."""
    low = torch.rand(count, 3, 6, 6, generator=generator(1))
    return (nn.functional.interpolate(low, size=(size, size), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def recogniser(seed: int) -> Recogniser:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(3, 24, 16, 16), nn.ReLU())
        output = nn.Sequential(nn.Flatten(), nn.Linear(24 * 49, 16 + seed))
        return backbones.SplitRecogniser(body, output, grid_shape=(24, 7, 7), embedding_size=16 + seed).eval()


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of two sets: a person of each is held out, and one of them has a profile."""
    import cv2

    path = tmp_path_factory.mktemp("faces") / "faces.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, picture in enumerate(smooth(PEOPLE * EACH)):
            person, own = divmod(number, EACH)
            name = (
                f"{'cfp' if person % 2 else 'lfw'}-p{person}/{'profile' if person % 2 and own == 2 else 'x'}-{own}.png"
            )
            archive.writestr(name, cv2.imencode(".png", picture.permute(1, 2, 0).numpy()[..., ::-1])[1].tobytes())
    (path.parent / "held_out.txt").write_text("lfw-p4\ncfp-p5\n")
    return path


@pytest.fixture(scope="module")
def experiment(faces: Path, monkeypatch_module: pytest.MonkeyPatch) -> Experiment:
    made = [recogniser(seed).requires_grad_(False) for seed in range(2)]
    monkeypatch_module.setattr(teachers, "open_teacher", lambda path: made[int(Path(path).name)])
    start, files = faces.parent / "start.safetensors", [faces.parent / name for name in ("0", "1")]
    for file in files:
        file.write_text("a teacher that the test makes itself")
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        body = SlimFaceNet().eval()
        head = surgery.ridge_head(body, smooth(24), torch.randn(24, CHANNELS, 7, 7, generator=generator()))
    save_model(XCosModel(body, head), start)
    return Experiment(
        DataConfig(str(faces), held_out_list=str(faces.parent / "held_out.txt"), cache=str(faces.parent / "cache")),
        StudentConfig((str(files[0]), str(files[1])), str(start), trust=(1.25, 1.0), channels=CHANNELS),
        TrainConfig(steps=2, batch=8, rate=1e-3, workers=0),
    )


@pytest.fixture(scope="module")
def monkeypatch_module() -> object:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def answers(experiment: Experiment, sources: Sources) -> Answers:
    return teachers.ask(experiment.student.teachers, sources.pictures, Path(experiment.data.cache))


@pytest.fixture(scope="module")
def sources(experiment: Experiment) -> Sources:
    return load_sources(experiment)


# --- altered


def test_a_turned_face_shows_one_side_and_the_other_not() -> None:
    column = torch.linspace(0, 255, 112).expand(40, 3, 112, 112)
    made = altered.turned(column.clone(), generator())
    middle = made[:, 0, 40:80, 20:92].mean((1, 2)) - column[0, 0, 40:80, 20:92].mean()
    assert made.shape == column.shape and torch.isfinite(made).all()
    assert (middle > 5).sum() > 8 and (middle < -5).sum() > 8  # one half of the face fills the picture, either one


def test_what_is_covered_is_told_cell_by_cell() -> None:
    images = smooth(30).float()
    made, seen = altered.covered(images, 1.0, generator())
    changed = (made != images).any(1).float().view(30, 7, 16, 7, 16).mean((2, 4))
    assert (seen < 0.5).flatten(1).any(1).float().mean() > 0.8
    assert (changed[seen < 0.3] > 0.5).all() and (changed[seen == 1] == 0).all()
    same, all_seen = altered.covered(images, 0.0, generator())
    assert torch.equal(same, images) and bool((all_seen == 1).all())


def test_beyond_the_edge_of_a_photograph_nothing_is_seen() -> None:
    images = smooth(60).float() + 15
    made, seen = altered.cut(images, 0.5, generator())
    black = (made == 0).all(1)
    assert 0.3 < black.flatten(1).any(1).float().mean() < 0.6
    assert bool((black | (made == images).all(1)).all())  # black, or as it was
    shares = black.float().view(60, 7, 16, 7, 16).mean((2, 4))
    assert torch.equal(seen, (shares <= 0.7).float()) and bool((seen == 0).any())
    again, seen_again = altered.cut(made, 0.0, generator())  # pictures may come so
    assert torch.equal(again, made) and torch.equal(seen_again, seen)


@pytest.mark.parametrize("what", ["shrunk", "shaded", "compressed"])
def test_a_share_of_the_faces_is_altered(what: str) -> None:
    images = smooth(40)
    given = images if what == "compressed" else images.float()
    made = getattr(altered, what)(given, 0.5, generator())
    changed = (made != given).flatten(1).any(1).float().mean()
    assert 0.2 < changed < 0.8 and made.dtype == given.dtype
    assert torch.equal(made, getattr(altered, what)(given, 0.5, generator()))  # by the draws alone


# --- the archive


def test_who_is_held_out_under_another_name_is_found() -> None:
    embeddings = torch.eye(4)[[0, 0, 1, 2, 2]]
    people = ["lfw-Ann", "cfp-007", "lfw-Bob", "lfw-Cid", "lfw-Dan"]
    found = gather.doubles(embeddings, people, {"cfp-007", "lfw-Dan"})
    assert found == {"lfw-Ann": ("cfp-007", 1.0)}  # Cid looks like Dan, but one set's people have one name each


# --- teachers


def test_cells_of_teachers_add_up_to_their_embeddings(sources: Sources, answers: Answers) -> None:
    whole = recogniser(1)
    with torch.no_grad():
        images = sources.pictures.images[:4]
        embedding = whole.embed(whole.grid(normalised(whole, images)))
        constant = cell_matrices(whole).constant.float()
    length = embedding.norm(dim=1, keepdim=True)
    cells = answers.cells[1][0, :4].float()
    torch.testing.assert_close(cells.sum(1), (embedding - constant) / length, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(answers.embeddings[1][0, :4], embedding / length)


def test_answers_of_mirrored_pictures_are_theirs(sources: Sources, answers: Answers) -> None:
    whole = recogniser(0)
    with torch.no_grad():
        embedding = whole.embed(whole.grid(normalised(whole, sources.pictures.images[:2].flip(3))))
    torch.testing.assert_close(answers.embeddings[0][1, :2], nn.functional.normalize(embedding))


def test_interrupted_answers_are_taken_up_again(
    experiment: Experiment, sources: Sources, answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "_BLOCK", 4)
    monkeypatch.setattr(teachers, "_NOTED", 1)

    class Stopped(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        if done == 12:
            raise Stopped

    with pytest.raises(Stopped):
        teachers.ask(["0"], sources.pictures, tmp_path, progress=stop)
    seen: list[int] = []
    again = teachers.ask(["0"], sources.pictures, tmp_path, progress=lambda name, done, total: seen.append(done))
    assert seen[0] == 16
    torch.testing.assert_close(again.embeddings[0], answers.embeddings[0])


def test_targets_keep_what_their_teachers_say(answers: Answers) -> None:
    cells = [part[0] for part in answers.cells]
    space = TargetSpace.fit(cells, (1.25, 1.0), (7, 7), 1.5, CHANNELS)
    together = space.side_by_side(cells)
    features = space.features(together)
    assert features.shape == (PEOPLE * EACH, CHANNELS, 7, 7)
    shared = torch.matmul(space.sharing, together) - space.mean
    back = torch.einsum("pkd,nkp->npd", space.basis, features.flatten(2)) / space.basis[0, 0].square().sum()
    assert (back - shared).norm() < 0.8 * shared.norm()  # 8 of 33 axes of networks that nobody trained
    assert float(features.square().mean()) == pytest.approx(1, rel=1e-4)


def test_what_is_wanted_of_a_picture_leans_towards_its_person(experiment: Experiment, sources: Sources) -> None:
    student = dataclasses.replace(experiment.student, person=0.0, profile=0.0)
    alone = load_sources(dataclasses.replace(experiment, student=student))
    person = torch.arange(EACH)  # of the first person, views and all

    def apart(made: Sources) -> float:
        own = made.features[:, person].float()
        return float((own - own.mean((0, 1))).square().mean() / own.square().mean())

    assert 0 < apart(sources) < apart(alone)
    assert float(sources.features[:, sources.trained].float().square().mean()) == pytest.approx(1, rel=1e-2)
    cosines = (sources.embeddings[0, person] @ sources.embeddings[0, person].T).mean()
    assert cosines > (alone.embeddings[0, person] @ alone.embeddings[0, person].T).mean()


def test_a_profile_is_wanted_as_the_person_looks_from_the_front(experiment: Experiment) -> None:
    whole = load_sources(
        dataclasses.replace(experiment, student=dataclasses.replace(experiment.student, person=0.0, profile=1.0))
    )
    own = [number for number, key in enumerate(whole.pictures.keys) if key.startswith("cfp-p1/")]
    profile = next(number for number in own if "profile" in whole.pictures.keys[number])
    frontal = torch.tensor([number for number in own if number != profile])
    for view in range(2):
        torch.testing.assert_close(
            whole.features[view, profile].float(), whole.features[:, frontal].float().mean((0, 1)), atol=2e-3, rtol=2e-3
        )


def test_a_cell_that_still_tells_what_was_there_leaks(experiment: Experiment, sources: Sources) -> None:
    loss = WeightConfig(features=0, pairs=0, cells=0, leak=1, evidence=0)
    task = StudentTask(sources, dataclasses.replace(experiment, loss=loss, swaps=SwapConfig(share=1, own=0)))
    batch = task.batch(BatchIndex(0, 1), 8)
    foreign = batch["people"] != batch["faces"][:, None, None]
    assert bool(foreign.any())
    made = {"before": batch["before"].float(), "wanted": batch["features"]}
    leaks = {}
    for name, features in made.items():
        task.module.head.features = lambda grid, features=features: features  # type: ignore[method-assign, misc]
        leaks[name] = float(task.loss(batch)[0].detach())
    assert leaks["wanted"] == pytest.approx(0, abs=1e-6) and leaks["before"] > 0.1


# --- surgery


def test_the_channels_that_matter_are_kept() -> None:
    h = torch.randn(400, 6, generator=generator())
    h[:, 1] = h[:, 0] + 0.01 * h[:, 1]  # one of the two is enough
    y = h[:, [0, 4]] @ torch.randn(2, 3, generator=generator(1))
    kept = surgery.kept_channels(h.T @ h, h.T @ y, 2).tolist()
    assert kept in ([0, 4], [1, 4])


@pytest.mark.thorough
def test_a_narrowed_network_says_nearly_what_the_wide_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "_STEM", (60, 16, 4e-3))
    monkeypatch.setattr(surgery, "_FACES", 64)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = MobileFaceNetReLU().eval().requires_grad_(False)
    images = smooth(64)
    body = surgery.narrowed(network, images)
    with torch.no_grad():
        wide = network.grid(normalised(network, images))
        narrow = body.grid(normalised(body, images))
        fresh = SlimFaceNet().eval().grid(normalised(body, images))

    def lost(made: Tensor) -> float:
        return float((made - wide).square().mean() / wide.var())

    assert lost(narrow) < 0.8 * lost(fresh)


def test_the_first_head_solves_for_the_wanted_features() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        body = SlimFaceNet().eval()
    images = smooth(40)
    with torch.no_grad():
        grid = body.grid(normalised(body, images))
        wanted = torch.einsum("kc,nchw->nkhw", torch.randn(CHANNELS, 512, generator=generator()), grid) + 3
        head = surgery.ridge_head(body, images, wanted, 1e-6)
        made = head.features(grid)
    assert float((made - wanted).square().mean() / wanted.var()) < 0.01


def written(experiment: Experiment, config: Path) -> str:
    """The path of a file with an experiment's data and teachers."""
    data, student = experiment.data, experiment.student
    config.write_text(
        f"""task = "recipes.student"
        [data]
        pictures = "{data.pictures}"
        held_out_list = "{data.held_out_list}"
        cache = "{data.cache}"
        [student]
        teachers = {json.dumps(student.teachers)}
        trust = [1.25, 1.0]
        start = "unused"
        channels = {CHANNELS}
        [train]
        steps = 1
        batch = 8"""
    )
    return str(config)


def test_a_slim_model_gets_a_head_for_other_targets(experiment: Experiment, sources: Sources, tmp_path: Path) -> None:
    student, out = experiment.student, tmp_path / "out.safetensors"
    config = written(experiment, tmp_path / "x.toml")
    assert surgery.main([config, "--network", student.start, "--out", str(out), "--threads", "1"]) == 0
    first, again = load_model(student.start), load_model(out)
    assert torch.equal(again.backbone.widen.weight, first.backbone.widen.weight)  # type: ignore[arg-type, union-attr]
    images = sources.pictures.images[sources.trained]
    with torch.no_grad():
        wanted = sources.features[0, sources.trained].float()
        made, before = (m.features(normalised(m.backbone, images)) for m in (again, first))
    assert float((made - wanted).square().mean()) < 0.9 * float((before - wanted).square().mean())


def test_states_are_averaged(experiment: Experiment, tmp_path: Path) -> None:
    config = written(experiment, tmp_path / "x.toml")
    first = load_model(experiment.student.start)
    other = load_model(experiment.student.start)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.125)
    save_model(other, tmp_path / "other.safetensors")
    states = [experiment.student.start, str(tmp_path / "other.safetensors")]
    assert average.main([config, *states, "--out", str(tmp_path / "mean"), "--threads", "1"]) == 0
    mean = load_model(tmp_path / "mean" / "model.safetensors")
    for name, value in mean.state_dict().items():
        if value.is_floating_point():
            wanted = (first.state_dict()[name] + other.state_dict()[name]) / 2
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-6)
    assert mean.head.fixed_attention == "norm"  # type: ignore[union-attr]
    narrow = XCosModel(recogniser(0), XCosHead(24, CHANNELS, attention="norm"))
    with pytest.raises(XCosError, match=r"models\[1\]: expected a head with a matrix for each cell"):
        average.mean_of([first, narrow])
    assert average.main([config, *states, "--set", "task=head", "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


# --- the student


def test_a_batch_holds_what_is_wanted_of_each_face(experiment: Experiment, sources: Sources) -> None:
    plain = dataclasses.replace(
        experiment,
        alter=AlterConfig(turned=0, covered=0, cut=0, far=0, small=0, dark=0, jpeg=0),
        swaps=SwapConfig(share=0),
    )
    task = StudentTask(sources, plain)
    batch = task.batch(BatchIndex(0, 0), 8)
    assert bool(batch["whole"].all()) and bool((batch["seen"] == 1).all())
    assert torch.equal(batch["people"], batch["faces"][:, None, None].expand(-1, 7, 7))
    assert not set(batch["faces"].tolist()) & set(sources.pictures.people[sources.held_out].tolist())
    both = sources.features[:, sources.trained].float().flatten(0, 1).flatten(1)
    nearest = torch.cdist(batch["features"].flatten(1), both).amin(1)
    assert float(nearest.max()) < 1e-3
    again = task.batch(BatchIndex(0, 0), 8)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_pasted_regions_are_wanted_as_their_owners_say(experiment: Experiment, sources: Sources) -> None:
    task = StudentTask(sources, dataclasses.replace(experiment, swaps=SwapConfig(share=1, own=0)))
    batch = task.batch(BatchIndex(0, 1), 8)
    assert bool(batch["whole"][:2].all()) and not batch["whole"].all()  # the first ones stay whole
    mixed = batch["people"] != batch["faces"][:, None, None]
    assert 0.02 < float(mixed.float().mean()) < 0.8
    # Each cell is wanted as in the owner's whole face: none of its neighbours across the border is in it.
    own = sources.features[:, sources.trained].float().flatten(0, 1).flatten(2).transpose(1, 2)  # [faces, cells, K]
    wanted = batch["features"].flatten(2).transpose(1, 2)[~batch["whole"]]
    seen = batch["seen"].flatten(1)[~batch["whole"]] == 1
    nearest = (wanted[:, None] - own[None]).norm(dim=3).amin(1)
    assert float(nearest[seen].max()) < 1e-2


def test_what_is_covered_says_nothing(experiment: Experiment, sources: Sources) -> None:
    plain = AlterConfig(turned=0, covered=1, cut=0, far=0, small=0, dark=0, jpeg=0)
    batch = StudentTask(sources, dataclasses.replace(experiment, alter=plain)).batch(BatchIndex(0, 0), 8)
    wanted, seen = batch["features"].abs().amax(1), batch["seen"]
    assert float(wanted[seen == 0].max()) == 0 and float(wanted[seen == 1].min()) > 0


def test_training_goes_on_and_is_exported_with_its_sets(
    experiment: Experiment, sources: Sources, tmp_path: Path
) -> None:
    task = StudentTask(sources, experiment)
    before = task.module.body.widen.weight.detach().clone()  # type: ignore[union-attr]
    result = train(task, experiment.train, tmp_path, show=False)
    assert not torch.equal(before, task.module.body.widen.weight)  # type: ignore[arg-type, union-attr]
    assert np.isfinite(result.loss)
    model = load_model(result.files[0])
    assert model.architecture == "slim" and isinstance(model.head, XCosHead)
    with torch.no_grad():
        images = sources.pictures.images[:2]
        ours = task.module.head.features(task.module.body.grid(normalised(task.module.body, images)).contiguous())
        torch.testing.assert_close(
            model.features_of(list(images.permute(0, 2, 3, 1).numpy())), ours, atol=1e-4, rtol=1e-3
        )


@pytest.mark.thorough
def test_a_killed_training_ends_with_the_same_bits(experiment: Experiment, sources: Sources, tmp_path: Path) -> None:
    config = dataclasses.replace(experiment.train, steps=4, checkpoint_every=2)
    whole = StudentTask(sources, experiment)
    train(whole, config, tmp_path / "whole", show=False)

    class Killed(Exception):
        pass

    def kill(step: int, row: object) -> None:
        if step == 3:
            raise Killed

    first = StudentTask(sources, experiment)
    with pytest.raises(Killed):
        train(first, dataclasses.replace(config, log_every=1), tmp_path / "b", show=False, on_step=kill)
    second = StudentTask(sources, experiment)
    train(second, config, tmp_path / "b", resume=True, show=False)
    for (name, one), other in zip(whole.module.state_dict().items(), second.module.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_figures_of_people_held_out_are_told_set_by_set(experiment: Experiment, sources: Sources) -> None:
    task = StudentTask(sources, experiment)
    keys = ["lfw-p0", "lfw-p2", "lfw-p4", "cfp-p1", "cfp-p3", "cfp-p5"]
    everyone = sources._replace(held_out=sources.pictures.of_people(keys))
    task.sources = everyone
    figures = task.evaluate(task.module)
    assert set(figures) == {"lfw", "cfp", "cfp_profile"}
    assert all(0 <= value <= 1 for value in figures.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trust": (1.0,)}, "student.trust: expected 2 numbers, got 1"),
        ({"channels": 4}, "student.start: expected a model with 4 channels, got 8"),
    ],
)
def test_settings_that_do_not_fit_are_named(experiment: Experiment, change: dict[str, object], message: str) -> None:
    bad = dataclasses.replace(experiment, student=dataclasses.replace(experiment.student, **change))  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        StudentTask(load_sources(bad), bad)
    assert message in str(caught.value)


def test_weights_of_losses_are_those_asked_for(experiment: Experiment, sources: Sources) -> None:
    task = StudentTask(
        sources, dataclasses.replace(experiment, loss=WeightConfig(features=2, pairs=0, cells=0, leak=0, evidence=0))
    )
    total, parts = task.loss(task.batch(BatchIndex(0, 0), 8))
    assert float(total.detach()) == pytest.approx(2 * float(parts["features"]), rel=1e-5)
    assert set(parts) == {"features", "leak", "cells", "evidence", "pairs"}


def test_pasted_cells_count_as_often_as_asked(experiment: Experiment, sources: Sources) -> None:
    costs = []
    for pasted in (1.0, 1e6):
        loss = WeightConfig(features=1, pairs=0, cells=0, leak=0, evidence=0, pasted=pasted)
        task = StudentTask(sources, dataclasses.replace(experiment, loss=loss, swaps=SwapConfig(share=1, own=0.5)))
        batch = task.batch(BatchIndex(0, 1), 8)
        with torch.no_grad():
            grid = task.module.body.grid(normalised(task.module.body, batch["images"]))
            apart = (task.module.head.features(grid.contiguous()) - batch["features"]).square().mean(1)
            costs.append(float(task.loss(batch)[0]))
        assert costs[0] == pytest.approx(float(apart.mean()), rel=1e-3)
    assert bool(batch["pasted"].any())
    assert costs[1] == pytest.approx(float(apart[batch["pasted"]].mean()), rel=1e-3)


def test_cells_cost_what_their_cosines_miss_where_both_are_seen() -> None:
    wanted = torch.zeros(2, 2, 1, 2)
    wanted[:, 0] = 1
    made = wanted.clone()
    made[1, :, 0, 1] = torch.tensor([0.0, 3.0])  # turned by a right angle: S is 0 where 1 is wanted
    seen = torch.ones(2, 1, 2)
    assert float(_cells_loss(made, wanted, seen)) == pytest.approx(1 / 2)
    seen[0, 0, 1] = 0
    assert float(_cells_loss(made, wanted, seen)) == pytest.approx(0)


def test_evidence_is_the_mean_over_four_kinds_of_cells_that_are_seen() -> None:
    features = torch.randn(5, 4, 2, 3, dtype=torch.float64, generator=generator())
    faces = torch.tensor([0, 0, 1, 1, 2])
    people = faces[:, None, None].repeat(1, 2, 3)
    people[0, 0, 1], people[2, 1, 0], people[3, 0, 0] = 1, 2, 0
    seen = torch.ones(5, 2, 3, dtype=torch.float64)
    seen[1, 1, 2], seen[4, 0, 0] = 0.2, 0
    evidence = CellEvidence((2, 3)).double()
    with torch.no_grad():
        evidence.scale.uniform_(1, 5, generator=generator(2))
        evidence.shift.uniform_(-1, 1, generator=generator(3))
    kinds: dict[tuple[bool, bool], list[float]] = {}
    for first in range(5):
        for second in range(first + 1, 5):
            for cell, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
                if min(seen[first, row, column], seen[second, row, column]) <= 0.5:
                    continue
                cosine = nn.functional.cosine_similarity(
                    features[first, :, row, column], features[second, :, row, column], dim=0
                )
                same = bool(people[first, row, column] == people[second, row, column])
                chance = torch.sigmoid(evidence.scale[cell] * cosine + evidence.shift[cell])
                cost = -float((chance if same else 1 - chance).detach().log())
                kinds.setdefault((same, bool(faces[first] == faces[second])), []).append(cost)
    assert len(kinds) == 4
    expected = float(np.mean([np.mean(costs) for costs in kinds.values()]))
    assert float(evidence.loss(features, people, faces, seen).detach()) == pytest.approx(expected, rel=1e-12)


def test_evidence_takes_batches_without_some_kinds() -> None:
    features, seen = torch.randn(3, 4, 2, 2), torch.ones(3, 2, 2)
    people = torch.arange(3)[:, None, None].repeat(1, 2, 2)
    assert CellEvidence((2, 2)).loss(features, people, people[:, 0, 0], seen).isfinite()
    assert CellEvidence((2, 2)).loss(features, people, people[:, 0, 0], torch.zeros_like(seen)).isfinite()


def test_faces_without_a_twin_stay_whole(experiment: Experiment, sources: Sources) -> None:
    chosen, twins = StudentTask(sources, experiment)._drawn(8, generator())
    people = sources.pictures.people[chosen]
    alone = twins == torch.arange(8)
    assert alone.tolist() == [True] * 2 + [False] * 6
    assert torch.equal(people[twins], people) and bool((chosen[twins] != chosen)[~alone].all())


def test_missing_pictures_are_one_error(experiment: Experiment, tmp_path: Path) -> None:
    data = dataclasses.replace(experiment.data, pictures=str(tmp_path / "none.zip"))
    with pytest.raises(XCosError, match=r"none\.zip"):
        load_sources(dataclasses.replace(experiment, data=data))


def test_reading_keeps_the_order_that_answers_have(faces: Path, sources: Sources) -> None:
    assert read_pictures(faces).fingerprint == sources.pictures.fingerprint


# --- in a given time, on another machine


@pytest.fixture
def packed(experiment: Experiment, tmp_path: Path) -> Path:
    """The folder that is carried."""
    settings = dataclasses.asdict(experiment)
    config = tmp_path / "experiment.toml"
    lines = ['task = "recipes.student"']
    for table in ("data", "student", "train"):
        given = {key: value for key, value in settings[table].items() if value is not None}
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in given.items())]
    config.write_text("\n".join(lines))
    out = tmp_path / "carried"
    assert pack.main([str(config), "--out", str(out)]) == 0
    return out


def test_what_is_carried_is_whole_and_small(packed: Path, faces: Path) -> None:
    names = set(zipfile.ZipFile(packed / "faces.zip").namelist())
    assert {name.rsplit(".", 1)[0] for name in names} == {
        name.rsplit(".", 1)[0] for name in zipfile.ZipFile(faces).namelist()
    }
    assert all(name.endswith(".webp") for name in names)
    assert {file.name for file in packed.iterdir()} == {
        "0", "1", "experiment.json", "faces.zip", "held_out.txt", "start.safetensors"
    }  # fmt: skip


def test_a_folder_too_large_is_told(experiment: Experiment, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = packed.parent / "experiment.toml"
    assert pack.main([str(config), "--out", str(packed.parent / "b"), "--megabytes", "0.1"]) == 2
    assert "expected at most 0.1 MB" in capsys.readouterr().err


def test_as_many_steps_as_fit_are_trained(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_minutes, "_FIRST", 1)
    before = Path.cwd()
    try:
        out = tmp_path / "out"
        arguments = [str(packed), "--minutes", "0.12", "--device", "cpu", "--out", str(out), "--set", "train.batch=8"]
        assert in_minutes.main(arguments) == 0
    finally:
        os.chdir(before)
    model = load_model(out / "model.safetensors")
    assert model.architecture == "slim"
    assert (out / "model.safetensors").stat().st_size < 16e6 and not (out / "checkpoint.safetensors").exists()


@pytest.mark.real_data
def test_sface_of_torch_says_what_onnxruntime_does(shared_data: Path) -> None:
    path = str(shared_data / "sface_2021dec_int8bq.onnx")
    ours, theirs = SFace(path).eval(), backbones.OnnxRecogniser(path)
    with torch.no_grad():
        made = [net.embed(net.grid(normalised(net, smooth(3)))) for net in (ours, theirs)]
    torch.testing.assert_close(*made, atol=1e-4, rtol=1e-4)
