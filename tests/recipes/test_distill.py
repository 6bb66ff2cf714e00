"""Mixed faces, the teacher's bank of them, and a student that learns from the bank."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recipes.bank import BankConfig, open_bank
from recipes.distill import DistillConfig, DistillSources, DistillTask, StudentConfig
from recipes.mixing import mixed, warped
from xcos_ext import backbones
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosModel, load_model, plug, plug_statistics
from xcos_ext.training import BatchIndex, ConfigError, TrainConfig, train
from xcos_ext.training.data import Pictures
from xcos_ext.training.tasks.config import DataConfig

pytestmark = pytest.mark.usefixtures("one_thread")

PEOPLE, EACH = 8, 3
HINTS = ("body.0", "body.1")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def faces(count: int, size: int = 112) -> Tensor:
    """Smooth coloured pictures, uint8 [count, 3, size, size]."""
    low = torch.rand(count, 3, 6, 6, generator=generator(1))
    return (nn.functional.interpolate(low, size=(size, size), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    people = torch.arange(PEOPLE).repeat_interleave(EACH)
    keys = tuple(f"p{int(p)}/p{int(p)}_{i % EACH + 1:04d}.jpg" for i, p in enumerate(people))
    return Pictures(faces(PEOPLE * EACH), people, tuple(f"p{p}" for p in range(PEOPLE)), keys, {}, "0123")


@pytest.fixture(scope="module")
def teacher(pictures: Pictures) -> XCosModel:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU())
    body = nn.Sequential(stem, nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU()))
    output = nn.Sequential(nn.Flatten(), nn.Linear(24 * 49, 32))
    recogniser = backbones.SplitRecogniser(body, output, grid_shape=(24, 7, 7), embedding_size=32).eval()
    recogniser.requires_grad_(False)
    images = [pictures.images.permute(0, 2, 3, 1).numpy()]
    statistics = plug_statistics(recogniser, images, project=8)
    return plug(recogniser, statistics=statistics, project=8)


GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])


@pytest.fixture(scope="module")
def sources(teacher: XCosModel, pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> DistillSources:
    config = BankConfig(100, seed=3, hints=HINTS, amp=False)
    bank = open_bank(teacher, pictures, GROUPS, config, tmp_path_factory.mktemp("bank"))
    return DistillSources(teacher, pictures, bank, [])


# --- mixtures


def test_mixtures_lie_between_both_faces_and_some_faces_stay_as_they_are() -> None:
    dark, bright = torch.full((200, 3, 112, 112), 60.0), torch.full((200, 3, 112, 112), 200.0)
    ramp = torch.linspace(-20, 20, 112)
    dark, bright = dark + ramp, bright + ramp.flip(0)
    made = mixed(dark, bright, generator())
    kept = (made == dark).flatten(1).all(1).float().mean()
    assert 0.3 < kept < 0.6
    # The partner takes the face's brightness: both ramps now run from 40 to 80, and nothing is near 200.
    assert made.min() > 38 and made.max() < 82


def test_warping_moves_pixels_a_little_and_not_all_pictures() -> None:
    rows = torch.arange(112.0).view(1, 1, 112, 1).expand(64, 3, 112, 112)
    moved = (warped(rows, generator()) - rows)[:, 0, 20:-20, 20:-20].abs().amax((1, 2))
    assert 0.2 < (moved < 1e-3).float().mean() < 0.6
    assert moved.max() < 14


# --- the bank


def test_the_bank_holds_what_the_teacher_says_of_its_faces(teacher: XCosModel, sources: DistillSources) -> None:
    bank = sources.bank
    images = teacher.preprocessing(bank.images[:5].permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        torch.testing.assert_close(bank.features[:5].float(), teacher.features(images), atol=2e-2, rtol=1e-2)
        torch.testing.assert_close(bank.embeddings[:5].float(), teacher.embedding(images), atol=2e-2, rtol=1e-2)
    assert bank.hints[HINTS[0]].shape == (100, 16, 14, 14) and bank.hints[HINTS[1]].shape == (100, 24, 7, 7)


def test_faces_are_mixed_within_their_group_only(sources: DistillSources) -> None:
    bank, people = sources.bank, sources.pictures.people
    assert torch.equal(GROUPS[people[bank.first]], GROUPS[people[bank.second]])
    assert (bank.first != bank.second).any()
    assert len(set(bank.first[: PEOPLE * EACH].tolist())) == PEOPLE * EACH  # every picture before any comes again


@pytest.mark.thorough
def test_an_interrupted_bank_is_taken_up_again(
    teacher: XCosModel, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.bank._NOTED", 2)
    config = BankConfig(64 * 5, seed=3, amp=False)

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 64 * 3:
            raise Stopped

    with pytest.raises(Stopped):
        open_bank(teacher, pictures, GROUPS, config, tmp_path / "a", progress=stop)
    seen: list[int] = []
    resumed = open_bank(
        teacher, pictures, GROUPS, config, tmp_path / "a", progress=lambda done, total: seen.append(done)
    )
    assert seen == [64 * 3, 64 * 4, 64 * 5]
    whole = open_bank(teacher, pictures, GROUPS, config, tmp_path / "b")
    for name in ("images", "first", "second", "features", "embeddings"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name


def test_of_several_processes_one_makes_the_bank(teacher: XCosModel, pictures: Pictures, tmp_path: Path) -> None:
    seen: list[int] = []

    def make(_: int) -> int:
        config = BankConfig(64 * 2, seed=4, amp=False)
        return len(
            open_bank(teacher, pictures, GROUPS, config, tmp_path, progress=lambda done, total: seen.append(done))
        )

    with ThreadPoolExecutor(3) as pool:  # locks are held by open files, so threads are as good as processes
        assert list(pool.map(make, range(3))) == [128] * 3
    assert seen == [64, 128]


def test_a_teacher_in_training_mode_is_refused(teacher: XCosModel, pictures: Pictures, tmp_path: Path) -> None:
    teacher.train()
    try:
        with pytest.raises(ValueError, match="teacher: expected evaluation mode"):
            open_bank(teacher, pictures, GROUPS, BankConfig(8), tmp_path)
    finally:
        teacher.eval()


def test_a_folder_that_cannot_be_written_is_named(teacher: XCosModel, pictures: Pictures, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(XCosError, match="the bank cannot be written"):
        open_bank(teacher, pictures, GROUPS, BankConfig(8), tmp_path / "file")


# --- the student


def make_task(sources: DistillSources, held_out: str | None = None, **options: object) -> DistillTask:
    student = StudentConfig("teacher.pt", channels=8, **{k: v for k, v in options.items() if k == "attention"})  # type: ignore[arg-type]
    loss = DistillConfig(**{k: v for k, v in options.items() if k != "attention"})  # type: ignore[arg-type]
    return DistillTask(sources, student, loss, DataConfig("faces", held_out_list=held_out), steps=12)


CONFIG = TrainConfig(
    steps=12, batch=16, optimiser="muon", rate=3e-3, beta2=0.99, warmup=2, clip=5.0, ema=0.5, workers=0, log_every=1
)


@pytest.mark.thorough
def test_a_student_learns_and_comes_back_from_its_file(sources: DistillSources, tmp_path: Path) -> None:
    task = make_task(sources)
    rows: list[dict[str, float]] = []
    result = train(task, CONFIG, tmp_path, show=False, on_step=lambda step, row: rows.append(dict(row)))
    assert {"features", "pairs", *HINTS} <= set(rows[0])
    assert rows[-1]["loss"] < rows[0]["loss"]
    model = load_model(result.files[0])
    assert model.architecture == "compact" and model.head.channels == 8
    images = model.preprocessing(np.zeros((2, 112, 112, 3), np.uint8))
    with torch.no_grad():
        assert model.score(*model.features(images).split(1)).isfinite().all()


@pytest.mark.thorough
def test_the_attention_starts_as_norm_attention_and_is_trained_from_its_step_on(sources: DistillSources) -> None:
    task = make_task(sources, attention_from=0.5)
    moved: list[bool] = []
    head = task.module.head
    assert head.attention is not None
    start = [p.detach().clone() for p in head.attention.parameters()]

    def watch(step: int, row: object) -> None:
        moved.append(any(not torch.equal(a, b) for a, b in zip(start, head.attention.parameters(), strict=True)))  # type: ignore[union-attr]

    train(task, dataclasses.replace(CONFIG, weight_decay=0.0), show=False, on_step=watch)
    assert moved == [False] * 6 + [True] * 6
    assert task.module.body.training and not head.training


def test_people_held_out_are_in_no_batch_and_in_no_mixture(sources: DistillSources, tmp_path: Path) -> None:
    (tmp_path / "people.txt").write_text("p4\np5\n")
    task = make_task(sources, str(tmp_path / "people.txt"))
    people, bank = sources.pictures.people, sources.bank
    used = task.trained
    for made_of in (bank.first, bank.second):
        assert not np.isin(people[made_of[used]].numpy(), (4, 5)).any()
    left = [int(p) for p in people[bank.first[used]].unique()]
    assert left == [0, 1, 2, 3, 6, 7]
    # Nothing but their group is lost.
    assert len(used) == int((GROUPS[people[bank.first]] != 1).sum())


def test_batches_depend_on_their_place_alone(sources: DistillSources) -> None:
    task = make_task(sources)
    one, two, other = (task.batch(BatchIndex(0, step), 8) for step in (3, 3, 4))
    assert torch.equal(one["images"], two["images"])
    assert not torch.equal(one["images"], other["images"])


def test_hints_of_a_size_that_the_student_has_not_are_named(
    sources: DistillSources, teacher: XCosModel, pictures: Pictures, tmp_path: Path
) -> None:
    bank = open_bank(teacher, pictures, GROUPS, BankConfig(8, hints=("body.0",), amp=False), tmp_path)
    bank.hints["body.0"] = bank.hints["body.0"][..., :13]
    with pytest.raises(
        ConfigError,
        match=r"bank\.hints: expected .* sizes 28x28, 14x14, 7x7, got body\.0 with 14x13",
    ):
        make_task(dataclasses.replace(sources, bank=bank))


def test_odd_batches_are_refused(sources: DistillSources) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch: expected an even number"):
        make_task(sources).batch(BatchIndex(0, 0), 7)
