"""xcos enroll, search, gallery and dedupe, on drawn photographs and the shipped model."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run, strict, trouble
from drawn import background, draw_face, portrait
from PIL import Image

from xcos_ext.cli.enroll import _labelled
from xcos_ext.gallery import Gallery
from xcos_ext.gallery.enroll import Picture, enroll, find_pictures, find_probes
from xcos_ext.io.errors import GalleryError
from xcos_ext.io.tables import csv_rows, csv_text
from xcos_ext.model import load_model, save_model

pytest.importorskip("lance", reason="needs the extra gallery (pylance)")
xxh3_128_hexdigest = pytest.importorskip("xxhash").xxh3_128_hexdigest

pytestmark = pytest.mark.usefixtures("one_thread")

# A job in the background ignores Ctrl-C, so the handler is set explicitly.
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from xcos_ext.cli import main; main()"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ann/, bob/: drawn portraits; wall.png: nobody; team.png: two faces."""
    folder = tmp_path_factory.mktemp("photos")
    for person, tint in (("ann", 1.0), ("bob", 0.6)):
        (folder / person).mkdir()
        for i, degrees in enumerate((0, 5, -5)):
            Image.fromarray(portrait(tint=tint, degrees=degrees)).save(folder / person / f"{i}.png")
    Image.fromarray(background(200, 200)).save(folder / "wall.png")
    team = background(300, 600)
    draw_face(team, (140, 150), 110)
    draw_face(team, (430, 150), 140)
    Image.fromarray(team).save(folder / "team.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    return folder


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty aligned crops of noise: enough to be enrolled in several commits."""
    folder = tmp_path_factory.mktemp("crops")
    rng = np.random.default_rng(3)
    for i in range(40):
        (folder / f"person{i % 8}").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"person{i % 8}" / f"{i:02d}.png")
    return folder


@pytest.mark.thorough
def test_photographs_from_enrolment_to_deletion(photos: Path, tmp_path: Path) -> None:
    gallery = tmp_path / "people"
    result = run("enroll", gallery, photos)
    assert result.exit_code == 0, result.output
    assert re.match(r"7 enrolled \(\d+/s\), 0 already in, 2 skipped; 7 faces in ", result.stdout)
    assert re.search(r"skipped wall\.png: no face found", result.stderr)
    assert re.search(r"skipped \S+broken\.jpg: damaged picture", result.stderr)
    assert "team.png: 2 faces found, took the most prominent (see --face)" in result.stderr
    again = strict(run("enroll", gallery, photos, "--json").stdout)
    assert again["enrolled"] == 0 and again["already_in"] == 7 and set(again["skipped"]) == {"wall.png", "broken.jpg"}

    found = run("search", gallery, photos / "ann" / "0.png", "-k", "2")
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    assert lines[0] == str(photos / "ann" / "0.png")
    assert re.match(r" +1 +[01]\.\d+ +ann/0\.png +ann +over the threshold", lines[1])
    assert "every face scored" in found.stderr and "--fpir" in found.stderr
    data = strict(run("search", gallery, photos / "bob", "--json", "--explain", "-k", "3").stdout)
    assert [p["probe"] for p in data["probes"]] == [f"{photos}/bob/{i}.png" for i in range(3)] and data["exact"] is True
    hit = data["probes"][1]["hits"][0]
    assert hit["id"] == "bob/1.png" and hit["person"] == "bob" and hit["over_threshold"] is True
    assert np.sum(hit["contribution"]) == pytest.approx(hit["score"] - data["threshold"], abs=2e-3)
    fused = strict(run("search", gallery, photos / "bob", "--json", "--fuse", "mean", "--by-person", "-k", "2").stdout)
    assert len(fused["probes"]) == 1 and fused["probes"][0]["hits"][0]["person"] == "bob"
    trouble(run("search", gallery, photos / "bob", "--rerank", "1"), "xcos: --rerank: expected an int from k")
    near = strict(run("search", gallery, photos / "bob", "--json", "--rerank", "7", "-k", "2").stdout)
    assert near["exact"] is False and near["recall"] == 1.0
    nobody = run("search", gallery, photos / "ann" / "0.png", "--where", "person = 'eve'")
    assert nobody.exit_code == 0 and "nobody" in nobody.stdout

    info = strict(run("gallery", "info", gallery, "--json").stdout)
    assert info["faces"] == 7 and info["persons"] == 2 and info["faces_without_person"] == 1
    assert re.search(r"^faces +7 of 2 persons$", run("gallery", "info", gallery).stdout, re.M)
    trouble(run("gallery", "remove", gallery, "ann/0.png", "eve/0.png"), "eve/0.png")
    removed = run("gallery", "remove", gallery, "--person", "ann", "team.png")
    assert "4 removed, 3 left" in removed.stdout
    compacted = strict(run("gallery", "compact", gallery, "--json").stdout)
    assert compacted["faces"] == 3 and compacted["bytes_after"] < compacted["bytes_before"]
    assert strict(run("gallery", "verify", gallery, "--json").stdout)["ok"] is True
    pairs = strict(run("dedupe", gallery, "--json", "--out", tmp_path / "pairs.csv").stdout)
    assert pairs["groups"] == [["bob/0.png", "bob/1.png", "bob/2.png"]] and pairs["compared"] == 3
    rows = list(csv.DictReader((tmp_path / "pairs.csv").open()))
    assert len(rows) == 3 and rows[0]["person_a"] == "bob" and float(rows[0]["score"]) == pairs["pairs"][0]["score"]
    assert "3 of 3 pairs" in run("dedupe", gallery).stdout


def test_who_was_chosen_and_what_is_no_face_are_said(photos: Path, crops: Path, tmp_path: Path) -> None:
    """Also of probes, where a second face and pictures of nothing once went unsaid."""
    gallery, noise = tmp_path / "g", crops / "person0" / "00.png"
    enrolled = run("enroll", gallery, noise, "--aligned", "--json")
    unlike = "00.png: it does not look like a face, so its scores say nothing about a person (--strict refuses it)"
    assert enrolled.exit_code == 0 and unlike in enrolled.stderr
    assert strict(enrolled.stdout)["not_like_a_face"] == ["00.png"]
    found = run("search", gallery, photos / "team.png", "--json")
    assert "team.png: 2 faces found, took the most prominent (see --face)" in found.stderr
    data = strict(found.stdout)
    assert (data["several_faces"], data["not_like_a_face"]) == ([str(photos / "team.png")], [])
    assert unlike in run("search", gallery, noise, "--aligned").stderr
    refused = run("search", gallery, noise, "--aligned", "--strict")
    assert refused.exit_code == 2 and refused.stdout == ""
    assert "00.png: expected an aligned face, got a picture that does not look like one (0.0" in refused.stderr
    assert run("enroll", tmp_path / "h", noise, "--aligned", "--strict").exit_code == 2


def test_crops_labels_and_archives(crops: Path, tmp_path: Path) -> None:
    archive = tmp_path / "crops.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(crops.rglob("*.png")):
            out.write(path, path.relative_to(crops))
    labels = tmp_path / "labels.csv"
    labels.write_text("picture,person,camera\nperson0/00.png,Zoë,north\nperson1/01.png,,south\n", encoding="utf-8")
    result = run(
        "enroll", tmp_path / "g", archive, "--aligned", "--labels", labels, "--batch", "16", "--dtype", "float32"
    )
    assert result.exit_code == 0, result.output
    with Gallery.open(tmp_path / "g") as gallery:
        assert len(gallery) == 40 and gallery.version == 4 and gallery.info()["dtype"] == "float32"
        _, (first, second, third) = gallery.get(["person0/00.png", "person1/01.png", "person1/09.png"])
    for row in (first, second, third):  # the checksum of its file
        assert row["metadata"].pop("file_xxh3") == xxh3_128_hexdigest((crops / row["id"]).read_bytes())
    assert first["person"] == "Zoë" and first["metadata"] == {"camera": "north"}
    assert second["person"] == "person1" and second["metadata"] == {"camera": "south"}
    assert third["person"] == "person1" and third["metadata"] == {}
    where = "json_get_string(metadata, 'camera') = 'south'"
    found = strict(run("search", tmp_path / "g", crops / "person1", "--aligned", "--json", "--where", where).stdout)
    assert [h["id"] for h in found["probes"][0]["hits"]] == ["person1/01.png"]

    same = run("enroll", tmp_path / "g", archive, "--aligned", "--replace", "--person", "everybody", "-q")
    assert same.exit_code == 0 and same.stdout == ""
    for arguments in (("gallery", "verify", tmp_path / "g"), ("dedupe", tmp_path / "g", "--threshold", "9")):
        assert run(*arguments, "-q").output == "" and run(*arguments).output
    ids = tmp_path / "ids.txt"
    ids.write_bytes(b"\xef\xbb\xbfperson0/00.png\r\nperson1/01.png\r\n")  # as Windows writes it
    assert "2 removed, 38 left" in run("gallery", "remove", tmp_path / "g", "--ids-from", ids).stdout
    trouble(run("gallery", "remove", tmp_path / "g", "--ids-from", "/dev/zero"), "one of 65,536 characters")


def test_nothing_is_left_out_without_a_word(crops: Path, tmp_path: Path) -> None:
    album = tmp_path / "album"
    (tmp_path / "bob").mkdir()
    (album / "ann").mkdir(parents=True)
    (album / "bob").symlink_to(tmp_path / "bob")
    with Image.open(crops / "person0" / "00.png") as picture:
        for name in ("ann/0.tiff", "ann/1.gif", "bob/2.bmp"):
            picture.save(album / name)
    for name in ("ann/3.heic", "ann/Thumbs.db", ".DS_Store", "film.mp4"):
        (album / name).touch()
    data = strict(run("enroll", tmp_path / "g", album, "--aligned", "--json").stdout)
    assert data["enrolled"] == 3 and not data["skipped"]
    assert list(data["left_out"]) == ["ann/3.heic", "film.mp4"]
    with Gallery.open(tmp_path / "g") as gallery:
        assert sorted(gallery.ids()) == ["ann/0.tiff", "ann/1.gif", "bob/2.bmp"] and gallery.ids_of("bob")
    told = run("enroll", tmp_path / "g", album, "--aligned").stderr.splitlines()
    assert told == [f"xcos: left out {name}: {why}" for name, why in data["left_out"].items()]
    pictures, left_out = find_probes([album])
    assert [picture.id for picture in pictures] == [
        f"{album}/{name}" for name in ("ann/0.tiff", "ann/1.gif", "bob/2.bmp")
    ]
    assert list(left_out) == [f"{album}/ann/3.heic", f"{album}/film.mp4"]
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "1.heic").touch()
    with pytest.raises(GalleryError, match=r"phone: expected pictures, got none; left out: 1\.heic$"):
        find_pictures([tmp_path / "phone"])


def test_pictures_that_have_changed(crops: Path, tmp_path: Path) -> None:
    """Another picture of a name that is in the gallery is told, whether it took the file's place or lies elsewhere."""
    first, second = tmp_path / "a" / "1.png", tmp_path / "b" / "1.png"
    for path, source in ((first, crops / "person0" / "00.png"), (second, crops / "person1" / "01.png")):
        path.parent.mkdir()
        shutil.copy(source, path)
    model = load_model()
    with Gallery.create(tmp_path / "g", model) as gallery:

        def changed(path: Path, known: Any = "skip") -> list[str]:
            return enroll(gallery, model, find_pictures([path])[0], on_duplicate=known).changed

        assert changed(first) == changed(first) == []
        assert changed(second) == ["1.png"]
        assert changed(second, "replace") == changed(second) == []
        again = run("enroll", tmp_path / "g", first, "--aligned")
        assert "0 enrolled" in again.stdout and "1 already in" in again.stdout
        assert "not enrolled 1.png: it is in the gallery from a file with other contents" in again.stderr
        assert "--replace" in again.stderr
        templates, _ = gallery.get(["1.png"])
        gallery.add(["1.png"], templates, on_duplicate="replace")
        assert changed(first) == []  # a face whose file is not known: nothing to say


def test_what_another_process_enrolled_meanwhile_is_counted_as_such(tmp_path: Path) -> None:
    model = load_model()

    def read(first: bool = False) -> np.ndarray:
        if first:
            with Gallery.open(tmp_path / "g", model) as other:
                enroll(other, model, [Picture("a", read)])
        return portrait()[:112, :112]

    with Gallery.create(tmp_path / "g", model) as gallery:
        found = enroll(gallery, model, [Picture("a", lambda: read(True))])
        assert (found.enrolled, found.present, len(gallery)) == ([], 1, 1)


def test_names_of_single_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "1.png", tmp_path / "b" / "1.png"
    for path in (first, second):
        path.parent.mkdir()
        path.touch()
    assert [picture.id for picture in find_probes([first, second, first])[0]] == [str(first), str(second), str(first)]
    with pytest.raises(GalleryError, match=r"b/1\.png: expected each picture name once, .*a/1\.png has"):
        find_pictures([first, second])
    for find in (find_pictures, find_probes):
        with pytest.raises(GalleryError, match=r"missing\.jpg: no such file or folder$"):
            find([tmp_path / "missing.jpg"])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: text.replace(",", ";"),
        lambda text: text.replace(",", "\t"),
        lambda text: text.replace(",", " , "),
        lambda text: unicodedata.normalize("NFD", text),
    ],
)
def test_labels_as_spreadsheets_write_them(tmp_path: Path, change: Callable[[str], str]) -> None:
    pictures = [Picture("zo\xeb/1.png", lambda: np.zeros((1, 1, 3), np.uint8), "zo\xeb")]
    path = tmp_path / "labels.csv"
    path.write_bytes(change("picture,person,camera\nzo\xeb/1.png,Zo\xeb,north\n").encode())
    (labelled,) = _labelled(pictures, str(path))
    assert labelled.person == "Zo\xeb" and labelled.metadata == {"camera": "north"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("picture,person\n1.png,Ann\n1.png,Bob\n", "line 3: expected each picture once, got '1.png' again"),
        ("picture,person\n1.png\n", "line 2: expected 2 columns as in the header, got 1"),
        ("picture,person\n1.png,Ann,north\n", "line 2: expected 2 columns as in the header, got 3"),
        ("picture,person,person\n1.png,Ann,Bob\n", "expected CSV with a column 'picture', each column once"),
        ("", "expected CSV with a column 'picture', each column once, got nothing"),
        (b"picture,person\n1.png,Zo\xeb\n", "labels.csv: expected text in UTF-8"),
        ("picture,person\n".encode("utf-16"), "labels.csv: expected text in UTF-8"),
    ],
)
def test_labels_that_cannot_be(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GalleryError, match=re.escape(words)):
        _labelled([Picture("1.png", lambda: np.zeros((1, 1, 3), np.uint8))], str(path))


