"""Lists of pairs in every format, and files that are wrong or mean harm."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xcos_ext.evaluation.datasets import CFP, LFW, CSVPairs, InsightfaceBin, PairList, insightface, open_pairs
from xcos_ext.evaluation.datasets.pairs import made_folds
from xcos_ext.explain.pairs_file import pictures_below
from xcos_ext.faces import PersonFolder, PictureTree
from xcos_ext.io.errors import PictureError

Image = pytest.importorskip("PIL.Image")


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (index, 2 * index, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def named(pairs: PairList) -> list[tuple[str, str]]:
    return [(pairs.keys[a], pairs.keys[b]) for a, b in zip(pairs.first, pairs.second, strict=True)]


def test_folds_are_dealt_out_by_kind() -> None:
    genuine = np.repeat([True, False], [25, 40])
    folds = made_folds(genuine)
    assert np.unique(folds).size == 10
    for kind in (genuine, ~genuine):
        counts = np.bincount(folds[kind])
        assert counts.min() >= counts.max() - 1
    assert np.unique(made_folds(np.array([True, True, False, False, False]))).tolist() == [0, 1]
    assert made_folds(np.array([True, False])).tolist() == [0, 0]


def test_some_folds_of_a_list(people: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(CSV)
    whole = open_pairs(tmp_path / "pairs.csv", people)
    part = whole.of_folds([4])
    assert isinstance(part, CSVPairs) and named(part) == named(whole)[2:] and part.folds.tolist() == [4, 4]
    assert part.genuine.tolist() == [True, False] and part.people == ("p1", "p1", "p2") and part.own_folds
    assert len(whole) == 4 and part.read("p1/2.png")[0, 0].tolist() == [12, 24, 7]
    for wrong in ([5], []):
        with pytest.raises(ValueError, match=r"folds: expected some of \[3, 4\], got"):
            whole.of_folds(wrong)


# --- pictures by path


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_picture_tree(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "photos"
    for i, name in enumerate(("a/1.png", "a/2.png", "b/c/1.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))
    (root / "notes.txt").write_text("x")
    (tmp_path / "outside.png").write_bytes(png(9))
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for file in root.rglob("*.png"):
                archive.write(file, f"top/{file.relative_to(root)}")
        root = tmp_path / "photos.zip"
    tree = PictureTree(root)
    assert len(tree.names) == 3
    found = tree.find("b/c/1.png")
    assert found is not None and tree.read(found)[0, 0].tolist() == [2, 4, 7]
    assert tree.find("./a/1.png") == tree.find("a\\1.png") == tree.find("a/1.png") is not None
    for wrong in ("a/3.png", "../outside.png", "", str(tmp_path / "outside.png")):
        assert tree.find(wrong) is None
    if kind == "folder":  # whoever names a file means it
        with pytest.raises(PictureError, match=r"notes.txt: not a picture, or of an unknown kind"):
            tree.read(tree.find("notes.txt") or "")
    with pytest.raises(KeyError):
        tree.read("../outside.png")


def test_links_are_followed_and_circles_told(tmp_path: Path) -> None:
    (tmp_path / "disk" / "ann").mkdir(parents=True)
    (tmp_path / "disk" / "ann" / "1.png").write_bytes(png(1))
    root = tmp_path / "root"
    root.mkdir()
    (root / "Data").symlink_to(tmp_path / "disk")
    (root / "bob.png").symlink_to(tmp_path / "disk" / "ann" / "1.png")
    (tmp_path / "disk" / "ann" / "back").symlink_to(tmp_path / "disk")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    tree = PictureTree(root)
    assert tree.names == ("Data/ann/1.png", "bob.png", "gone.png", "self.png")
    assert tree.left_out == {"Data/ann/back": "a link to a folder that it lies in"}
    assert tree.read("Data/ann/1.png")[0, 0].tolist() == tree.read("bob.png")[0, 0].tolist() == [1, 2, 7]
    with pytest.raises(PictureError, match=r"root/gone\.png: the link points to no file"):
        tree.read("gone.png")
    with pytest.raises(PictureError, match=r"root/self\.png: cannot be opened"):
        tree.read("self.png")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_is_no_picture_is_told(tmp_path: Path, kind: str) -> None:
    names = ("ann/1.TIFF", "ann/2.gif", "ann/3.jp2", "ann/4.jfif", "ann/5.heic", "film.mp4", "read.me")
    hidden = (".DS_Store", "ann/._1.tiff", "ann/Thumbs.db", "ann/desktop.ini", "__MACOSX/ann/._2.gif", ".git/config")
    root = tmp_path / "root"
    for name in (*names, *hidden):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if kind == "zip":
        root = tmp_path / "root.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for name in (*names, *hidden):
                archive.writestr(name, b"")
    tree = PictureTree(root)
    assert tree.names == names[:4]
    assert list(tree.left_out) == list(names[4:])
    assert tree.left_out["film.mp4"].startswith("not a picture by its suffix; expected JPEG, PNG")


@pytest.mark.parametrize("kind", ["folder", "zip", "macOS"])
def test_names_are_composed(tmp_path: Path, kind: str) -> None:
    """A name is one name, as macOS takes it apart and as others write it. Its archives do not say that it is UTF-8."""
    apart, whole = "Zoe\u0308", "Zo\xeb"
    root = tmp_path / "root.zip"
    if kind == "folder":
        root = tmp_path / "root"
        (root / apart).mkdir(parents=True)
        (root / whole).mkdir()
        (root / apart / f"{apart}_0001.png").write_bytes(png(1))
        (root / whole / f"{whole}_0002.png").write_bytes(png(2))
    else:
        with zipfile.ZipFile(root, "w") as archive:
            archive.writestr(f"{apart}/{apart}_0001.png", png(1))
            archive.writestr(f"{whole}/{whole}_0002.png", png(2))
        if kind == "macOS":
            data = bytearray(root.read_bytes())
            for sign, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
                place = data.find(sign)
                while place >= 0:
                    data[place + flags + 1] &= ~0x08
                    place = data.find(sign, place + 4)
            root.write_bytes(data)
    people = PersonFolder(root)
    assert people.people == (whole,) and people.keys == tuple(f"{whole}/{whole}_000{i}.png" for i in (1, 2))
    tree = PictureTree(root)
    for name in (apart, whole):
        assert people.numbered(name, 1) == people.keys[0]
        found = tree.find(f"{name}/{name}_0001.png")
        assert found is not None and tree.read(found)[0, 0].tolist() == [1, 2, 7]
        assert pictures_below(root)(f"{name}/{name}_0001.png")[0, 0].tolist() == [1, 2, 7]
    pairs = tmp_path / "pairs.txt"
    pairs.write_text(f"1 1\n{apart} 1 2\n{apart} 1 {whole} 2\n", encoding="utf-8")
    assert LFW(root, pairs).people_in_no_pair() == ()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_two_files_of_one_name(tmp_path: Path, kind: str) -> None:
    names = ["Zoe\u0308/1.png", "Zo\xeb/1.png"]
    root = tmp_path / "root"
    for name in names:
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(png(1))
    if kind == "zip":
        root = tmp_path / "root.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for name in names:
                archive.writestr(name, png(1))
    with pytest.raises(ValueError, match=r"expected each name once, got 'Zoe\\u0308/1.png' and 'Zo\\xeb/1.png'"):
        PictureTree(root)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_broken_entries(tmp_path: Path, method: int) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("ann/1.png", os.urandom(2000))
    data = bytearray(path.read_bytes())
    for place in (0, 27, 45, 60, 500):
        broken = data.copy()
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        with pytest.raises(PictureError, match=r"^\S+x\.zip: ann/1\.png: ") as caught:
            PictureTree(path).read("ann/1.png")
        assert " object at 0x" not in str(caught.value) and "\n" not in str(caught.value)
    central = data.index(b"PK\1\2")
    nameless = data.copy()
    nameless[central + 46] = 0  # zipfile ends a name there, and asks for its last letter
    path.write_bytes(nameless)
    with pytest.raises(ValueError, match=r"x\.zip: damaged zip archive \("):
        PictureTree(path)
    data[central] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.zip: damaged zip archive \(Bad magic number for central directory\)"):
        PictureTree(path)


# --- CSV


@pytest.fixture
def people(tmp_path: Path) -> Path:
    for i in range(4):
        for k in (1, 2):
            (tmp_path / "crops" / f"p{i}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "crops" / f"p{i}" / f"{k}.png").write_bytes(png(10 * i + k))
    return tmp_path / "crops"


CSV = (
    "a,b,genuine,fold\np0/1.png,p0/2.png,1,3\np0/1.png,p1/1.png,0,3\np1/1.png,p1/2.png,true,4\np2/1.png,p1/1.png,No,4\n"
)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        lambda t: "\ufeff" + t,
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t.replace("genuine", " Same "),
        lambda t: "\ufeff" + t.replace(",", ";").replace("\n", "\r\n"),  # as spreadsheets do in half of Europe
        lambda t: t.replace(",", " , "),
        lambda t: re.sub(r",(\d)\b(?!\.)", r",\1.0", t),  # as programs write whole numbers beside empty cells
    ],
)
def test_csv(people: Path, tmp_path: Path, change: Callable[[str], str]) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(change(CSV), encoding="utf-8")
    pairs = open_pairs(path, people)
    assert isinstance(pairs, CSVPairs) and pairs.format == "csv" and len(pairs) == 4
    assert named(pairs)[0] == ("p0/1.png", "p0/2.png") and named(pairs)[3] == ("p2/1.png", "p1/1.png")
    assert pairs.genuine.tolist() == [True, False, True, False]
    assert pairs.folds.tolist() == [3, 3, 4, 4] and pairs.own_folds
    assert pairs.people == ("p0", "p0", "p1", "p1", "p2")
    assert pairs.read("p1/2.png")[0, 0].tolist() == [12, 24, 7]


def test_csv_without_folds_and_people(people: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("extra,b,a,genuine\nx,p0/1.png,p1/1.png,1\nx,p0/2.png,p1/1.png,0\n")
    pairs = open_pairs(path, people)
    assert pairs.people is None  # the first pair says that folders are not people
    assert not pairs.own_folds and pairs.folds.tolist() == [0, 0]
    assert named(pairs)[0] == ("p1/1.png", "p0/1.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected a header with the columns a and b, .*got nothing"),
        ("a,b\np0/1.png,p0/2.png\n", "line 2: expected 1 or 0 in a column called genuine, got nothing"),
        ("a,b,genuine\n", "no pairs in it"),
        ("a,b,genuine\np0/1.png,p0/2.png,maybe\n", "line 2: genuine: expected 1, 0 or nothing, got 'maybe'"),
        ("a,b,genuine\np0/1.png,p0/2.png\n", "line 2: expected 3 columns as in the header, got 2"),
        ("a,b,genuine\np0/1.png,p0/2.png,\n", "line 2: expected 1 or 0 in a column called genuine, got nothing"),
        ("a,b,genuine\n,p0/2.png,1\n", "line 2: expected two pictures"),
        (CSV.replace(",4\n", ",four\n"), "line 4: fold: expected an integer, got 'four'"),
        (CSV.replace("p2/1", "../p2/1"), "1 pictures are not in .*crops: ../p2/1.png"),
        ("a,b,genuine\n\x00,p0/1.png,1\n", "are not in|not CSV"),
    ],
)
def test_bad_csv(people: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path}.*{message}"):
        open_pairs(path, people, format="csv")
    path.write_bytes(b"a,b,genuine\n\xff\xfe,1,1\n")
    with pytest.raises(ValueError, match="expected text in UTF-8"):
        open_pairs(path, people)


# --- CFP


@pytest.fixture
def cfp(tmp_path: Path) -> Path:
    root = tmp_path / "cfp"
    protocol = root / "Protocol"
    lines: dict[str, list[str]] = {"F": [], "P": []}
    for person in (1, 2):
        for kind, letter in (("frontal", "F"), ("profile", "P")):
            for k in (1, 2):
                path = f"Data/Images/{person:03d}/{kind}/{k:02d}.png"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(png(len(lines[letter]) + 100 * (letter == "P")))
                lines[letter].append(f"{len(lines[letter]) + 1} ../{path}")
    for letter, content in lines.items():
        protocol.mkdir(exist_ok=True)
        (protocol / f"Pair_list_{letter}.txt").write_text("\r\n".join(content) + "\r\n")
    for split in ("FF", "FP"):
        for fold in ("01", "02"):
            folder = protocol / "Split" / split / fold
            folder.mkdir(parents=True)
            (folder / "same.txt").write_text("1,2\n3,4\n")
            (folder / "diff.txt").write_text("1,3\n")
    return root


def test_cfp(cfp: Path) -> None:
    frontal = open_pairs(cfp / "Protocol/Split/FF", cfp)
    assert isinstance(frontal, CFP) and frontal.genuine.tolist() == [True, True, False] * 2
    assert frontal.folds.tolist() == [0, 0, 0, 1, 1, 1] and frontal.own_folds
    assert named(frontal)[0] == ("Data/Images/001/frontal/01.png", "Data/Images/001/frontal/02.png")
    profile = open_pairs(cfp / "Protocol/Split/FP", cfp)
    assert named(profile)[2] == ("Data/Images/001/frontal/01.png", "Data/Images/002/profile/01.png")
    assert profile.people is not None and set(profile.people) == {"001", "002"}
    assert profile.read(profile.keys[profile.second[0]])[0, 0, 0] == 101


def lower_case(root: Path) -> tuple[Path, Path]:
    for letter in "FP":
        os.rename(root / f"Protocol/Pair_list_{letter}.txt", root / f"Protocol/pair_list_{letter.lower()}.TXT")
    for file in root.glob("Protocol/Split/*/*/*.txt"):
        os.rename(file, file.with_name(file.name.capitalize()))
    return root / "Protocol/Split", root


def image_lists(root: Path) -> tuple[Path, Path]:
    """The lists beside the splits, written on Windows."""
    for letter in "FP":
        text = (root / f"Protocol/Pair_list_{letter}.txt").read_text().replace("/", "\\").replace(" ", "\t")
        (root / f"Protocol/Split/image_list_{letter}.txt").write_text("\ufeff" + text, encoding="utf-8")
        (root / f"Protocol/Pair_list_{letter}.txt").unlink()
    return root / "Protocol/Split", root


def crops_elsewhere(root: Path) -> tuple[Path, Path]:
    """Aligned crops of another format, without the folders above the people."""
    for file in [*root.rglob("*.png")]:
        new = root / "crops" / Path(*file.parts[-3:]).with_suffix(".bmp")
        new.parent.mkdir(parents=True, exist_ok=True)
        os.rename(file, new)
    return root / "Protocol/Split", root / "crops"


def two_of_ten_folds(root: Path) -> tuple[Path, Path]:
    for split in ("FF", "FP"):
        os.rename(root / f"Protocol/Split/{split}/01", root / f"Protocol/Split/{split}/9")
        os.rename(root / f"Protocol/Split/{split}/02", root / f"Protocol/Split/{split}/10")
        (root / f"Protocol/Split/{split}/.ipynb_checkpoints").mkdir()
    return root / "Protocol/Split", root


@pytest.mark.parametrize("change", [lower_case, image_lists, crops_elsewhere, two_of_ten_folds])
def test_cfp_as_people_have_it(cfp: Path, change: Callable[[Path], tuple[Path, Path]]) -> None:
    expected = [open_pairs(cfp / "Protocol/Split" / kind, cfp) for kind in ("FF", "FP")]
    splits, root = change(cfp)
    for kind, before in zip(("FF", "FP"), expected, strict=True):
        pairs = open_pairs(splits / kind, root)
        assert [Path(key).parts[-3:-1] for key in pairs.keys] == [Path(key).parts[-3:-1] for key in before.keys]
        assert pairs.genuine.tolist() == before.genuine.tolist() and pairs.people == before.people
        for name in ("first", "second"):
            assert getattr(pairs, name).tolist() == getattr(before, name).tolist()
        assert pairs.fold_numbers() == ({9: 8, 10: 9} if change is two_of_ten_folds else {1: 0, 2: 1})


def test_bad_cfp(cfp: Path, tmp_path: Path) -> None:
    split = cfp / "Protocol/Split/FF"
    with pytest.raises(ValueError, match=r"expected CFP's folder Split/FF or Split/FP"):
        open_pairs(cfp / "Protocol", cfp)
    (split / "02/diff.txt").write_text("1,3\n1,99\n")
    with pytest.raises(ValueError, match=r"diff.txt, line 2: expected two numbers of the pair lists, got '1,99'"):
        open_pairs(split, cfp)
    (split / "02/diff.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"diff.txt"):
        open_pairs(split, cfp)
    (cfp / "Data/Images/002/frontal/02.png").unlink()
    with pytest.raises(ValueError, match=r"1 pictures are not in .*: Data/Images/002/frontal/02.png"):
        open_pairs(split, cfp)
    (cfp / "Protocol/Pair_list_F.txt").write_text("one ../x.png\n")
    with pytest.raises(ValueError, match=r"Pair_list_F.txt, line 1: expected 'number path'"):
        open_pairs(split, cfp)
    (cfp / "Protocol/Pair_list_F.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"Protocol: expected CFP's Pair_list_F.txt or image_list_F.txt in it"):
        open_pairs(split, cfp)


# --- insightface .bin

LABELS = [True, False, True]
PICTURES = [png(i) for i in range(6)]


def two(labels: list[bool]) -> bytes:
    """As Python 2 wrote it: protocol 2, pictures as its `str`."""
    parts = [b"\x80\x02]("]
    for picture in PICTURES:
        parts.append(b"T" + len(picture).to_bytes(4, "little") + picture)
    parts.append(b"e](")
    parts += [b"\x88" if label else b"\x89" for label in labels]
    return b"".join([*parts, b"e\x86."])


WRITTEN: dict[str, Callable[[], bytes]] = {
    "python2": lambda: two(LABELS),
    **{f"protocol{p}": (lambda p=p: pickle.dumps((PICTURES, LABELS), protocol=p)) for p in range(6)},
    "numpy-bytes": lambda: pickle.dumps(([np.frombuffer(p, np.uint8) for p in PICTURES], LABELS)),
    "numpy-bytes-2": lambda: pickle.dumps(([np.frombuffer(p, np.uint8) for p in PICTURES], LABELS), protocol=2),
    "numpy-bytes-5": lambda: pickle.dumps(([np.frombuffer(p, np.uint8).copy() for p in PICTURES], LABELS), protocol=5),
    "numpy-labels": lambda: pickle.dumps((PICTURES, np.array(LABELS))),
    "numpy-scalars": lambda: pickle.dumps((PICTURES, list(np.array(LABELS)))),
    "old-numpy": lambda: pickle.dumps((PICTURES, np.array(LABELS)), protocol=2).replace(b"numpy._core", b"numpy.core"),
    "list": lambda: pickle.dumps([PICTURES, tuple(LABELS)]),
}  # fmt: skip


@pytest.mark.parametrize("how", WRITTEN)
def test_insightface_bin(tmp_path: Path, how: str) -> None:
    path = tmp_path / "lfw.bin"
    path.write_bytes(WRITTEN[how]())
    pairs = open_pairs(path)
    assert isinstance(pairs, InsightfaceBin) and pairs.aligned and pairs.people is None
    assert pairs.genuine.tolist() == LABELS
    assert [pairs.read(key)[0, 0, 0] for key in pairs.keys] == list(range(6))
    assert named(pairs)[1] == ("000002", "000003")


def test_folds_of_insightface_are_consecutive_tenths(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps(([b"x"] * 100, [True, False] * 25)))
    pairs = open_pairs(path)
    assert pairs.folds.tolist() == [i // 5 for i in range(50)]
    with pytest.raises(PictureError, match=r"x.bin: picture 0: not a picture"):
        pairs.read(pairs.keys[0])


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("where", ["whole", "picture", "label", "after", "key"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, where: str, protocol: int) -> None:
    harm = Harm(tmp_path / "harm")
    contents: Any = {
        "whole": harm,
        "picture": ([*PICTURES[:-1], harm], LABELS),
        "label": (PICTURES, [True, harm, True]),
        "after": (PICTURES, LABELS, harm),
        "key": ({harm: 1}, LABELS),
    }[where]
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps(contents, protocol=protocol))
    with pytest.raises(ValueError, match=r"evil.bin: refused, because the pickle could run code.*mkdir"):
        open_pairs(path, format="bin")
    assert not (tmp_path / "harm").exists()
    # The payload is real: an ordinary reader would have run it.
    pickle.loads(path.read_bytes())
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\ngetattr\n.",
        b"\x80\x02cnumpy\nload\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.ctypes\x93.",
        b"Pid\n.",
        b"\x80\x02\x82\x01.",
        b"(ios\nsystem\n(S'true'\no.",
        b"(S'true'\nios\nsystem\n.",
    ],
)
def test_other_ways_to_name_things_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "evil.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"refused|damaged"):
        open_pairs(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ((PICTURES, LABELS[:2]), "expected two pictures a label, got 6 for 2 labels"),
        (([], []), "expected two pictures a label, got 0"),
        ((PICTURES,), "expected .list of pictures, list of booleans"),
        (({"a": 1}, LABELS), "expected two lists"),
        ((["text"] * 6, LABELS), "a picture: expected its bytes, got str"),
        (([b""] * 6, LABELS), "a picture: expected its bytes"),
        ((PICTURES, [1, 2, 3]), "a label: expected True or False, got int"),
        ((PICTURES, np.array([1.0, 0, 1])), "an array of 'f8'"),
        (([np.zeros(9, np.float32)] * 6, LABELS), "an array of 'f4'"),
        (3, "expected .list of pictures"),
    ],
)
def test_bin_files_of_another_structure(tmp_path: Path, contents: Any, message: str) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps(contents))
    with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
        open_pairs(path)


def test_truncated_and_oversized_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    whole = pickle.dumps((PICTURES, LABELS))
    for keep in [*range(0, 40), *range(40, len(whole), 37)]:
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=str(path)):
            open_pairs(path)
    rng = np.random.default_rng(0)
    for _ in range(100):  # whatever a flipped byte does, it is one clear error or a file that reads
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            assert isinstance(open_pairs(path, format="bin"), InsightfaceBin)
        except ValueError as error:
            assert str(path) in str(error)
    # Lengths and memo positions that would take the machine's memory.
    for bomb in (b"\x80\x04\x8e" + (1 << 50).to_bytes(8, "little") + b"x.", b"\x80\x02Nr\xff\xff\xff\x7f."):
        path.write_bytes(bomb)
        with pytest.raises(ValueError, match="damaged, truncated"):
            open_pairs(path)
    monkeypatch.setattr(insightface, "MAX_BYTES", 100)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"x.bin: too large: [\d,]+ bytes, at most 100 are accepted"):
        open_pairs(path)


# --- one door


def test_open_pairs(people: Path, tmp_path: Path) -> None:
    (people / "Ann").mkdir()
    for k in (1, 2):
        (people / "Ann" / f"Ann_000{k}.png").write_bytes(png(k))
    (people / "Bob").mkdir()
    (people / "Bob" / "Bob_0001.png").write_bytes(png(5))
    path = tmp_path / "list"
    path.write_text("1\t1\nAnn\t1\t2\nAnn\t1\tBob\t1\n")
    lfw = open_pairs(path, people)
    assert isinstance(lfw, LFW) and lfw.people == ("Ann", "Ann", "Bob")
    path.write_bytes(pickle.dumps((PICTURES, LABELS)))
    assert isinstance(open_pairs(path), InsightfaceBin)  # told from its first bytes
    with pytest.raises(ValueError, match="format: expected one of lfw, cfp, bin, csv, got 'xml'"):
        open_pairs(path, format="xml")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_pairs(tmp_path / "none")
    path.write_text(CSV)
    with pytest.raises(ValueError, match=r"root: expected the folder or .* that .* names, got none"):
        open_pairs(path)
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        open_pairs(people, people, format="csv")
    os.mkfifo(tmp_path / "pipe")
    for kind in (None, "lfw", "cfp", "bin"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"pipe: "):
            open_pairs(tmp_path / "pipe", people, format=kind)
    with pytest.raises(ValueError, match=r"pipe: expected a folder or a zip archive"):
        open_pairs(path, tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="no such folder or archive"):
        open_pairs(path, tmp_path / "none")
