"""The landmark network, its two readings, and the weights that come with the package, on drawn faces."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from drawn import background, draw_face
from safetensors.torch import load_file, save_file

from xcos_ext.faces import (
    ARCFACE_TEMPLATE,
    CascadeDetector,
    LandmarkReader,
    apply_transform,
    create_detector,
    similarity_transform,
)
from xcos_ext.faces.alignment import compose, invert
from xcos_ext.faces.landmark_network import LandmarkNetwork
from xcos_ext.faces.landmarks import CROP_CENTRE, crop_transform, load_network, save_network
from xcos_ext.io.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

SHIPPED = REPOSITORY / "xcos_ext" / "data" / "landmarks.safetensors"


@pytest.fixture(scope="module")
def reader() -> LandmarkReader:
    return LandmarkReader()


def drawn(
    height: int = 360, width: int = 320, size: float = 150, degrees: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture with one face, and its landmarks."""
    canvas = background(360, 320)
    truth = draw_face(canvas, (160, 187), size, degrees)
    return cv2.cvtColor(canvas, cv2.COLOR_RGB2GRAY), truth


def off_by(degrees: float = 0.0, scale: float = 1.0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """A box that is off: template coordinates, about the middle of the crop."""
    turn = np.deg2rad(degrees)
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    middle = np.array(CROP_CENTRE)
    return np.hstack([linear, (middle + np.array([x, y]) - linear @ middle)[:, None]])


def error(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean distance over the distance between the eyes."""
    return float(np.linalg.norm(found - truth, axis=1).mean() / np.linalg.norm(truth[0] - truth[1]))


# --- the network


def test_points_are_the_means_of_heat_maps() -> None:
    network = LandmarkNetwork(64, 8).eval()
    points, logit, heat = network(torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8))
    assert points.shape == (3, 5, 2)
    assert logit.shape == (3,)
    assert heat.shape == (3, 5, 16, 16)
    torch.testing.assert_close(heat.sum((2, 3)), torch.ones(3, 5))
    at = torch.arange(16) * 4 + 1.5
    torch.testing.assert_close(points[..., 0], (heat.sum(2) * at).sum(2))
    torch.testing.assert_close(points[..., 1], (heat.sum(3) * at).sum(2))


def test_brightness_and_contrast_do_not_matter() -> None:
    network = LandmarkNetwork(64, 8).eval()
    crop = torch.rand(1, 1, 64, 64) * 200
    torch.testing.assert_close(network(crop)[0], network(0.5 * crop + 20)[0], rtol=0, atol=1e-2)


def test_a_crop_of_one_grey_gives_finite_points() -> None:
    points, logit, _ = LandmarkNetwork(64, 8).eval()(torch.full((1, 1, 64, 64), 7, dtype=torch.uint8))
    assert points.isfinite().all() and logit.isfinite().all()


def test_other_shapes_of_network() -> None:
    with pytest.raises(ValueError, match="size: expected a multiple of 16 from 32 on, got 60"):
        LandmarkNetwork(60)
    with pytest.raises(ValueError, match="width: expected a positive number, got 0"):
        LandmarkNetwork(64, 0)


def test_the_crop_is_centred_to_half_a_pixel() -> None:
    np.testing.assert_allclose(apply_transform(crop_transform(80), np.array([CROP_CENTRE])), [[39.5, 39.5]])


# --- reading


@pytest.mark.parametrize("size", [40, 150, 280])
@pytest.mark.parametrize("degrees", [0, 25, -90, 180])
def test_reads_a_drawn_face_from_its_box(reader: LandmarkReader, size: float, degrees: float) -> None:
    grey, truth = drawn(size=size, degrees=degrees)
    landmarks, scores = reader.read(grey, similarity_transform(truth, ARCFACE_TEMPLATE)[None])
    assert landmarks.shape == (1, 5, 2)
    assert landmarks.dtype == np.float64
    assert error(landmarks[0], truth) < 0.06
    assert scores[0] > 0.9


@pytest.mark.thorough
@pytest.mark.parametrize(
    "off", [off_by(20), off_by(-20), off_by(scale=1.2), off_by(scale=0.83), off_by(x=9, y=-6), off_by(-12, 1.1, 6, 6)]
)
def test_a_box_that_is_off_gives_the_same_landmarks(reader: LandmarkReader, off: np.ndarray) -> None:
    """The second reading forgets most of where the first one looked."""
    grey, truth = drawn()
    exact = similarity_transform(truth, ARCFACE_TEMPLATE)
    landmarks, scores = reader.read(grey, np.array([exact, compose(off, exact)]))
    assert error(landmarks[1], landmarks[0]) < 0.03
    assert scores.min() > 0.9


def test_a_mirrored_picture_has_mirrored_landmarks(reader: LandmarkReader) -> None:
    grey, truth = drawn(degrees=9)
    exact = similarity_transform(truth, ARCFACE_TEMPLATE)
    back = truth[[1, 0, 2, 4, 3]] * [-1, 1] + [grey.shape[1] - 1, 0]
    mirrored, _ = reader.read(np.ascontiguousarray(grey[:, ::-1]), similarity_transform(back, ARCFACE_TEMPLATE)[None])
    direct, _ = reader.read(grey, exact[None])
    expected = direct[0][[1, 0, 2, 4, 3]] * [-1, 1] + [grey.shape[1] - 1, 0]
    assert error(mirrored[0], expected) < 0.02


def test_several_boxes_are_read_as_each_alone(reader: LandmarkReader) -> None:
    grey, truth = drawn()
    exact = similarity_transform(truth, ARCFACE_TEMPLATE)
    starts = np.array([exact, compose(off_by(x=500), exact), compose(off_by(10), exact)])
    landmarks, scores = reader.read(grey, starts)
    for start, points, score in zip(starts, landmarks, scores, strict=True):
        alone, alone_score = reader.read(grey, start[None])
        np.testing.assert_allclose(points, alone[0], atol=1e-3 * max(1, np.abs(alone).max()))
        assert score == pytest.approx(alone_score[0], abs=1e-4)


def test_no_boxes(reader: LandmarkReader) -> None:
    landmarks, scores = reader.read(np.zeros((9, 9), np.uint8), np.zeros((0, 2, 3)))
    assert landmarks.shape == (0, 5, 2)
    assert scores.shape == (0,)


@pytest.mark.parametrize("zoom", [1e-3, 0.05, 1.0, 40.0, 1e3])
@pytest.mark.parametrize("shift", [0.0, 300.0, -1e5])
def test_wild_boxes_are_refused(reader: LandmarkReader, zoom: float, shift: float) -> None:
    """Smaller than a pixel, larger than the picture, outside it: finite landmarks, and no face."""
    grey = cv2.cvtColor(background(60, 80), cv2.COLOR_RGB2GRAY)
    start = np.array([[[zoom, 0, shift], [0, zoom, shift]]])
    landmarks, scores = reader.read(grey, start)
    assert np.isfinite(landmarks).all()
    assert scores[0] < 0.5


def test_boxes_beside_a_face_or_of_another_size_are_refused(reader: LandmarkReader) -> None:
    grey, truth = drawn()
    exact = similarity_transform(truth, ARCFACE_TEMPLATE)
    offs = [off_by(180), off_by(scale=4), off_by(scale=0.2), off_by(x=100), off_by(y=-110)]
    _, scores = reader.read(grey, np.array([compose(off, exact) for off in offs]))
    assert scores.max() < 0.5, scores


def test_one_grey_and_noise_are_no_faces(reader: LandmarkReader) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)
    for grey in (np.zeros((200, 200), np.uint8), np.full((1, 1), 255, np.uint8), noise):
        landmarks, scores = reader.read(grey, np.eye(2, 3)[None])
        assert np.isfinite(landmarks).all()
        assert scores[0] < 0.5


def test_alignment_is_as_good_as_the_drawing_s_own(reader: LandmarkReader) -> None:
    grey, truth = drawn(degrees=14)
    exact = similarity_transform(truth, ARCFACE_TEMPLATE)
    landmarks, _ = reader.read(grey, compose(off_by(-10, 1.1), exact)[None])
    again = compose(similarity_transform(landmarks[0], ARCFACE_TEMPLATE), invert(exact))
    moved = apply_transform(again, ARCFACE_TEMPLATE) - ARCFACE_TEMPLATE
    assert np.sqrt((moved**2).sum(1).mean()) < 2


# --- the weights


def test_shipped_weights_say_where_they_come_from() -> None:
    from safetensors import safe_open

    assert SHIPPED.stat().st_size <= 300_000
    with safe_open(str(SHIPPED), framework="pt") as opened:
        notes = opened.metadata()
    assert {"data", "teacher", "training", "error", "error_wild_boxes"} <= notes.keys()
    assert json.loads(notes["error"])["failures"] < 5
    assert {t.dtype for t in load_file(SHIPPED).values() if t.is_floating_point()} == {torch.float16}


def test_saved_weights_come_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = LandmarkNetwork(64, 8).eval()
    save_network(tmp_path / "a.safetensors", network, {"data": "none"})
    back = load_network(tmp_path / "a.safetensors")
    crop = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(back(crop)[0], network(crop)[0], rtol=0, atol=0.1)
    assert not back.training
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


NOTES = {"xcos_format": "xcos_ext.landmarks", "version": "1", "network": '{"size": 80, "width": 16}'}
MISFIT = "do not fit their network"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (SHIPPED.read_bytes()[:-1000], "damaged or truncated"),
        (b"", "the file is empty"),
        (NOTES | {"xcos_format": "model"}, "expected landmark weights .* got 'model' of '1'"),
        (NOTES | {"version": "2"}, r"got 'xcos_ext\.landmarks' of '2'"),
        ({}, "got None of None"),
        (NOTES | {"network": '{"size": 80, "width": 12}'}, MISFIT),
        (NOTES | {"network": "{"}, MISFIT),
        (NOTES | {"network": '{"size": 80, "depth": 9}'}, MISFIT),
        ("a tensor less", MISFIT),
        ("nan", "finite landmark weights"),
    ],
)
def test_damaged_weights_are_one_error(
    tmp_path: Path, content: bytes | dict[str, str] | str | None, words: str
) -> None:
    path = tmp_path / "landmarks.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        tensors = load_file(SHIPPED)
        if content == "a tensor less":
            tensors.popitem()
        elif content == "nan":
            tensors["face.weight"] = tensors["face.weight"] * float("nan")
        save_file(tensors, path, content if isinstance(content, dict) else NOTES)
    with pytest.raises(ModelError, match=words) as caught:
        CascadeDetector(landmarks=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_package_without_its_weights_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xcos_ext.faces.landmarks._WEIGHTS", tmp_path / "landmarks.safetensors")
    with pytest.raises(ModelError, match=r"landmarks\.safetensors: no such file; .* install the package again"):
        create_detector()
