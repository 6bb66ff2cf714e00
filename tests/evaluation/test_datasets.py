"""Readers of face data: folders, archives in place, pairs files, and their errors."""

from __future__ import annotations

import io
import pickle
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from xcos_ext.evaluation.datasets import LFW, Pair, read_pairs
from xcos_ext.faces import PersonFolder
from xcos_ext.io.errors import PictureError

Image = pytest.importorskip("PIL.Image")

FILES = ("Ann/Ann_0001.png", "Ann/Ann_0002.png", "Bob/Bob_0001.png", "Cid/Cid_0001.png", "Dee/Dee_0001.png")


def colour(index: int) -> tuple[int, int, int]:
    return (index * 10, 255 - index, 7)


def png(index: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour(index)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(params=["folder", "stored", "deflated"])
def people(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same pictures as a folder, an archive without and one with compression."""
    if request.param == "folder":
        root = tmp_path / "faces"
        for index, name in enumerate(FILES):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(png(index))
        (root / "README.txt").write_text("not a picture")
        (root / "loose.png").write_bytes(png(0))
        return root
    path = tmp_path / "faces.zip"
    kind = zipfile.ZIP_STORED if request.param == "stored" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for index, name in reversed(list(enumerate(FILES))):
            archive.writestr(f"faces/{name}", png(index))
        archive.writestr("faces/README.txt", "not a picture")
    return path


def test_people_keys_and_pixels(people: Path) -> None:
    pictures = PersonFolder(people)
    assert pictures.people == ("Ann", "Bob", "Cid", "Dee")
    assert pictures.keys == FILES and len(pictures) == 5
    names = sorted(name.removeprefix("faces/") for name in pictures.left_out)
    assert names == (["README.txt", "loose.png"] if people.is_dir() else ["README.txt"])
    assert pictures.of("Ann") == FILES[:2]
    assert FILES[0] in pictures and "Ann/Ann_0003.png" not in pictures
    assert pictures.numbered("Ann", 2) == FILES[1] and pictures.numbered("Ann", 3) is None
    for index, key in enumerate(pictures.keys):
        pixels = pictures.read(key)
        assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
        assert (pixels == colour(index)).all()


def test_pickling_and_threads(people: Path) -> None:
    pictures = PersonFolder(people)
    pictures.read(FILES[0])
    copy = pickle.loads(pickle.dumps(pictures))
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            for index, key in enumerate(FILES):
                if not (copy.read(key) == colour(index)).all():
                    wrong.append(key)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_grey_and_palette_pictures_become_rgb(tmp_path: Path) -> None:
    (tmp_path / "Ann").mkdir()
    for mode in ("L", "P", "RGBA", "1"):
        (tmp_path / "Ann" / f"{mode}.png").write_bytes(png(3, mode))
    pictures = PersonFolder(tmp_path)
    assert all(pictures.read(key).shape == (4, 6, 3) for key in pictures.keys)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder or archive"):
        PersonFolder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no pictures of the form <person>/<picture>"):
        PersonFolder(tmp_path)
    (tmp_path / "1.heic").touch()
    with pytest.raises(ValueError, match=r"<person>/<picture> in it; left out: 1\.heic$"):
        PersonFolder(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"x.zip: expected a folder or a zip archive"):
        PersonFolder(tmp_path / "x.zip")
    for part in ("train", "test"):
        (tmp_path / part / "Ann").mkdir(parents=True)
        (tmp_path / part / "Ann" / "1.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"two pictures are called Ann/1.png: test/Ann/1.png and train/Ann/1"):
        PersonFolder(tmp_path)


def test_bad_picture(tmp_path: Path) -> None:
    (tmp_path / "Ann").mkdir()
    (tmp_path / "Ann" / "1.png").write_bytes(png(0)[:40])
    (tmp_path / "Ann" / "2.jpg").write_bytes(b"hello")
    pictures = PersonFolder(tmp_path)
    for key in pictures.keys:
        with pytest.raises(PictureError, match=f"{key}: not a picture"):
            pictures.read(key)
    with pytest.raises(KeyError):
        pictures.read("Ann/3.png")


PAIRS = "2\t1\nAnn\t1\t2\nAnn\t1\tBob\t1\nAnn\t2\t1\nBob\t1\tCid\t1\n"


def test_read_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    for text in (PAIRS, PAIRS.replace("\t", " "), PAIRS + "\n\n", PAIRS.replace("\n", "\r\n"), "\ufeff" + PAIRS):
        path.write_bytes(text.encode())
        assert read_pairs(path) == [
            Pair("Ann", 1, "Ann", 2, True, 0),
            Pair("Ann", 1, "Bob", 1, False, 0),
            Pair("Ann", 2, "Ann", 1, True, 1),
            Pair("Bob", 1, "Cid", 1, False, 1),
        ]
    path.write_text("1\nAnn\t1\t2\nAnn\t1\tBob\t1\n")
    assert len(read_pairs(path)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected '<folds> <pairs per kind>', got 'nothing'"),
        ("pairs\n", "line 1: expected '<folds> <pairs per kind>', got 'pairs'"),
        ("0\t5\n", "line 1: expected"),
        ("2\nAnn\t1\nBob\t3\n", "expected a list of pairs, got a list of people"),
        (PAIRS[:-12], r"expected 4 pairs \(2 folds of 1 genuine and 1 impostor pairs\), got 3"),
        (PAIRS.replace("Ann\t1\t2", "Ann\t1"), "line 2: expected 'person number number', got 'Ann 1'"),
        (PAIRS.replace("Bob\t1\tCid\t1", "Bob\tone\tCid\t1"), "line 5: expected 'person number person number'"),
    ],
)
def test_bad_pairs(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path}.*{message}"):
        read_pairs(path)


def test_lfw(people: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text(PAIRS)
    lfw = LFW(people, path)
    named = [(lfw.keys[a], lfw.keys[b]) for a, b in zip(lfw.first, lfw.second, strict=True)]
    assert named == [
        (FILES[0], FILES[1]),
        (FILES[0], FILES[2]),
        (FILES[1], FILES[0]),
        (FILES[2], FILES[3]),
    ]
    assert lfw.genuine.tolist() == [True, False, True, False] and lfw.folds.tolist() == [0, 0, 1, 1]
    assert lfw.people_in_no_pair() == ("Dee",)
    half = LFW(people, path, folds=[1])
    assert half.keys == FILES[:4] and half.folds.tolist() == [1, 1]
    assert lfw.of_folds([1]).pairs == half.pairs and lfw.of_folds([1]).keys == half.keys
    assert half.people_in_no_pair() == ("Dee",)  # people of folds that are left out are still in a pair
    with pytest.raises(ValueError, match=r"folds: expected some of \[0, 1\], got \[2\]"):
        LFW(people, path, folds=[2])
    path.write_text(PAIRS.replace("Cid\t1", "Cid\t9"))
    with pytest.raises(ValueError, match=r"1 pictures are not in .*: Cid_0009"):
        LFW(people, path)


@pytest.mark.real_data
def test_the_real_protocol(shared_data: Path) -> None:
    lfw = LFW(shared_data / "lfw112.zip", shared_data / "pairs.txt")
    assert len(lfw.pairs) == 4800 and len(lfw.pictures) == 10562 and len(lfw.pictures.people) == 4859
    assert np.bincount(lfw.folds).tolist() == [600] * 8 and lfw.genuine.sum() == 2400
    people = {}
    for pair in lfw.pairs:
        for person in (pair.person_a, pair.person_b):
            assert people.setdefault(person, pair.fold) == pair.fold
    assert lfw.pictures.read(lfw.keys[0]).shape == (112, 112, 3)
