"""recipes/train_detector.py: scenes, targets and losses on drawn faces, and a short training that can be read."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import portrait

from recipes import train_detector as recipe
from recipes.scenes import drawn_scene, nothing
from xcos_ext.faces import SmallDetector
from xcos_ext.faces.network import STRIDES, decoded, load_weights
from xcos_ext.io.errors import ModelError


@pytest.fixture
def scenes(one_thread: None) -> recipe.Scenes:
    rng = np.random.default_rng(0)
    photographs = [recipe.Photograph(*drawn_scene(200, rng)) for _ in range(4)]
    made = recipe.Scenes(photographs, np.full(4, 0.25), 3, 1)
    made.rng = np.random.default_rng(1)
    return made


def test_scenes_keep_points_on_faces(scenes: recipe.Scenes) -> None:
    count = 0
    for _ in range(60):
        scene = scenes.scene(160)
        assert scene.rgb.shape == (160, 160, 3) and scene.rgb.dtype == np.uint8 and scene.faces.shape[1:] == (17,)
        for face in scene.faces[scene.faces[:, 16] > 0]:
            points, size = face[4:14].reshape(5, 2), np.sqrt(face[2] * face[3])
            assert (np.abs(points - face[:2]) < 0.8 * size).all()
            assert points[0, 0] < points[1, 0]  # the left eye is on the left, mirrored or not: nobody lies
            count += 1
    assert count > 30


def test_what_leans_too_far_is_no_face() -> None:
    canvas, faces = drawn_scene(160, np.random.default_rng(3))
    turned = recipe.placed(faces[:1], np.array([[1.0, 0, 0], [0, 1, 0]]), 0.0)
    assert turned[0, 16] == 1
    for degrees, expected in ((40, [1]), (80, [0]), (170, [])):
        a, b = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        found = recipe.placed(faces[:1], np.array([[a, -b, 0], [b, a, 0]]), degrees)
        assert found[:, 16].tolist() == expected
    assert len(canvas) == 160 and recipe.placed(np.zeros((0, 15)), np.eye(2, 3), 0.0).shape == (0, 17)


def test_targets_are_what_the_network_should_say(scenes: recipe.Scenes) -> None:
    """Decoding the targets gives the faces back, and the losses of that are next to nothing."""
    face = np.zeros((1, 17), np.float32)
    face[0, :4] = 70, 84, 50, 60
    face[0, 4:14] = [60, 80, 82, 81, 70, 90, 62, 100, 80, 100]
    face[0, 14:] = 0.1, -0.2, 1
    levels = recipe.targets(face, 160)
    assert [int((level[..., 0] > 0).sum() > 0) for level in levels] == [0, 1, 0]
    outputs = []
    for level, stride in zip(levels, STRIDES, strict=True):
        out = np.zeros((*level.shape[:2], 17), np.float32)
        out[..., 0] = np.where(level[..., 0] > 0, 9.0, -9.0)
        y, x = np.indices(level.shape[:2]) * stride
        centre = np.stack([x, y], 2)
        out[..., 1:3] = (level[..., 1:3] - centre) / stride
        out[..., 3:5] = np.log(np.maximum(level[..., 3:5], 1) / stride)
        out[..., 5:15] = (level[..., 5:15] - np.tile(centre, 5)) / stride
        out[..., 15:17] = level[..., 15:17]
        outputs.append(out)
    rows = decoded(outputs, 0.5)
    assert len(rows) > 0
    np.testing.assert_allclose(rows[:, 1:], np.tile(face[:, :16], (len(rows), 1)), atol=1e-4)
    parts = recipe.losses(
        [torch.from_numpy(out).permute(2, 0, 1)[None] for out in outputs],
        [torch.from_numpy(level)[None] for level in levels],
    )
    assert all(float(part) < 1e-4 for part in parts.values())


def test_the_second_reading_finds_points_that_a_linear_map_can_find(one_thread: None) -> None:
    """From the shipped network's features of crops that are a little off."""
    rng = np.random.default_rng(0)
    photographs = [recipe.Photograph(*drawn_scene(160, rng)) for _ in range(6)]
    weights = {name: torch.from_numpy(array) for name, array in load_weights().items()}
    weight, bias = recipe.solved_points(weights, photographs, 1500, rng)
    crops = [recipe.upright_crop(photograph, rng) for photograph in photographs * 5]
    truth = np.stack([points for _, points in crops])
    found = recipe.features_of(weights, [crop for crop, _ in crops]) @ weight.T + bias
    off = np.linalg.norm(found.reshape(-1, 5, 2) - truth, axis=2).mean(1)
    assert np.median(off) < 0.8 * np.median(np.linalg.norm(truth - truth.mean(0), axis=2).mean(1))


