"""Faces with swapped regions: what is pasted, whose each cell is, and a student that learns from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.bank import BankConfig, open_bank, teacher_answers
from recipes.distill import DistillConfig, DistillSources, DistillTask, StudentConfig
from recipes.swaps import CellEvidence, SwapConfig, drawn_masks, swapped
from xcos_ext import backbones
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosHead, XCosModel, load_model, plug, plug_statistics, save_model
from xcos_ext.training import BatchIndex, ConfigError, TrainConfig, train
from xcos_ext.training.data import Pictures
from xcos_ext.training.tasks.config import DataConfig

pytestmark = pytest.mark.usefixtures("one_thread")

PEOPLE, EACH = 8, 3
SWAPS = SwapConfig(people=3, others=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    low = torch.rand(PEOPLE * EACH, 3, 6, 6, generator=generator(1))
    images = (F.interpolate(low, size=(112, 112), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    people = torch.arange(PEOPLE).repeat_interleave(EACH)
    keys = tuple(f"p{int(p)}/p{int(p)}_{i % EACH + 1:04d}.jpg" for i, p in enumerate(people))
    return Pictures(images, people, tuple(f"p{p}" for p in range(PEOPLE)), keys, {}, "0123")


@pytest.fixture(scope="module")
def teacher(pictures: Pictures) -> XCosModel:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU())
    output = nn.Sequential(nn.Flatten(), nn.Linear(24 * 49, 32))
    recogniser = backbones.SplitRecogniser(body, output, grid_shape=(24, 7, 7), embedding_size=32).eval()
    recogniser.requires_grad_(False)
    statistics = plug_statistics(recogniser, [pictures.images.permute(0, 2, 3, 1).numpy()], project=8)
    return plug(recogniser, statistics=statistics, project=8)


@pytest.fixture(scope="module")
def sources(teacher: XCosModel, pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> DistillSources:
    folder = tmp_path_factory.mktemp("bank")
    groups = torch.zeros(PEOPLE, dtype=torch.int64)
    bank = open_bank(teacher, pictures, groups, BankConfig(100, seed=3, amp=False), folder)
    return DistillSources(teacher, pictures, bank, [], teacher_answers(teacher, pictures, folder, amp=False))


# --- masks and pastes


def test_masks_are_one_or_two_rectangles_of_cells() -> None:
    masks = drawn_masks(5000, (7, 7), generator())
    assert masks.dtype == torch.bool and masks.shape == (5000, 7, 7)
    sizes = masks.flatten(1).sum(1)
    assert sizes.min() >= 1 and sizes.max() <= 24
    share = masks.float().mean(0)
    assert 0.8 * share.max() < share.min()  # every cell has its turn, the border's too
    assert torch.equal(masks, drawn_masks(5000, (7, 7), generator()))


def test_masks_fit_small_grids() -> None:
    assert drawn_masks(20, (1, 2), generator()).any((1, 2)).all()


def plain(**options: float) -> SwapConfig:
    """Hard borders, own light, always another person's region, unless said otherwise."""
    given: dict[str, float] = {"share": 1.0, "own": 0.0, "soft": 0.0, "matched": 0.0}
    return dataclasses.replace(SwapConfig(), **(given | options))


