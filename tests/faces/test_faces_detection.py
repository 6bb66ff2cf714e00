"""Detectors on drawn faces, the choice of a face, and reading one; real photographs are in test_faces_real.py."""

from __future__ import annotations

import os
import pickle
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import background, draw_face, portrait
from PIL import Image

from xcos_ext.faces import (
    ARCFACE_TEMPLATE,
    LIKELY,
    Detector,
    Face,
    SmallDetector,
    YuNetDetector,
    align_face,
    apply_transform,
    choose_face,
    create_detector,
    extract_face,
    face_likelihood,
    read_face,
    similarity_transform,
)
from xcos_ext.faces.alignment import warp
from xcos_ext.faces.network import CROP, MIDDLE, crop_transform, reading
from xcos_ext.gallery.enroll import read_faces
from xcos_ext.io.errors import ModelError, PictureError
from xcos_ext.io.optional import MissingPackageError, need


@pytest.fixture(scope="module")
def small() -> SmallDetector:
    return SmallDetector()


def error(face: Face, truth: np.ndarray) -> float:
    """RMS distance of the landmarks, in pixels of the aligned crop."""
    assert face.landmarks is not None
    matrix = similarity_transform(truth, ARCFACE_TEMPLATE)
    difference = apply_transform(matrix, face.landmarks) - apply_transform(matrix, truth)
    return float(np.sqrt((difference**2).sum(1).mean()))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("height", "width", "size", "degrees"),
    [
        (360, 320, 150, 0),
        (360, 320, 150, 14),
        (360, 320, 150, -33),
        (320, 360, 150, 90),
        (320, 360, 150, 180),
        (240, 240, 50, 0),  # a small face
        (112, 112, 100, 0),  # one that fills the picture
        (2400, 3200, 1500, 6),  # a large photograph: detection runs on a small copy
        (2000, 3000, 100, 0),  # a small face in a large photograph
    ],
)
def test_small_finds_and_aligns(small: SmallDetector, height: int, width: int, size: float, degrees: float) -> None:
    canvas = background(height, width)
    truth = draw_face(canvas, (0.47 * width, 0.52 * height), size, degrees)
    faces = small.detect(canvas)
    assert len(faces) == 1
    assert error(faces[0], truth) < 3
    assert 0.5 <= faces[0].score <= 1
    left, top, box_width, box_height = faces[0].box
    assert left < truth[:, 0].min() and truth[:, 0].max() < left + box_width
    assert top < truth[:, 1].max() < top + 1.2 * box_height
    assert 0.6 * size < box_width < 1.4 * size


@pytest.mark.thorough
def test_small_is_the_same_from_colour_and_grey_and_each_time(small: SmallDetector) -> None:
    image = portrait()
    first, second = small.detect(image), small.detect(image)
    assert np.array_equal(first[0].landmarks, second[0].landmarks)
    assert np.array_equal(first[0].landmarks, SmallDetector().detect(image)[0].landmarks)
    assert small.detect(np.asfortranarray(image))[0].box == first[0].box


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_pictures_that_lie_or_stand_on_their_heads(small: SmallDetector, turns: int) -> None:
    canvas = background(360, 320)
    truth, width = draw_face(canvas, (150, 190), 150), 320
    for _ in range(turns):
        truth, width = np.stack([truth[:, 1], width - 1 - truth[:, 0]], 1), 680 - width
    faces = small.detect(np.ascontiguousarray(np.rot90(canvas, turns)))
    assert len(faces) == 1 and error(faces[0], truth) < 3
    assert faces[0].pose is not None
    assert (faces[0].pose[2] + 90 * turns + 180) % 360 - 180 == pytest.approx(0, abs=8)


def test_several_faces(small: SmallDetector) -> None:
    canvas = background(400, 900)
    truths = [draw_face(canvas, (x, 200), 150, tint=tint) for x, tint in ((150, 1.0), (450, 0.85), (740, 1.05))]
    faces = sorted(small.detect(canvas), key=lambda face: face.box[0])
    assert [error(face, truth) < 3 for face, truth in zip(faces, truths, strict=True)] == [True] * 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 200), (30, 30)])
def test_hardly_any_picture(small: SmallDetector, shape: tuple[int, int]) -> None:
    assert small.detect(np.zeros((*shape, 3), np.uint8)) == []


@pytest.mark.thorough
def test_no_face(small: SmallDetector) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    start = time.perf_counter()
    assert small.detect(noise) == []
    assert small.detect(background(600, 800)) == []
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    "rgb",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((9, 9, 3)),
        np.zeros((0, 9, 3), np.uint8),
        [1],
    ],
)
def test_detectors_refuse_other_arrays(small: SmallDetector, rgb: object) -> None:
    with pytest.raises(ValueError, match="rgb: expected"):
        small.detect(rgb)  # type: ignore[arg-type]