def test_pictures_of_nothing_are_of_many_kinds() -> None:
    rng = np.random.default_rng(0)
    made = [nothing(48, rng) for _ in range(60)]
    assert all(picture.shape == (48, 48, 3) and picture.dtype == np.uint8 for picture in made)
    assert len({picture.tobytes() for picture in made}) > 55


@pytest.mark.thorough
def test_a_short_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On drawn scenes: losses fall, and the folded weights say what the network says."""
    rng = np.random.default_rng(0)
    pictures = {f"{i}.png": drawn_scene(160, rng) for i in range(12)}

    class Tree:
        def __init__(self, path: Path) -> None:
            self.names = list(pictures)

        def read(self, name: str) -> np.ndarray:
            return pictures[name][0]

    monkeypatch.setattr(recipe, "PictureTree", Tree)
    np.savez(tmp_path / "labels.npz", **{f"faces.zip/{name}": faces for name, (_, faces) in pictures.items()})
    lines: list[str] = []
    monkeypatch.setattr(recipe, "say", lines.append)
    options = argparse.Namespace(
        labels=tmp_path / "labels.npz", archives=[Path("faces.zip")], out=tmp_path / "d.safetensors", steps=30, batch=4,
        rate=3e-3, crops=200, judged=6, penalty=0.01, workers=0, threads=1, seed=1, resume=None,
    )  # fmt: skip
    threads = torch.get_num_threads()
    recipe.train(options)
    torch.set_num_threads(threads)
    first, last = (float(line.split("verdict ")[1].split(",")[0]) for line in (lines[1], lines[-2]))
    assert lines[0] == "12 photographs" and last < first and "crops of faces" in lines[-1]
    assert {name.rpartition(".")[0] for name in load_weights(options.out)} == set(recipe.LAYERS)

    network = recipe.DetectorNetwork().eval()
    network.load_state_dict(torch.load(tmp_path / "d.pt", weights_only=True))
    detector = SmallDetector(weights=options.out)
    picture = portrait(96, 128)[None]
    with torch.no_grad():
        levels = [level[0].permute(1, 2, 0).numpy() for level in network(torch.from_numpy(picture))]
    np.testing.assert_allclose(detector._seen(picture[0], 0.0), decoded(levels, 0.0), rtol=0.05, atol=0.3)


def test_files_that_are_no_detector(tmp_path: Path) -> None:
    recipe.save_weights(tmp_path / "less.safetensors", {"stem.weight": torch.zeros(1)}, {})
    with pytest.raises(ModelError, match=r"less\.safetensors: expected the detector's layers, got others$"):
        SmallDetector(weights=tmp_path / "less.safetensors")
    wrong = {name: torch.from_numpy(array) for name, array in load_weights().items()}
    wrong["stem.bias"] = wrong["stem.bias"] * float("nan")
    recipe.save_weights(tmp_path / "nan.safetensors", wrong, {})
    with pytest.raises(ModelError, match=r"nan\.safetensors: expected finite weights, got NaN or infinity$"):
        SmallDetector(weights=tmp_path / "nan.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 99)
    with pytest.raises(ModelError, match=r"junk\.safetensors: cannot be read as weights"):
        SmallDetector(weights=tmp_path / "junk.safetensors")
    with pytest.raises(ModelError, match=r"expected weights of a detector of version 1, got other ones$"):
        SmallDetector(weights=Path(recipe.__file__).parents[1] / "xcos_ext" / "data" / "xcos_slim.safetensors")