def test_no_text_of_a_table_is_a_formula(tmp_path: Path) -> None:
    header, rows = ["id", "-name"], [["=1+1", "@ann"], ["-0.png", "+"], ["'=x", "'a'"], ["a=b", ""], ["''-", "\t=1"]]
    (tmp_path / "t.csv").write_text(csv_text(header, rows), newline="")
    with (tmp_path / "t.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in cells)
    assert [row for _, row in csv_rows(tmp_path / "t.csv", GalleryError)] == [header, *rows]
    assert csv_text(["score"], [[-0.5], [None]]).splitlines() == ["score", "-0.5", '""']


def test_enrolments_at_once_share_a_new_gallery(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, gallery = Gallery.create, tmp_path / "g"

    def slower(*arguments: Any, **options: Any) -> Gallery:
        monkeypatch.undo()
        assert run("enroll", gallery, crops / "person0", "--aligned", "--dtype", "float32").exit_code == 0
        return create(*arguments, **options)

    monkeypatch.setattr(Gallery, "create", slower)
    data = strict(run("enroll", gallery, crops / "person0", crops / "person1", "--aligned", "--json").stdout)
    assert data["already_in"] == 5 and data["enrolled"] == 5 and data["faces"] == 10
    with Gallery.open(gallery) as opened:
        assert opened.info()["dtype"] == "float32"


@pytest.mark.thorough
def test_quick_search_of_a_stranger_rate(crops: Path, tmp_path: Path) -> None:
    run("enroll", tmp_path / "g", crops, "--aligned", "-q")
    probe = crops / "person0" / "00.png"
    one = strict(run("search", tmp_path / "g", probe, "--aligned", "--json").stdout)["threshold"]
    many = strict(run("search", tmp_path / "g", probe, "--aligned", "--json", "--fpir", "0.01").stdout)["threshold"]
    assert many > one
    options = ("--aligned", "--json", "--fpir", "0.01", "--fuse")
    best, mean = (
        strict(run("search", tmp_path / "g", probe, probe.parent / "08.png", *options, fusion).stdout)["threshold"]
        for fusion in ("max", "mean")
    )
    assert best > mean == many  # the best of two pictures is two draws
    trouble(
        run("search", tmp_path / "g", probe, "--aligned", "--fpir", "1e-9"), "fpir: expected at least", "40 candidates"
    )
    # What the model knows of scores is of its own attention.
    trouble(
        run("search", tmp_path / "g", probe, "--aligned", "--attention", "uniform", "--fpir", "0.01"),
        "--fpir: expected the attention that the model is calibrated with, got attention='uniform'; give a threshold",
    )
    curve_alone = load_model()
    curve_alone.threshold = None
    save_model(curve_alone, tmp_path / "curve.safetensors")
    use = ("--aligned", "--model", tmp_path / "curve.safetensors")
    run("enroll", tmp_path / "c", probe, *use, "-q")
    trouble(
        run("search", tmp_path / "c", probe, *use, "--attention", "uniform", "--fpir", "0.01"),
        "--fpir: expected the attention that the model is calibrated with",
    )
    assert run("search", tmp_path / "c", probe, *use, "--fpir", "0.01").exit_code == 0
    other = run("search", tmp_path / "g", probe, "--aligned", "--attention", "uniform")
    assert "the threshold" not in other.stdout and "no threshold known for this model and attention" in other.stderr
    data = strict(
        run("search", tmp_path / "g", probe, "--aligned", "--attention", "uniform", "--json", "--explain").stdout
    )
    hit = data["probes"][0]["hits"][0]
    assert data["threshold"] is hit["over_threshold"] is hit.get("contribution") is None and len(hit["similarity"]) == 7
    given = strict(
        run(
            "search", tmp_path / "g", probe, "--aligned", "--attention", "uniform", "--threshold", "0.5", "--json"
        ).stdout
    )
    assert given["threshold"] == 0.5 and given["probes"][0]["hits"][0]["over_threshold"] is True


@pytest.mark.process
def test_interrupted_enrolment_goes_on(crops: Path, tmp_path: Path) -> None:
    gallery = tmp_path / "g"
    command = [sys.executable, "-c", MAIN, "enroll", str(gallery), str(crops), "--aligned", "--batch", "4"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while time.monotonic() < end and len(list(gallery.glob("templates.lance/_versions/*.manifest"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    with Gallery.open(gallery) as opened:
        there = len(opened)
    assert there >= 8 and there % 4 == 0
    assert process.returncode in (0, 130), errors
    again = strict(run("enroll", gallery, crops, "--aligned", "--json").stdout)
    assert again["already_in"] == there and again["enrolled"] == 40 - there and again["faces"] == 40


@pytest.mark.process
def test_progress_has_a_rate_and_time_left(crops: Path, tmp_path: Path) -> None:
    """On a terminal, stderr shows the bar; stdout stays clean."""
    pty = pytest.importorskip("pty")
    main, follower = pty.openpty()
    command = [sys.executable, "-c", MAIN, "enroll", str(tmp_path / "g"), str(crops), "--aligned", "--batch", "4"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    out, _ = process.communicate(timeout=60)
    os.close(main)
    text = shown.decode("utf-8", "replace")
    assert process.returncode == 0 and out.startswith(b"40 enrolled")
    assert "enrolling" in text and "faces/s" in text and re.search(r"\d:\d\d:\d\d", text), text[-500:]


def test_one_line_for_every_mistake(crops: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = tmp_path / "g"
    run("enroll", gallery, crops, "--aligned", "-q")
    probe = crops / "person0" / "00.png"
    trouble(run("search", tmp_path / "none", probe, "--aligned"), "none: there is no such gallery")
    trouble(run("search", photos, probe, "--aligned"), "expected a gallery, got another folder")
    trouble(run("search", gallery, probe, "--aligned", "--where", "nonsense = ("), "where: expected an SQL condition")
    trouble(run("search", gallery, tmp_path / "missing.png", "--aligned"), "missing.png")
    trouble(run("search", gallery, probe, "--aligned", "--threshold", "0.1", "--fpir", "0.1"), "expected one of them")
    trouble(run("enroll", gallery, tmp_path / "missing", "--aligned"), "missing: no such file or folder")
    trouble(run("enroll", photos, crops, "--aligned"), "expected an empty folder")
    trouble(run("enroll", gallery, crops, photos / "ann", crops, "--aligned"), "expected each picture name once")
    trouble(run("enroll", gallery, crops, "--labels", photos / "notes.txt"), "expected CSV with a column 'picture'")
    (tmp_path / "labels.csv").write_text("picture,person\nnobody.png,x\n")
    trouble(run("enroll", gallery, crops, "--labels", tmp_path / "labels.csv"), "got 'nobody.png'")
    trouble(run("gallery", "remove", gallery), "ids: expected at least one")
    trouble(run("gallery", "remove", gallery, "--person", "eve"), "expected a person of the gallery, got 'eve'")
    trouble(run("gallery", "info", photos), "expected a gallery")
    trouble(run("dedupe", gallery, "--out", tmp_path / "x.txt"), "expected a file ending in .csv")
    inside = gallery / "templates.lance" / "x.csv"
    trouble(run("dedupe", gallery, "--out", inside), "--out: expected a file outside GALLERY's folder")
    assert not inside.exists()
    trouble(run("search", gallery, probe, "--explain"), "--explain: expected --json with it")
    trouble(
        run("enroll", gallery, crops, "--aligned", "--dtype", "float32"), "--dtype: expected float16, the gallery's"
    )
    assert run("enroll", gallery, crops, "--aligned", "--dtype", "float16", "-q").exit_code == 0
    line = trouble(run("enroll", gallery, probe, probe, "--aligned"), f"{probe}: expected each picture name once")
    assert line.endswith("got '00.png' again")
    monkeypatch.chdir(tmp_path)
    for address in ("s3://bucket/g", "file:///tmp/g", "memory://g"):
        for arguments in (("enroll", address, crops, "--aligned"), ("gallery", "info", address)):
            trouble(run(*arguments), "expected a path on this machine, got an address")
        trouble(run("dedupe", gallery, "--out", f"{address}.csv"), "expected a path on this machine, got an address")
    assert not [path.name for path in tmp_path.iterdir() if ":" in path.name]
    (tmp_path / "empty").mkdir()
    trouble(run("enroll", gallery, tmp_path / "empty"), "expected pictures, got none")


@pytest.mark.thorough
def test_photographs_without_any_face(photos: Path, tmp_path: Path) -> None:
    result = run("enroll", tmp_path / "g", photos / "wall.png", "--json")
    assert result.exit_code == 2 and strict(result.stdout)["enrolled"] == 0
    with Gallery.open(tmp_path / "g") as gallery:
        assert len(gallery) == 0
    run("enroll", tmp_path / "g", photos / "ann", "-q")
    trouble_lines = run("search", tmp_path / "g", photos / "wall.png")
    assert trouble_lines.exit_code == 2 and "no probe has a usable face" in trouble_lines.stderr


@pytest.mark.thorough
def test_odd_file_names(crops: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    source = (crops / "person0" / "00.png").read_bytes()
    for name in ("é😀.png", "a'b.png", 'quote".png', "line\nbreak.png", "\u202ertl.png"):
        (folder / name).write_bytes(source)
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write(source)
    result = strict(run("enroll", tmp_path / "g", folder, "--aligned", "--json").stdout)
    assert result["enrolled"] == 6
    with Gallery.open(tmp_path / "g") as gallery:
        ids = set(gallery.ids())
    assert {"é😀.png", "a'b.png", 'quote".png', "line\\nbreak.png"} <= ids
    assert strict(run("enroll", tmp_path / "g", folder, "--aligned", "--json").stdout)["already_in"] == 6
    assert run("gallery", "remove", tmp_path / "g", "a'b.png").exit_code == 0


def test_find_pictures(crops: Path, tmp_path: Path) -> None:
    found, left_out = find_pictures([crops])
    assert not left_out
    assert len(found) == 40 and found[0].id == "person0/00.png" and found[0].person == "person0"
    (one,), _ = find_pictures([crops / "person0" / "00.png"], person="x")
    assert one.id == "00.png" and one.person == "x" and one.read().shape == (112, 112, 3)
    with pytest.raises(GalleryError, match="missing"):
        find_pictures([tmp_path / "missing"])


@pytest.mark.thorough
def test_model_of_another_gallery(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("enroll", tmp_path / "g", crops / "person0", "--aligned", "-q")
    other = load_model()
    other.backbone.requires_grad_(False)
    next(other.backbone.parameters()).mul_(1.1)
    save_model(other, tmp_path / "other.safetensors")
    for command in (("enroll", tmp_path / "g", crops), ("search", tmp_path / "g", crops / "person0")):
        trouble(
            run(*command, "--aligned", "--model", tmp_path / "other.safetensors"),
            "model: expected the one that the gallery was made for",
        )
    report = json.loads(run("gallery", "info", tmp_path / "g", "--json").stdout)
    assert report["model_name"] == load_model().name


def test_without_the_extra(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    gallery = tmp_path / "g"
    for command in (("enroll", gallery, crops), ("search", gallery, crops), ("gallery", "info", gallery)):
        trouble(run(*command), "needs pylance", "pip install 'xcos_ext[gallery]'")