def test_min_score(small: SmallDetector) -> None:
    with pytest.raises(ValueError, match="min_score"):
        SmallDetector(min_score=1.5)
    assert SmallDetector(min_score=0.99).detect(background(200, 200)) == []
    assert isinstance(small, Detector)


@pytest.mark.parametrize("corner", ["left", "right", "top", "bottom"])
def test_a_face_at_the_edge_of_the_picture(small: SmallDetector, corner: str) -> None:
    """A quarter of the head is cut off, at most; the landmarks are read where they can be seen."""
    canvas = background(360, 360)
    truth = draw_face(canvas, (180, 180), 150)
    low, high = 180 - 55, 180 + 55
    window = {
        "left": (slice(0, 360), slice(low, 360)),
        "right": (slice(0, 360), slice(0, high)),
        "top": (slice(low - 10, 360), slice(0, 360)),
        "bottom": (slice(0, high + 30), slice(0, 360)),
    }[corner]
    faces = small.detect(np.ascontiguousarray(canvas[window]))
    assert len(faces) == 1
    assert error(faces[0], truth - [window[1].start, window[0].start]) < 5


# --- which detector


def test_create_detector(tmp_path: Path) -> None:
    assert isinstance(create_detector("small"), SmallDetector)
    with pytest.raises(ModelError, match=r"^mtcnn: no such file, and no such name.* Known are small, yunet$"):
        create_detector("mtcnn")
    with pytest.raises(ModelError, match=r"none\.onnx: no such file"):
        create_detector(str(tmp_path / "none.onnx"))
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ModelError, match=r"folder\.onnx: expected a YuNet \.onnx file, got a directory"):
        create_detector(str(tmp_path / "folder.onnx"))


@pytest.mark.parametrize("content", [b"", b"not a network", bytes(5000)])
def test_yunet_refuses_other_files(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.onnx: " + ("not a YuNet network" if content else "the file is empty")):
        YuNetDetector(tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="min_score"):
        YuNetDetector(tmp_path / "a.onnx", min_score=0)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingPackageError, match=r"face detection needs opencv-python-headless.*xcos_ext\[cli\]"):
        need("cv2", "face detection")
    with pytest.raises(MissingPackageError, match=r"drawing needs no_such_package_here, which is not installed"):
        need("no_such_package_here.part", "drawing")


# --- which face


def faces() -> list[Face]:
    """Largest, most central, and prominent (second in both) in a picture of 1000 x 800."""
    return [
        Face((0, 0, 300, 300), None, 0.9),
        Face((480, 380, 40, 40), None, 0.9),
        Face((300, 250, 250, 250), None, 0.9),
    ]


@pytest.mark.parametrize(("policy", "index"), [("largest", 0), ("centre", 1), ("prominent", 2)])
def test_choice(policy: str, index: int) -> None:
    found = faces()
    assert choose_face(found, (800, 1000), policy) is found[index]


def test_choice_of_only_one() -> None:
    found = faces()
    assert choose_face(found[:1], (800, 1000), "only") is found[0]
    with pytest.raises(PictureError, match=r"team\.jpg: expected one face, found 3"):
        choose_face(found, (800, 1000), "only", name="team.jpg")
    with pytest.raises(ValueError, match="policy: expected one of prominent, largest, centre, only, got 'best'"):
        choose_face(found, (800, 1000), "best")
    with pytest.raises(ValueError, match="faces: expected at least one"):
        choose_face([], (800, 1000))


# --- reading


@pytest.mark.thorough
def test_read_face(tmp_path: Path, small: SmallDetector) -> None:
    canvas = background(300, 500)
    truth = draw_face(canvas, (200, 150), 120, 5)
    Image.fromarray(canvas).save(tmp_path / "a.png")
    face = read_face(tmp_path / "a.png", small)
    assert face.rgb.shape == (112, 112, 3)
    assert face.found == 1
    assert face.name == str(tmp_path / "a.png")
    expected = align_face(canvas, truth)
    assert np.abs(face.rgb.astype(int) - expected).mean() < 12
    assert read_face(tmp_path / "a.png", small, size=(96, 96)).rgb.shape == (96, 96, 3)


def test_aligned_crops(tmp_path: Path) -> None:
    crop = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    Image.fromarray(crop).save(tmp_path / "a.png")
    face = read_face(tmp_path / "a.png", None)
    assert (face.rgb == crop).all()
    assert face.face is None
    Image.fromarray(crop[:1, :1]).save(tmp_path / "b.png")
    with pytest.raises(PictureError, match=r"b\.png: expected an aligned crop of 112 x 112 pixels, got 1 x 1"):
        read_face(tmp_path / "b.png", None)


