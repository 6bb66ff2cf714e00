"""The first calls: verify, verify_many, represent, and a gallery's enroll and find."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import run, strict
from drawn import background, draw_face, portrait
from PIL import Image

import xcos_ext
from xcos_ext import api
from xcos_ext.explain import Explanation
from xcos_ext.faces import SmallDetector, create_detector, read_face

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two drawn portraits."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, tint, degrees in (("a.png", 1.0, 0.0), ("b.png", 0.8, 12.0)):
        Image.fromarray(portrait(degrees=degrees, tint=tint)).save(folder / name)
    return folder / "a.png", folder / "b.png"


@pytest.fixture
def crop() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)


def test_two_paths_and_nothing_else(photographs: tuple[Path, Path]) -> None:
    e = xcos_ext.verify(*photographs)
    assert isinstance(e, Explanation) and e.same is bool(e) and e.fmr is not None
    assert e.a.name == str(photographs[0]) and e.b.details["faces"] == 1 and e.b.landmarks is not None
    assert e.contribution is not None
    assert float(e.contribution.sum()) == pytest.approx(e.score - e.threshold, abs=1e-9)
    assert "<html" in e.to_html() and e._repr_html_()


def test_the_command_says_what_the_call_says(photographs: tuple[Path, Path]) -> None:
    e = xcos_ext.verify(*photographs)
    result = run("verify", *photographs, "--json")
    assert result.exit_code == (0 if e else 1)
    data = strict(result.stdout)
    assert data["score"] == e.score and data["contribution"] == e.contribution.tolist()  # type: ignore[union-attr]
    assert data["model"]["fingerprint"] == e.model.fingerprint and data["a"]["box"] == e.a.details["box"]


def test_a_picture_may_come_in_any_form(photographs: tuple[Path, Path]) -> None:
    path, other = photographs
    expected = xcos_ext.verify(path, other).score
    pixels = np.array(Image.open(path))
    forms = [str(path), Image.open(path), pixels, read_face(path, SmallDetector())]
    assert [xcos_ext.verify(form, other).score for form in forms] == [expected] * 4
    names = [xcos_ext.verify(form, other).a.name for form in forms]
    assert names == [str(path), "a", "a", str(path)]
    turned = Image.fromarray(np.rot90(pixels, 1))
    turned.getexif()[274] = 6  # as a camera that was held upright writes it
    assert xcos_ext.verify(turned, other).score == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("missing.jpg", xcos_ext.PictureError, r"^missing\.jpg: no such file$"),
        (3, TypeError, r"^a: expected a path, a Pillow picture or a uint8 array \[H, W, 3\], got int$"),
        (np.zeros((9, 9)), ValueError, r"^a: expected uint8 RGB \[H, W, 3\], got float64 \[9, 9\]"),
        (np.zeros((9, 9, 3), np.float32), ValueError, r"^a: expected uint8 RGB"),
        (np.zeros((0, 9, 3), np.uint8), ValueError, r"^a: expected uint8 RGB"),
        (torch.zeros(9, 9, 3), TypeError, r"^a: expected a path, a Pillow picture .*got Tensor$"),
        (background(90, 90), xcos_ext.PictureError, r"^a: no face found in 90 x 90 pixels"),
    ],
)
def test_what_is_no_picture(
    given: object, error: type[Exception], message: str, photographs: tuple[Path, Path]
) -> None:
    with pytest.raises(error, match=message):
        xcos_ext.verify(given, photographs[1])


def test_other_arguments(crop: np.ndarray, photographs: tuple[Path, Path]) -> None:
    aligned = {"detector": "aligned"}
    with pytest.raises(xcos_ext.ModelError, match=r"did you mean slim"):
        xcos_ext.verify(crop, crop, model="slimm", **aligned)
    with pytest.raises(TypeError, match=r"^model: expected a name, a file or a model, got int$"):
        xcos_ext.verify(crop, crop, model=3, **aligned)
    with pytest.raises(xcos_ext.ModelError, match=r"did you mean small"):
        xcos_ext.verify(crop, crop, detector="smal")
    with pytest.raises(TypeError, match=r"^detector: expected a name, .*got int$"):
        xcos_ext.verify(crop, crop, detector=3)
    with pytest.raises(ValueError, match=r"^threshold: "):
        xcos_ext.verify(crop, crop, threshold=float("nan"), **aligned)
    with pytest.raises(ValueError, match=r"^device: "):
        xcos_ext.verify(crop, crop, device="abacus", **aligned)
    with pytest.raises(ValueError, match=r"^policy: "):
        xcos_ext.verify(*photographs, policy="prettiest")
    with pytest.raises(xcos_ext.PictureError, match=r"expected an aligned crop of 112 x 112 pixels, got 320 x 360"):
        xcos_ext.verify(*photographs, **aligned)
    model = xcos_ext.load_model()
    model.threshold = None
    with pytest.raises(xcos_ext.XCosError, match=r"knows no decision threshold"):
        xcos_ext.verify(crop, crop, model=model, **aligned)
    assert xcos_ext.verify(crop, crop, model=model, threshold=0.5, **aligned).given
    with pytest.raises(ValueError, match=r"^model: expected evaluation mode, got training mode"):
        xcos_ext.verify(crop, crop, model=xcos_ext.load_model().train(), **aligned)
    other = read_face(photographs[0], SmallDetector(), size=(96, 96))
    with pytest.raises(ValueError, match=r"a\.png: expected a face of 112 x 112 pixels for this model, got 96 x 96$"):
        xcos_ext.verify(other, photographs[1])
    e = api.compare(
        crop, crop, model=model, detector="aligned", device="cpu", threshold=None, policy="prominent", strict=False,
        max_pixels=None, needs_threshold=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"without which there is no verdict"):
        bool(e)


def test_many_pairs(photographs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = photographs
    face, pixels = read_face(a, SmallDetector()), np.array(Image.open(b))
    pairs = [(a, b), (b, a), (a, a), (a, tmp_path / "missing.jpg"), (face, pixels)] * 8
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = list(xcos_ext.verify_many(pairs, progress=False))
    assert [e is None for e in results] == [False, False, False, True, False] * 8
    assert {str(w.message) for w in caught} == {f"{tmp_path / 'missing.jpg'}: no such file"}
    first, exchanged, itself, _, array = results[:5]
    assert first and exchanged and itself and array
    single = xcos_ext.verify(a, b)
    for e in (first, array, results[35]):
        assert e is not None and e.score == pytest.approx(single.score, abs=1e-5)
        np.testing.assert_allclose(e.similarity, single.similarity, atol=1e-5)
    assert exchanged.score == pytest.approx(first.score, abs=1e-5)
    assert itself.identical == "pictures" and first.identical is None


def test_many_pairs_are_taken_as_they_are_asked_for(crop: np.ndarray) -> None:
    taken = []

    def pairs():  # type: ignore[no-untyped-def]
        for i in range(100):
            taken.append(i)
            yield crop, crop

    results = xcos_ext.verify_many(pairs(), detector="aligned")
    assert next(results) and len(taken) == 32
    with pytest.raises(TypeError, match=r"^pairs\[0\]: expected two pictures, got ndarray$"):
        next(xcos_ext.verify_many([crop], detector="aligned"))  # type: ignore[list-item]


def test_a_progress_bar(crop: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    list(xcos_ext.verify_many([(crop, crop)], detector="aligned", progress=True))
    assert "comparing" in capsys.readouterr().err


def test_templates(photographs: tuple[Path, Path], crop: np.ndarray) -> None:
    a, b = photographs
    probe, gallery = xcos_ext.represent(a), xcos_ext.represent([a, b, crop][:2], role="gallery")
    assert len(probe) == 1 and len(gallery) == 2
    scores = xcos_ext.xcos_matrix(probe, gallery)
    assert float(scores[0, 0]) == pytest.approx(1, abs=1e-5)
    assert float(scores[0, 1]) == pytest.approx(xcos_ext.verify(a, b).score, abs=1e-5)
    with pytest.raises(ValueError, match=r"^pictures: expected at least one, got none"):
        xcos_ext.represent([])


def test_a_gallery_in_three_lines(photographs: tuple[Path, Path], tmp_path: Path) -> None:
    for person, photograph in zip(("ann", "bob"), photographs, strict=True):
        (tmp_path / "people" / person).mkdir(parents=True)
        shutil.copy(photograph, tmp_path / "people" / person)
    (tmp_path / "people" / "notes.txt").write_text("none of them")
    Image.fromarray(background(80, 80)).save(tmp_path / "people" / "wall.png")
    with xcos_ext.Gallery.create(tmp_path / "g.xcos") as gallery:
        done = gallery.enroll(tmp_path / "people")
        assert sorted(done.enrolled) == ["ann/a.png", "bob/b.png"]
        assert list(done.skipped) == ["wall.png"] and list(done.left_out) == ["notes.txt"]
        assert gallery.enroll(tmp_path / "people").present == 2
        found = gallery.find(photographs[0])
        assert len(found) == 1 and found[0][0].person == "ann" and found[0][0].score == pytest.approx(1, abs=2e-3)
        assert found.threshold == gallery.layout.threshold and "over the threshold" in str(found)
        both = gallery.find([np.array(Image.open(p)) for p in photographs], 1, by="person")
        assert [hits[0].person for hits in both] == ["ann", "bob"] and both.probes == ["picture 1", "picture 2"]
        with pytest.raises(xcos_ext.PictureError, match=r"no probe has a usable face: .*no face found"):
            gallery.find(background(50, 50))
    with xcos_ext.Gallery.open(tmp_path / "g.xcos") as opened:  # the model is found by itself
        assert opened.find(photographs[1])[0][0].person == "bob"
    result = run("search", tmp_path / "g.xcos", photographs[0])
    assert result.exit_code == 0 and result.stdout.splitlines()[1].split()[2] == "ann/a.png"


def test_named_models_and_detectors_are_kept(photographs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    xcos_ext.verify(*photographs)
    monkeypatch.setattr(xcos_ext.model, "load_model", lambda *_: pytest.fail("loaded again"))
    monkeypatch.setattr("xcos_ext.faces.reader.SmallDetector", lambda *_: pytest.fail("loaded again"))
    xcos_ext.verify(*photographs)


@pytest.mark.real_data
@pytest.mark.thorough
def test_another_recogniser_by_its_name(
    shared_data: Path, photographs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFace and the ReLU6 network as they would lie here once they are fetched, with the package's own statistics."""
    from xcos_ext.io.models import REGISTRY

    monkeypatch.setenv("XCOS_CACHE", str(tmp_path))
    monkeypatch.setenv("XCOS_OFFLINE", "1")
    for name, file in (("sface", "sface_2021dec_int8bq.onnx"), ("mobilefacenet", "mobilefacenet_apache2.pt")):
        place = REGISTRY[name].path()
        place.parent.mkdir(parents=True)
        shutil.copy(shared_data / file, place)
        e = xcos_ext.verify(*photographs, model=name)
        assert e.model.name.endswith("+closed-form") and e.fmr is not None and 0.1 < e.threshold < 0.4
        assert run("verify", *photographs, "--model", name).exit_code == (0 if e else 1)