def test_a_cell_shows_its_owner_and_nothing_else_changes() -> None:
    images = 255 * torch.rand(6, 3, 28, 28, generator=generator(2))
    made = swapped(images, torch.arange(6), (7, 7), plain(), generator())
    assert not made.whole.any()
    for face in range(6):
        assert len(made.owner[face].unique()) == 2  # one donor each
        for row, column in np.ndindex(7, 7):
            cell = np.s_[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            assert torch.equal(made.images[face][cell], images[int(made.owner[face, row, column])][cell])


def test_without_a_share_faces_stay_whole() -> None:
    images = torch.rand(5, 3, 28, 28, generator=generator(2))
    made = swapped(images, torch.arange(5), (7, 7), plain(share=0.0), generator())
    assert made.whole.all() and torch.equal(made.images, images)
    assert torch.equal(made.owner, torch.arange(5)[:, None, None].expand(5, 7, 7))


def test_own_regions_come_from_the_twin() -> None:
    images = torch.rand(4, 3, 28, 28, generator=generator(2))
    twins = torch.tensor([1, 0, 2, 3])  # the last two have none
    made = swapped(images, twins, (7, 7), plain(own=1.0), generator())
    owners = [set(owner.unique().tolist()) for owner in made.owner]
    assert owners[:2] == [{0, 1}, {0, 1}]
    assert all(len(owner) == 2 for owner in owners[2:])


def test_matched_regions_take_the_light_of_the_face_and_soft_borders_mix() -> None:
    dark, bright = torch.full((1, 3, 28, 28), 40.0), torch.full((1, 3, 28, 28), 200.0)
    noise = torch.randn(2, 3, 28, 28, generator=generator(3))
    images = torch.cat((dark, bright)) + noise
    matched = swapped(images, torch.arange(2), (7, 7), plain(matched=1.0), generator())
    assert matched.images[0].max() < 60 and matched.images[1].min() > 180
    soft = swapped(images, torch.arange(2), (7, 7), plain(soft=1.0), generator())
    assert ((soft.images[0] > 60) & (soft.images[0] < 180)).any()


# --- the loss on cells


def test_evidence_is_the_mean_over_four_kinds_of_cells() -> None:
    features = torch.randn(5, 4, 2, 3, generator=generator(1), dtype=torch.float64)
    people = torch.tensor([0, 0, 1, 2, 1])[:, None, None].expand(5, 2, 3).clone()
    people[0, 1, 2] = 7  # swapped cells
    people[3, 0, 1] = 1
    evidence = CellEvidence((2, 3)).double()
    with torch.no_grad():
        evidence.scale.uniform_(1, 5, generator=generator(2))
        evidence.shift.uniform_(-1, 1, generator=generator(3))
    faces = torch.tensor([0, 0, 1, 2, 1])
    losses: dict[tuple[bool, bool], list[float]] = {}
    for i in range(5):
        for j in range(i + 1, 5):
            for row, column in np.ndindex(2, 3):
                cosine = F.cosine_similarity(features[i, :, row, column], features[j, :, row, column], dim=0)
                logit = evidence.scale[row, column] * cosine + evidence.shift[row, column]
                same = bool(people[i, row, column] == people[j, row, column])
                kind = same, bool(faces[i] == faces[j])
                losses.setdefault(kind, []).append(float(F.softplus(-logit if same else logit).detach()))
    assert set(losses) == {(True, True), (False, False), (False, True), (True, False)}
    expected = np.mean([np.mean(values) for values in losses.values()])
    assert float(evidence.loss(features, people, faces).detach()) == pytest.approx(expected, rel=1e-12)


def test_evidence_takes_batches_of_one_kind() -> None:
    features, people = torch.randn(3, 4, 2, 2), torch.arange(3)[:, None, None].expand(3, 2, 2)
    assert CellEvidence((2, 2)).loss(features, people, people[:, 0, 0]).isfinite()
    assert CellEvidence((2, 2)).loss(features, torch.zeros_like(people), torch.zeros(3)).isfinite()


# --- what the teacher says of whole faces


def test_the_teachers_words_are_those_on_each_view_and_are_kept(
    teacher: XCosModel, pictures: Pictures, tmp_path: Path
) -> None:
    answers = teacher_answers(teacher, pictures, tmp_path, amp=False)
    images = teacher.preprocessing(pictures.images[5:6].flip(3).permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        features, embedding = teacher.features(images), F.normalize(teacher.embedding(images))
    torch.testing.assert_close(answers.features[1, 5].float(), features[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(answers.embeddings[1, 5], embedding[0], atol=1e-5, rtol=1e-5)
    (file,) = tmp_path.glob("answers-*.safetensors")
    before = file.stat().st_mtime_ns
    again = teacher_answers(teacher, pictures, tmp_path, amp=False)
    assert torch.equal(again.features, answers.features) and file.stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_written_is_named(teacher: XCosModel, pictures: Pictures, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(XCosError, match="cannot be written"):
        teacher_answers(teacher, pictures, tmp_path / "file")


# --- the student


def make_task(sources: DistillSources, swaps: SwapConfig = SWAPS, **options: object) -> DistillTask:
    student = StudentConfig("teacher.pt", channels=8, **options)  # type: ignore[arg-type]
    return DistillTask(sources, student, DistillConfig(), DataConfig("faces"), swaps, steps=12)


CONFIG = TrainConfig(
    steps=12, batch=8, optimiser="muon", rate=1e-3, beta2=0.99, warmup=2, clip=5.0, ema=0.5, workers=0, log_every=1
)


def test_a_batch_says_of_each_cell_what_the_teacher_says_of_its_owner(sources: DistillSources) -> None:
    task = make_task(sources, dataclasses.replace(SWAPS, share=1.0))
    batch = task.batch(BatchIndex(0, 3), 8)["swaps"]
    assert torch.equal(batch["images"], task.batch(BatchIndex(0, 3), 8)["swaps"]["images"])
    assert batch["images"].dtype == torch.uint8 and batch["images"].shape == (6, 3, 112, 112)
    answers = sources.answers
    assert answers is not None
    everything = answers.features.flatten(0, 1).permute(0, 2, 3, 1)  # [2N, h, w, K]
    owners = sources.pictures.people.repeat(2)
    for face in range(6):
        for row, column in ((0, 0), (3, 3), (6, 2)):
            wanted = batch["features"][face, :, row, column]
            found = (everything[:, row, column] == wanted).all(1)
            assert int(batch["people"][face, row, column]) in owners[found].tolist()


@pytest.mark.thorough
def test_a_student_learns_from_swapped_faces_and_comes_back_from_its_file(
    sources: DistillSources, tmp_path: Path
) -> None:
    rows: list[dict[str, float]] = []
    task = make_task(sources)
    result = train(task, CONFIG, tmp_path, show=False, on_step=lambda step, row: rows.append(dict(row)))
    assert {"features", "pairs", "swapped", "cells"} <= set(rows[0])
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    model = load_model(result.files[0])
    assert model.architecture == "compact"
    assert not any("evidence" in name for name in model.state_dict())


def test_a_student_starts_from_a_model_of_the_same_form(sources: DistillSources, tmp_path: Path) -> None:
    first = make_task(sources)
    with torch.no_grad():
        for parameter in first.module.head.parameters():
            parameter.add_(0.01)
    save_model(XCosModel(first.module.body, first.module.head).eval(), tmp_path / "m.safetensors")
    task = make_task(sources, start=str(tmp_path / "m.safetensors"))
    assert torch.equal(task.module.head.cells.weight, first.module.head.cells.weight)  # type: ignore[union-attr]
    other = backbones.create("mobilefacenet", output=False)
    save_model(XCosModel(other, XCosHead(other.grid_shape[0], 8)).eval(), tmp_path / "other.safetensors")
    with pytest.raises(
        ConfigError, match=r"student\.start: expected a model with body 'compact' .* got 'mobilefacenet'"
    ):
        make_task(sources, start=str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match=r"body 'compact' and head .*'attention': 'norm'.* got 'compact'"):
        make_task(sources, start=str(tmp_path / "m.safetensors"), attention="norm")


def test_sources_without_the_teachers_words_are_refused(sources: DistillSources) -> None:
    with pytest.raises(ConfigError, match=r"swaps\.people: expected sources that were loaded for swapped faces"):
        make_task(dataclasses.replace(sources, answers=None))


def test_people_held_out_are_in_no_swapped_face(sources: DistillSources, tmp_path: Path) -> None:
    (tmp_path / "people.txt").write_text("p4\np5\n")
    student, data = StudentConfig("t.pt", channels=8), DataConfig("faces", held_out_list=str(tmp_path / "people.txt"))
    task = DistillTask(sources, student, DistillConfig(), data, SWAPS, steps=12)
    for step in range(20):
        people: Tensor = task.batch(BatchIndex(0, step), 8)["swaps"]["people"]
        assert not np.isin(people.numpy(), (4, 5)).any()