def nothings() -> dict[str, np.ndarray]:
    """Crops that show no face: [112, 112, 3]."""
    rng = np.random.default_rng(0)
    stripes = np.repeat(255 * (np.arange(112) // 8 % 2), 112).reshape(112, 112).astype(np.uint8)
    board = (np.indices((112, 112)) // 14).sum(0) % 2 * 255
    grey = {
        "stripes": stripes,
        "columns": stripes.T,
        "board": board,
        "ramp": np.tile(np.linspace(0, 255, 112), (112, 1)),
    }
    made = {name: np.repeat(picture.astype(np.uint8)[:, :, None], 3, 2) for name, picture in grey.items()}
    made |= {"black": np.zeros((112, 112, 3), np.uint8), "white": np.full((112, 112, 3), 255, np.uint8)}
    return made | {"noise": rng.integers(0, 256, (112, 112, 3), np.uint8), "wall": background(112, 112)}


def test_what_looks_like_a_face() -> None:
    canvas = background(360, 320)
    truth = draw_face(canvas, (160, 187), 150)
    for size in ((112, 112), (224, 224)):
        crop = align_face(canvas, truth, size)
        assert face_likelihood(crop) > 0.99
        assert face_likelihood(crop[::-1]) < LIKELY  # upside down
    assert {name: like for name, crop in nothings().items() if (like := face_likelihood(crop)) >= LIKELY} == {}
    # In torch the network says the same.
    crop = align_face(canvas, truth)
    for picture in (crop, *nothings().values()):
        seen = warp(picture, crop_transform(), (CROP, CROP), extend=True)
        found = SmallDetector()._run(partial(reading, "read"), np.stack([seen, seen[:, ::-1]]))[:, 10, MIDDLE, MIDDLE]
        assert face_likelihood(picture) == pytest.approx(float(found.mean().sigmoid()), abs=0.03)


def test_crops_of_nothing_are_counted_or_refused() -> None:
    black = np.zeros((112, 112, 3), np.uint8)
    face = extract_face(black, None, name="black.png")
    assert face.found == 0 and face.likelihood is not None and face.likelihood < LIKELY
    assert extract_face(black, None, strict=None).likelihood is None
    with pytest.raises(PictureError, match=r"^black\.png: expected an aligned face, got a picture that does not look"):
        extract_face(black, None, name="black.png", strict=True)


def test_a_picture_without_a_face_says_what_to_try(small: SmallDetector) -> None:
    with pytest.raises(PictureError, match=r"wall: no face found in 60 x 50 pixels; try .*--detector.*--aligned"):
        extract_face(background(50, 60), small, name="wall")


@pytest.mark.parametrize("detector", ["small", SmallDetector, Path("yunet.onnx")])
def test_what_is_no_detector(detector: Any) -> None:
    with pytest.raises(TypeError, match=r"^detector: expected a detector, which create_detector\(\) makes, .*got"):
        extract_face(background(50, 60), detector)


def test_enrolling_wants_what_makes_a_detector(small: SmallDetector) -> None:
    for detector in ("small", small):  # one for each thread
        with pytest.raises(TypeError, match=r"^detector: expected a function that makes one"):
            next(read_faces([], (112, 112), detector))  # type: ignore[arg-type]


def test_a_detector_without_landmarks() -> None:
    class Gives:
        def __init__(self, landmarks: np.ndarray | None) -> None:
            self.landmarks = landmarks

        def detect(self, rgb: np.ndarray) -> list[Face]:
            return [Face((0, 0, 10, 10), self.landmarks, 1.0)]

    with pytest.raises(PictureError, match="x: the detector gives no landmarks"):
        extract_face(background(50, 60), Gives(None), name="x")
    with pytest.raises(PictureError, match=r"x: the detector's landmarks: .* got eyes the other way round"):
        extract_face(background(50, 60), Gives(ARCFACE_TEMPLATE[[1, 0, 2, 4, 3]]), name="x")


@pytest.mark.process
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_import_is_light() -> None:
    """Neither OpenCV nor Pillow nor torch is imported until a face is read."""
    import subprocess

    code = "import sys, xcos_ext.faces; print([m for m in ('cv2', 'PIL', 'torch', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_detectors_leave_torch_alone_and_can_be_pickled() -> None:
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        made = SmallDetector()
    assert torch.equal(torch.random.get_rng_state(), before)
    picture = portrait()
    (again,), (wanted,) = pickle.loads(pickle.dumps(made)).detect(picture), made.detect(picture)
    assert again.box == wanted.box
