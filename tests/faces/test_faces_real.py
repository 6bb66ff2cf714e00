"""The main job on real photographs with a real network: right verdicts end to end.

A fifth of the pairs; all of them are run by recipes/verify_photo_pairs.py, whose figures are in docs/verify.md.
"""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run, strict
from PIL import Image

from xcos_ext.faces import (
    ARCFACE_TEMPLATE,
    LIKELY,
    PictureTree,
    apply_transform,
    choose_face,
    create_detector,
    face_likelihood,
    read_face,
    similarity_transform,
)
from xcos_ext.io.errors import PictureError
from xcos_ext.model import XCosModel, load_model

pytestmark = pytest.mark.real_data

_OF_EACH_KIND = 12

Pairs = list[tuple[Path, Path, bool]]


@pytest.fixture(scope="module")
def pairs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Photographs of the first genuine and the first impostor pairs."""
    folder = tmp_path_factory.mktemp("photographs")
    with zipfile.ZipFile(shared_data / "lfw_photos.zip") as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("lfw_photos/pairs.csv").decode())))
        chosen = [row for kind in "10" for row in [r for r in rows if r["same"] == kind][:_OF_EACH_KIND]]

        def unpacked(name: str) -> Path:
            path = folder / name.rpartition("/")[2]
            path.write_bytes(archive.read(f"lfw_photos/{name}"))
            return path

        return [(unpacked(row["a"]), unpacked(row["b"]), row["same"] == "1") for row in chosen]


@pytest.fixture(scope="module")
def model(shared_data: Path) -> XCosModel:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # loading is many small operations
    try:
        return load_model(shared_data / "mobilefacenet_arcface.pt")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "least"), [("small", 22), ("yunet", 23)])
def test_verdicts(shared_data: Path, pairs: Pairs, model: XCosModel, kind: str, least: int) -> None:
    detector = create_detector("small" if kind == "small" else shared_data / "yunet.onnx")
    assert model.threshold is not None
    right = 0
    with torch.no_grad():
        for a, b, same in pairs:
            try:
                faces = [read_face(path, detector).rgb for path in (a, b)]
            except PictureError:
                continue  # no face found: no right verdict either
            features = model.features(model.preprocessing(faces))
            score = model.score(features[:1], features[1:])
            assert isinstance(score, torch.Tensor)
            right += (float(score) >= model.threshold) == same
    assert right >= least, f"{right} of {len(pairs)}"


@pytest.mark.thorough
def test_detectors_agree(shared_data: Path, pairs: Pairs) -> None:
    """Both detectors' transforms lie within a few pixels of each other, whatever the photograph's size and roll."""
    small, yunet = create_detector(), create_detector(shared_data / "yunet.onnx")
    distances = []
    for i, (path, _, _) in enumerate(pairs[::3]):
        photograph = Image.open(path).convert("RGB")
        if i % 2:  # large and rolled
            photograph = photograph.resize((1500, 1500), Image.Resampling.BICUBIC).rotate(-14, Image.Resampling.BICUBIC)
        rgb = np.array(photograph)
        found = [choose_face(detector.detect(rgb), rgb.shape[:2]).landmarks for detector in (small, yunet)]
        first, second = (similarity_transform(landmarks, ARCFACE_TEMPLATE) for landmarks in found)
        difference = apply_transform(first, found[1]) - apply_transform(second, found[1])
        distances.append(float(np.sqrt((difference**2).sum(1).mean())))
    assert np.median(distances) < 3.5
    assert max(distances) < 12


def test_faces_look_like_faces(shared_data: Path) -> None:
    """Aligned crops do, and turned over they do not; docs/verify.md has the rates of all pictures."""
    crops = PictureTree(shared_data / "lfw112.zip")
    pictures = [crops.read(name) for name in crops.names[::400]]
    assert min(map(face_likelihood, pictures)) > LIKELY
    assert np.mean([face_likelihood(picture[::-1]) < LIKELY for picture in pictures]) > 0.9


@pytest.mark.thorough
def test_command(shared_data: Path, pairs: Pairs, tmp_path: Path) -> None:
    """A same and a different pair, as a user runs them."""
    weights = shared_data / "mobilefacenet_arcface.pt"
    for index, status in ((0, 0), (_OF_EACH_KIND, 1)):
        a, b, _ = pairs[index]
        out = tmp_path / f"{status}.png"
        result = run("verify", a, b, "--model", weights, "--out", out, "--json")
        assert result.exit_code == status, result.output
        data = strict(result.stdout)
        assert data["same"] is (status == 0)
        assert np.sum(data["contribution"]) == pytest.approx(data["score"] - data["threshold"], abs=1e-5)
        assert out.stat().st_size > 50_000