@pytest.mark.examples
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    names: dict[str, object] = {}
    for cell in json.loads((EXAMPLES / "first_contact.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    e = names["e"]
    assert isinstance(e, Explanation) and e


@pytest.mark.process
@pytest.mark.examples
def test_the_camera_and_the_batch(photographs: tuple[Path, Path], tmp_path: Path) -> None:
    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (320, 360))
    for picture in (background(360, 320), portrait(), portrait(), background(360, 320)):
        film.write(np.ascontiguousarray(picture[:, :, ::-1]))
    film.release()
    with xcos_ext.Gallery.create(tmp_path / "g.xcos") as gallery:
        gallery.enroll(photographs[0], person="ann")
    seen = _run(EXAMPLES / "camera.py", tmp_path / "g.xcos", "--source", tmp_path / "film.avi")
    assert [line.split("s  ")[1].split(" (")[0] for line in seen.splitlines()] == ["nobody", "ann", "nobody"]

    (tmp_path / "pairs.csv").write_text(f"a,b,note\n{photographs[0]},{photographs[1]},x\n{photographs[0]},no.jpg,y\n")
    _run(EXAMPLES / "batch.py", tmp_path / "pairs.csv", "--out", tmp_path / "out.csv")
    header, good, bad = (tmp_path / "out.csv").read_text().splitlines()
    assert header == "a,b,note,score,threshold,same" and bad.endswith("no.jpg,y,,,")
    assert float(good.split(",")[3]) == pytest.approx(xcos_ext.verify(*photographs).score, abs=1e-5)


def _run(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_detectors_find_several_faces() -> None:
    canvas = background(400, 700)
    for centre in ((180, 200), (520, 200)):
        draw_face(canvas, centre, 150)
    assert len(create_detector("small").detect(canvas)) == 2
