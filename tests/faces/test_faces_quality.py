"""Pose and quality of faces, and the sentence that warns of a verdict."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from commands import run, strict
from drawn import background, draw_face, portrait
from PIL import Image

import xcos_ext
from xcos_ext.faces import ARCFACE_TEMPLATE, Face, face_quality, pose_of
from xcos_ext.faces.pose import _HEAD
from xcos_ext.faces.quality import doubts


@pytest.mark.parametrize(("yaw", "pitch", "roll"), [(0, 0, 0), (30, 0, 0), (-40, 10, 20), (15, -20, -50), (0, 0, 179)])
def test_pose_of_a_head_that_was_turned(yaw: float, pitch: float, roll: float) -> None:
    """The head itself, seen from afar: its nose, which points at the viewer, goes where yaw and pitch say."""
    a, b, c = np.deg2rad([yaw, pitch, roll])
    # The third column, where the nose points, first; the others by Gram and Schmidt.
    towards = np.array([np.sin(a), np.sin(b), 0.0])
    towards[2] = np.sqrt(1 - towards @ towards)
    down = np.array([0.0, 1, 0]) - towards[1] * towards
    down /= np.linalg.norm(down)
    right = -np.cross(down, towards) * -1
    seen = np.stack([right, down, towards], 1)[:2]
    turn = np.array([[np.cos(c), -np.sin(c)], [np.sin(c), np.cos(c)]])
    points = _HEAD @ seen.T @ turn.T * 3 + (200, 100)
    found = pose_of(points)
    assert abs((found[2] - roll + 180) % 360 - 180) < 12
    assert found[0] == pytest.approx(yaw, abs=6) and found[1] == pytest.approx(pitch, abs=6)


def test_pose_of_odd_points() -> None:
    assert pose_of(np.zeros((5, 2))) == (0, 0, 0)
    yaw, pitch, roll = pose_of(ARCFACE_TEMPLATE)
    mirrored = ARCFACE_TEMPLATE[[1, 0, 2, 4, 3]] * (-1, 1)
    assert pose_of(mirrored) == pytest.approx((-yaw, pitch, -roll), abs=1e-9)


def test_each_fault_is_named() -> None:
    crop = cv2.resize(portrait()[60:330, 40:280], (112, 112), interpolation=cv2.INTER_AREA)
    noisy = np.clip(crop + np.random.default_rng(0).normal(0, 6, crop.shape), 0, 255).astype(np.uint8)
    small = Face((0, 0, 20, 30), None, 0.9, (50, 0, 0))
    assert face_quality(noisy).faults() == []
    assert face_quality(cv2.GaussianBlur(crop, (0, 0), 4)).faults() == ["blurred"]
    assert face_quality((noisy * 0.2).astype(np.uint8)).faults()[0].startswith("too dark (brightness ")
    assert face_quality(255 - (255 - noisy) // 5).faults()[0].startswith("too bright (brightness ")
    assert face_quality(np.full((112, 112, 3), 128, np.uint8)).faults() == ["without contrast"]
    lit = (noisy * np.linspace(0, 1.2, 112)[None, :, None] ** 3).clip(0, 255).astype(np.uint8)
    assert "lit from one side" in face_quality(lit).faults()
    quality = face_quality(noisy, small)
    assert quality.faults() == ["only 24 pixels large"] and quality.likelihood == 0.9 and quality.yaw == 50
    front = face_quality(noisy, Face((0, 0, 90, 90), None, 0.9, (0, 0, 0)))
    assert doubts(front, front, ("a", "b")) is None
    side = face_quality(noisy, Face((0, 0, 90, 90), None, 0.9, (50, 0, 0)))
    said = "Do not rely on this verdict: one head is turned by 50 degrees against the other."
    assert doubts(front, side, ("a", "b")) == said and doubts(side, side, ("a", "b")) is None
    with pytest.raises(ValueError, match="rgb: expected"):
        face_quality(np.zeros((9, 9)))


def test_words_json_and_page_say_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    canvas = background(200, 200)
    draw_face(canvas, (100, 100), 34)
    Image.fromarray(canvas).save(tmp_path / "small.png")
    Image.fromarray(portrait()).save(tmp_path / "large.png")
    e = xcos_ext.verify(tmp_path / "small.png", tmp_path / "large.png")
    assert e.doubt is not None and e.doubt.startswith("Do not rely on this verdict: the face of ")
    assert "pixels large" in e.doubt and e.doubt in str(e) and e.doubt in e.remarks
    assert "pixels large" in e.to_html() and "sharpness" in e.to_html()
    words = run("verify", tmp_path / "small.png", tmp_path / "large.png")
    assert "caution" in words.stdout and "pixels large" in words.stdout
    data = strict(run("verify", tmp_path / "small.png", tmp_path / "large.png", "--json").stdout)
    assert data["doubt"] == e.doubt and data["a"]["quality"]["size"] < 40 < data["b"]["quality"]["size"]
