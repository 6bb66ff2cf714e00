"""recipes/train_landmarks.py: what it draws, its losses, its errors, and a short training, on drawn faces."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import background, draw_face

from recipes import train_landmarks as example
from xcos_ext.faces import ARCFACE_TEMPLATE, similarity_transform
from xcos_ext.faces.landmark_network import LandmarkNetwork

pytestmark = pytest.mark.usefixtures("one_thread")


def photographs(count: int = 6) -> list[Any]:
    made = []
    for i in range(count):
        canvas = background(200, 220, seed=i)
        landmarks = draw_face(canvas, (100 + 3 * i, 100), 110, 5 * i - 10, 0.8 + 0.07 * i)
        made.append(example.Photograph(canvas, landmarks[None], np.zeros((0, 2, 3))))
    return made


def dots() -> Any:
    """Five dots of different brightness where the landmarks are."""
    canvas = np.zeros((300, 300, 3), np.uint8)
    landmarks = ARCFACE_TEMPLATE * 1.5 + 60
    for index, (x, y) in enumerate(np.rint(landmarks).astype(int)):
        canvas[y - 3 : y + 4, x - 3 : x + 4] = 50 + 50 * index
    return example.Photograph(canvas, np.rint(landmarks)[None], np.zeros((0, 2, 3)))


def test_points_follow_the_picture_also_when_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each point lies on its own dot: turned, scaled, shifted, and in the mirror left becomes right."""
    monkeypatch.setattr(example, "spoil", lambda crop, rng, other: crop[:, :, 0])
    batch = example.Sampler([dots()], 80, 3).draw(64, faces=1.0)
    brightness = []
    for crop, points in zip(batch.crops[:, 0].numpy(), batch.points.numpy(), strict=True):
        x, y = np.rint(points).astype(int).T
        if min(x.min(), y.min()) >= 1 and max(x.max(), y.max()) <= 78:
            brightness.append(crop[y, x].astype(int))
    brightness = np.array(brightness)
    assert len(brightness) > 30
    direct = (np.abs(brightness - [50, 100, 150, 200, 250]) < 12).all(1)
    mirrored = (np.abs(brightness - [100, 50, 150, 250, 200]) < 12).all(1)
    assert (direct | mirrored).all()
    assert 10 < direct.sum() < len(brightness) - 10


@pytest.mark.thorough
def test_batches_are_the_same_for_the_same_seed() -> None:
    first, again, other = (example.Sampler(photographs(), 64, seed).draw(8) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.crops, other.crops)
    assert first.face.tolist() == [1.0] * 5 + [0.0] * 3
    assert (first.points[first.face == 0] == 0).all()


def test_spoiled_crops_are_grey_pictures() -> None:
    rng = np.random.default_rng(0)
    crop = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for _ in range(200):
        grey = example.spoil(crop, rng, crop[:, :, 0])
        assert grey.shape == (64, 64)
        assert grey.dtype == np.uint8


def test_the_loss_vanishes_with_its_parts() -> None:
    """A network that is right has a small loss; one eye's distance off costs the one."""
    points = torch.tensor(ARCFACE_TEMPLATE, dtype=torch.float32)[None].repeat(4, 1, 1) * 0.5
    face = torch.tensor([1.0, 1.0, 1.0, 0.0])
    batch = example.Batch(torch.zeros(4, 1, 64, 64), points, face)
    heat = torch.full((4, 5, 16, 16), 1 / 256)

    def network(off: float) -> Any:
        return lambda crops: (points + off * torch.tensor([1.0, 0.0]), torch.tensor([20.0, 20, 20, -20]), heat)

    assert example.loss_of(network(0.0), batch, 0.0) == pytest.approx(0, abs=1e-6)
    eyes = float((points[0, 0] - points[0, 1]).norm())
    assert example.loss_of(network(eyes), batch, 0.0) == pytest.approx(1, abs=1e-5)
    assert example.loss_of(network(0.0), batch, 1.0) == pytest.approx(np.log(256), rel=1e-3)


@pytest.mark.thorough
def test_a_short_training_lowers_the_error() -> None:
    torch.manual_seed(0)
    network = LandmarkNetwork(64, 8)
    test = example.Sampler(photographs(), 64, 99).draw(64, faces=1.0)

    def off() -> float:
        with torch.no_grad():
            return float((network.eval()(test.crops)[0] - test.points).norm(dim=2).mean())

    before = off()
    settings = argparse.Namespace(steps=60, batch=32, rate=3e-3, focus=0.01, bf16=False)
    example.train(network, example.Sampler(photographs(), 64, 1), settings)
    assert off() < 0.6 * before


def test_errors_are_over_the_distance_between_the_eyes() -> None:
    truth = np.stack([ARCFACE_TEMPLATE, 2 * ARCFACE_TEMPLATE])
    eyes = np.linalg.norm(ARCFACE_TEMPLATE[0] - ARCFACE_TEMPLATE[1])
    found = truth + np.array([eyes / 4, 0])
    errors = example.normalised(found, truth)
    np.testing.assert_allclose(errors, [[0.25] * 5, [0.125] * 5])
    summary = example.describe(errors)
    assert summary["mean"] == pytest.approx(18.75)
    assert summary["failures"] == 100
    assert summary["nose"] == pytest.approx(18.75)


def test_distance_of_a_box() -> None:
    face = ARCFACE_TEMPLATE * 1.7 + 30
    exact = similarity_transform(face, ARCFACE_TEMPLATE)
    assert example.distance(exact, face) == pytest.approx(0, abs=1e-9)
    exact[:, 2] += [3, 4]
    assert example.distance(exact, face) == pytest.approx(5)


@pytest.mark.parametrize("zipped", [False, True])
def test_people_of_the_pairs_are_left_out(tmp_path: Path, zipped: bool) -> None:
    rows = "a,b,same\nAnna/Anna_0001.jpg,Anna/Anna_0002.jpg,1\nBert/Bert_0001.jpg,Carl/Carl_0003.jpg,0\n"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "pairs.csv").write_text(rows)
    path = tmp_path / "photos"
    if zipped:
        path = tmp_path / "photos.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "photos" / "pairs.csv", "photos/pairs.csv")
    assert example.paired_people(str(path)) == {"Anna", "Bert", "Carl"}


def test_the_teacher_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def teach(rgb: np.ndarray, yunet: Any) -> np.ndarray:
        asked.append(1)
        return ARCFACE_TEMPLATE[None]

    monkeypatch.setattr(example, "teach", teach)
    monkeypatch.setattr(example, "YuNetDetector", lambda path: None)
    file = tmp_path / "labels.npz"
    for _ in range(2):
        labels = example.Labels(str(file), "yunet.onnx")
        np.testing.assert_array_equal(labels.faces("a/b.jpg", np.zeros((9, 9, 3), np.uint8)), ARCFACE_TEMPLATE[None])
        labels.save()
    assert len(asked) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["labels.npz"]


@pytest.mark.real_data
def test_the_teacher_s_faces(shared_data: Path) -> None:
    from xcos_ext.faces import PersonFolder, YuNetDetector

    folder = PersonFolder(shared_data / "lfw_photos.zip")
    faces = example.teach(folder.read(folder.keys[0]), YuNetDetector(shared_data / "yunet.onnx"))
    assert faces.shape[1:] == (5, 2)
    assert len(faces) >= 1
    assert (np.linalg.norm(faces[:, 0] - faces[:, 1], axis=1) >= example.SMALLEST).all()
