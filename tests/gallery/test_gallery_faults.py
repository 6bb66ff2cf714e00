"""Galleries killed, filled up, flipped, truncated, locked and misused.

200 kills: tests/support/gallery_faults_driver.py.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gallery_faults_driver import Faults
from template_samples import attention

from xcos_ext.gallery import Gallery
from xcos_ext.gallery.locks import ReaderLock, wait_for_readers
from xcos_ext.gallery.snapshot import Snapshot
from xcos_ext.io.errors import GalleryBusyError, GalleryDamagedError, GalleryError
from xcos_ext.ops import xcos_topk
from xcos_ext.ops.templates import Templates

lance = pytest.importorskip("lance", reason="needs the extra gallery (pylance)")

pytestmark = pytest.mark.usefixtures("one_thread")

# For processes of their own, which take names of this module.
PATHS = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "support")]
PRELUDE = f"import sys, torch; torch.set_num_threads(1); sys.path[:0] = {PATHS!r}\nfrom test_gallery_faults import *\n"


def faces(count: int, seed: int = 0, role: str = "gallery") -> Templates:
    """Templates of one head: [count], 7 x 7 cells of 8 channels, fp16."""
    torch.manual_seed(1)
    head = attention("softmax", 8, 4).float().eval()
    with torch.no_grad():
        features = torch.randn(count, 8, 7, 7, generator=torch.Generator().manual_seed(seed))
        return head.templates(features, role, torch.float16)


def names(count: int, start: int = 0) -> list[str]:
    """Ids that are long enough to be found in files."""
    return [f"identity-{i:05d}" for i in range(start, start + count)]


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    """Two hundred faces in two commits."""
    stored = faces(200)
    with Gallery.create(tmp_path / "g", stored) as made:
        for start in (0, 100):
            made.add(
                names(100, start),
                stored[start : start + 100],
                persons=[f"somebody-{i:05d}" for i in range(start, start + 100)],
                metadata=[{"note": f"metadata-{i:05d}"} for i in range(start, start + 100)],
            )
        yield made


def expect(gallery: Gallery, kept: Templates) -> None:
    """The gallery finds exactly what is found among these faces in memory."""
    probes = faces(4, 9, "probe")
    hits, wanted = gallery.search(probes, 6), xcos_topk(probes, kept, 6)
    assert torch.equal(hits.scores, wanted.values) and torch.equal(hits.positions, wanted.indices)


def reads(gallery: Gallery, kept: Templates, **options: Any) -> None:
    """The same of another reader."""
    with Gallery.open(gallery.path, **options) as other:
        expect(other, kept)


def another_bit(data: bytes, rng: torch.Generator, at: int | None = None) -> bytes:
    """Data with one bit flipped, anywhere or in a chosen byte."""
    changed = bytearray(data)
    at = int(torch.randint(len(data), (1,), generator=rng)) if at is None else at
    changed[at] ^= 1 << int(torch.randint(8, (1,), generator=rng))
    return bytes(changed)


def data_file(gallery: Gallery, fragment: int = 0) -> Path:
    """The file of a fragment's rows."""
    return gallery.path / "templates.lance" / "data" / gallery.snapshot.fragments[fragment].paths[0]


def flip(path: Path, needle: bytes, offset: int = 3, mask: int = 1) -> None:
    """Change a bit behind the place where these bytes are in a file."""
    data = bytearray(path.read_bytes())
    at = data.find(needle)
    assert at >= 0, f"{needle!r} is not in {path.name}"
    data[at + offset] ^= mask
    path.write_bytes(data)


# ------------------------------------------------------------------ killed


@pytest.mark.process
def test_some_kills(tmp_path: Path) -> None:
    """A short form of the script's 200."""
    faults = Faults(tmp_path, seed=3)
    try:
        faults.all(15)
    finally:
        faults.children.close()
    assert faults.failures == [] and sum(faults.kills.values()) == 15


# ------------------------------------------------------------------ disk


def in_a_mount(tmp_path: Path, mount: str, code: str) -> str:
    """Run code in a mount namespace of its own; skip where that is not allowed."""
    script = tmp_path / "code.py"
    script.write_text(PRELUDE + textwrap.dedent(code))
    (tmp_path / "mount").mkdir(exist_ok=True)
    for options in (["-m"], ["-rm"]):
        inside = ["unshare", *options, "sh", "-c", f"{mount} && exec {sys.executable} {script}"]
        if subprocess.run(["unshare", *options, "sh", "-c", mount], capture_output=True).returncode == 0:
            done = subprocess.run(inside, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout
    pytest.skip("needs to mount a small file system, which is not allowed here")


@pytest.mark.process
def test_full_disk(tmp_path: Path) -> None:
    out = in_a_mount(
        tmp_path,
        f"mount -t tmpfs -o size=1m none {tmp_path}/mount",
        """
        from pathlib import Path
        stored = faces(1500)
        gallery = Gallery.create("mount/g", stored)
        count = 0
        while True:
            try:
                gallery.add(names(100, count), stored[count:count + 100])
                count += 100
            except GalleryError as error:
                print(error)
                break
        assert 0 < count < 1500 and len(gallery) == count
        assert sorted(gallery.ids()) == names(count)
        for _ in range(2):
            expect(gallery, stored[:count])     # there may be no room for tiles
        gallery.close()
        gallery = Gallery.open("mount/g")
        assert gallery.verify()["ok"] and len(gallery) == count
        import shutil
        shutil.rmtree("mount/g/tiles", ignore_errors=True)
        assert not list(Path("mount/g").rglob("*.tmp"))
        gallery.remove(names(count))
        gallery.compact()
        gallery.add(names(100), stored[:100])
        expect(gallery, stored[:100])
        print("fine")
        """,
    )
    assert "cannot be written (No space left on device); nothing was changed" in out and out.endswith("fine\n")


@pytest.mark.process
def test_read_only_folder(tmp_path: Path, gallery: Gallery) -> None:
    gallery.close()
    out = in_a_mount(
        tmp_path,
        f"mount --bind {tmp_path}/g {tmp_path}/mount && mount -o remount,bind,ro {tmp_path}/mount",
        """
        from pathlib import Path
        stored = faces(200)
        gallery = Gallery.open("mount")
        for _ in range(2):
            expect(gallery, stored)
        assert gallery.verify()["ok"] and gallery.info()["faces"] == 200
        for change in (
            lambda: gallery.add(["x"], stored[:1]),
            lambda: gallery.remove(names(1)),
            lambda: gallery.compact(),
            lambda: Gallery.create("mount/sub", stored),
        ):
            try:
                change()
                raise SystemExit("changed a read-only folder")
            except GalleryError as error:
                assert "cannot be written" in str(error), error
        with Gallery.open("mount", cache="elsewhere") as other:
            expect(other, stored)
        assert list(Path("elsewhere").iterdir()) and not Path("mount/tiles").exists()
        print("fine")
        """,
    )
    assert out.endswith("fine\n")


# ------------------------------------------------------------------ flipped bits


@pytest.mark.parametrize("column", ["features", "norms", "projection", "bias"])
def test_flipped_bits_of_templates(gallery: Gallery, column: str) -> None:
    stored = faces(200)
    expect(gallery, stored)  # packs the tiles
    needle = getattr(stored, column)[137].contiguous().view(torch.uint8).numpy().tobytes()[:24]
    flip(data_file(gallery, 1), needle)
    expect(gallery, stored)  # tiles are as they were written
    report = gallery.verify()
    assert not report["ok"] and report["damaged"] == [
        {"position": 137, "id": "identity-00137", "damaged": ["template"]}
    ]
    with (
        Gallery.open(gallery.path, cache=False) as other,
        pytest.raises(GalleryDamagedError, match="positions 137 ") as caught,
    ):
        other.search(faces(4, 9, "probe"), 6)
    assert caught.value.rows == (137,)
    with Gallery.open(gallery.path, cache=False) as other, pytest.raises(GalleryDamagedError, match="137"):
        other.get(names(1, 137))
    gallery.remove(names(1, 137))  # what is damaged can be removed, and the rest is found
    reads(gallery, stored[[i for i in range(200) if i != 137]], cache=False)


@pytest.mark.parametrize("text", ["identity-00042", "somebody-00042", "metadata-00042"])
def test_flipped_bits_of_labels(gallery: Gallery, text: str) -> None:
    flip(data_file(gallery), text.encode(), len(text) - 1)
    report = gallery.refresh().verify()
    assert not report["ok"]
    assert [(row["position"], row["damaged"]) for row in report["damaged"]] == [(42, ["labels"])]
    with pytest.raises(GalleryDamagedError, match="labels at positions 42 "):  # as every hit's are read
        gallery.snapshot.labels(np.array([42]))


def test_flipped_bits_of_tiles(gallery: Gallery) -> None:
    stored = faces(200)
    for position, column in ((3, "features"), (150, "bias")):
        expect(gallery, stored)
        needle = getattr(stored, column)[position].contiguous().view(torch.uint8).numpy().tobytes()[:24]
        key = gallery.snapshot.fragments[position // 100].key
        tiles = gallery.path / "tiles" / f"{key}.arrow"
        flip(tiles, needle)
        damaged = tiles.read_bytes()
        reads(gallery, stored)  # this process has not seen them yet: it notices, and makes them again
        assert tiles.read_bytes() != damaged
        flip(tiles, needle)
        assert f"{key}.arrow" in gallery.verify()["tiles_dropped"]
        with Gallery.open(gallery.path) as other:
            expect(other, stored)
            assert other.verify() == {"ok": True, "faces": 200, "damaged": [], "unreadable": [], "tiles_dropped": []}


def test_random_flips_are_never_a_wrong_score(gallery: Gallery) -> None:
    stored, rng = faces(200), torch.Generator().manual_seed(7)
    paths = [data_file(gallery, 0), data_file(gallery, 1)]
    paths += sorted((gallery.path / "templates.lance" / "_versions").glob("*.manifest"))[:1]
    outcomes = set()
    for path in paths:
        whole = path.read_bytes()
        for _ in range(12):
            path.write_bytes(another_bit(whole, rng))
            try:
                with Gallery.open(gallery.path, cache=False) as other:
                    expect(other, stored)
                    outcomes.add("right")
            except (GalleryDamagedError, GalleryError) as error:
                outcomes.add("refused")
                assert str(error)
        path.write_bytes(whole)
    expect(gallery, stored)
    assert "refused" in outcomes


def test_truncated_files(gallery: Gallery) -> None:
    stored = faces(200)
    expect(gallery, stored)
    tiles = next((gallery.path / "tiles").iterdir())
    tiles.write_bytes(tiles.read_bytes()[:-1000])
    reads(gallery, stored)
    path = data_file(gallery, 1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = Gallery.open(gallery.path).verify()
    assert not report["ok"] and len(report["unreadable"]) == 1
    assert report["unreadable"][0]["positions"] == list(range(100, 200))
    with (
        Gallery.open(gallery.path, cache=False) as other,
        pytest.raises(GalleryDamagedError, match="positions 100-199"),
    ):
        other.search(faces(4, 9, "probe"), 6)
    path.unlink()
    with Gallery.open(gallery.path, cache=False) as other, pytest.raises(GalleryDamagedError, match="100-199"):
        other.search(faces(4, 9, "probe"), 6)


# ------------------------------------------------------------------ several at a time


WRITER = """
stored = faces(200)
gallery = Gallery.open({path!r}, timeout=60)
for i in range(8):
    gallery.add([f"{{sys.argv[1]}}-{{i}}-{{j}}" for j in range(5)] + [f"both-{{i}}"], stored[:6], on_duplicate="skip")
"""


@pytest.mark.process
def test_two_processes_write(gallery: Gallery) -> None:
    code = PRELUDE + WRITER.format(path=str(gallery.path))
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b")]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    ids = list(gallery.refresh().ids())
    assert len(ids) == len(set(ids)) == 200 + 2 * 8 * 5 + 8
    assert gallery.verify()["ok"]


def test_a_writer_that_does_not_finish(gallery: Gallery) -> None:
    stored = faces(1)
    with Gallery.open(gallery.path, timeout=0.2) as other:
        with gallery._store.writer(1.0):
            for change in (
                lambda: other.add(["x"], stored),
                lambda: other.remove(names(1)),
                lambda: other.compact(),
            ):
                with pytest.raises(GalleryBusyError, match=f"process {os.getpid()} on .* is writing"):
                    change()
        assert other.add(["x"], stored) == 1


def test_compaction_waits_for_readers(gallery: Gallery) -> None:
    stored = faces(200)
    reader = Gallery.open(gallery.path)
    gallery.remove(names(50))
    with pytest.raises(GalleryBusyError, match=rf"version {reader.version} is still being read"):
        gallery.compact(timeout=0.2)
    expect(reader, stored)  # the old version, from its files
    expect(gallery, stored[50:])
    timer = threading.Timer(0.5, reader.close)
    timer.start()
    gallery.compact(timeout=30)
    timer.join()
    expect(gallery, stored[50:])
    assert len(gallery) == 150


@pytest.mark.parametrize("indexed", [False, True])
def test_removed_faces_leave_no_trace(gallery: Gallery, indexed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xcos_ext.gallery.store._INDEXED_FROM", 1 if indexed else 1000)
    stored = faces(200)
    gallery.compact()
    assert (gallery.path / "templates.lance" / "_indices").exists() == indexed
    expect(gallery, stored)
    gone = [0, 41, 199]
    needles = [n.encode() for i in gone for n in (f"identity-{i:05d}", f"metadata-{i:05d}")]
    needles += [stored.features[i].numpy().tobytes()[:64] for i in gone]
    needles += [stored.projection[i].numpy().tobytes()[:64] for i in gone if stored.projection is not None]

    def found() -> list[bytes]:
        everything = b"\0".join(p.read_bytes() for p in gallery.path.rglob("*") if p.is_file())
        return [needle for needle in needles if needle in everything]

    assert len(found()) == len(needles)
    gallery.remove([f"identity-{i:05d}" for i in gone])
    gallery.compact()
    assert found() == []
    kept = [i for i in range(200) if i not in gone]
    expect(gallery, stored[kept])
    # Ids of the index, new ones beside it, and removed ones.
    assert gallery.add(["identity-00041", "identity-00042"], stored[:2], on_duplicate="skip") == 1
    assert gallery.positions(["identity-00042", "identity-00041", "identity-00000", "a'b"]) == {
        "identity-00042": kept.index(42),
        "identity-00041": 197,
    }
    monkeypatch.setattr("xcos_ext.gallery.store._INDEXED_FROM", 1000)
    gallery.compact()
    assert not list(gallery.path.glob("templates.lance/_indices/*/*")) and len(gallery) == 198


# ------------------------------------------------------------------ odd and wrong input


@pytest.mark.thorough
def test_odd_ids_and_large_metadata(gallery: Gallery) -> None:
    odd = [
        "a'b",
        'a"b',
        "\x00nul",
        "😀",
        "e\u0301",
        "é",
        "  ",
        "\u202ertl",
        "line\nbreak",
        "'; DROP TABLE x; --",
        "x" * 100_000,
    ]
    large = {"text": "y" * 10_000_000, "list": [1, 2.5, None, True, {"deep": ["ä"]}], "n": -(2**63), "m": 2**64 - 1}
    stored = faces(len(odd), 5)
    gallery.add(odd, stored, persons=odd, metadata=[large] * len(odd))
    for name in odd:
        assert gallery.ids_of(name) == [name]
    _, rows = gallery.get(odd)
    assert [row["id"] for row in rows] == odd and all(row["metadata"] == large for row in rows)
    hits = gallery.search(faces(3, 9, "probe"), 20, where="json_exists(metadata, '$.list')")
    assert sorted(hits.ids[0]) == sorted(odd)
    assert gallery.verify()["ok"]
    assert gallery.remove(odd) == len(odd)
    gallery.compact()
    expect(gallery, faces(200))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": [""]}, r"ids\[0\]: expected a text that is not empty"),
        ({"ids": ["\ud800"]}, r"ids\[0\]: expected text that UTF-8 can encode"),
        ({"ids": [3]}, r"ids\[0\]: expected text, got int"),
        ({"ids": ["a", "a"]}, r"ids: expected each once, got 'a' more than once"),
        ({"ids": ["a", "b"]}, r"templates: expected 2 like ids, got 1"),
        ({"ids": ["a"], "metadata": [{"x": math.nan}]}, r"metadata\[0\]: expected values that JSON can hold"),
        ({"ids": ["a"], "metadata": [{"x": {1, 2}}]}, r"metadata\[0\]: expected values that JSON can hold"),
        ({"ids": ["a"], "metadata": [{"x": 2**70}]}, r"metadata\[0\]: expected integers of at most 64 bits"),
        ({"ids": ["a"], "metadata": [{1: 2}]}, r"metadata\[0\]: expected"),
        ({"ids": ["a"], "metadata": ["text"]}, r"metadata\[0\]: expected a mapping"),
        ({"ids": ["a"], "persons": [""]}, r"persons\[0\]: expected a text that is not empty"),
        ({"ids": ["a"], "on_duplicate": "ignore"}, r"on_duplicate: expected 'error', 'skip' or 'replace'"),
    ],
)
def test_wrong_rows_change_nothing(gallery: Gallery, options: dict[str, Any], message: str) -> None:
    count = 2 if options["ids"] == ["a", "a"] else 1
    with pytest.raises(GalleryError, match=message):
        gallery.add(options.pop("ids"), faces(count), **options)
    assert len(gallery) == len(gallery.refresh()) == 200


def test_metadata_that_is_too_deep(gallery: Gallery) -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"x": deep}
    with pytest.raises(GalleryError, match=r"metadata\[0\]: expected"):
        gallery.add(["a"], faces(1), metadata=[deep])


def test_what_is_no_gallery(tmp_path: Path, gallery: Gallery) -> None:
    import pyarrow as pa

    with pytest.raises(GalleryError, match="there is no such gallery"):
        Gallery.open(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(GalleryError, match="expected a gallery, got another folder"):
        Gallery.open(tmp_path / "other")
    with pytest.raises(GalleryError, match="expected an empty folder"):
        Gallery.create(tmp_path / "other", faces(1))
    with pytest.raises(GalleryError, match="there is a gallery already"):
        Gallery.create(gallery.path, faces(1))
    (tmp_path / "file").touch()
    with pytest.raises(GalleryError, match="expected a folder"):
        Gallery.create(tmp_path / "file", faces(1))
    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "theirs" / "templates.lance"))
    with pytest.raises(GalleryError, match="expected a gallery of xcos_ext, got another Lance data set"):
        Gallery.open(tmp_path / "theirs")
    newer = gallery.layout.schema()
    about = json.loads(newer.metadata[b"xcos.gallery"])
    about["format"] = 2
    newer = newer.with_metadata({b"xcos.gallery": json.dumps(about).encode()})
    lance.write_dataset(newer.empty_table(), str(tmp_path / "newer" / "templates.lance"))
    with pytest.raises(GalleryError, match="format: expected version 1, got 2"):
        Gallery.open(tmp_path / "newer")


def test_pipes_in_place_of_log_and_tiles_are_not_waited_for(gallery: Gallery) -> None:
    expect(gallery, faces(200))
    for path in (gallery.path / "commits.log", *(gallery.path / "tiles").iterdir()):
        path.unlink()
        os.mkfifo(path)
    reads(gallery, faces(200))
    with Gallery.open(gallery.path) as other:
        other.remove(names(1))
        assert len(other) == 199


def test_creation_that_was_interrupted(tmp_path: Path) -> None:
    (tmp_path / "g" / "templates.lance").mkdir(parents=True)
    (tmp_path / "g" / "writer.lock").touch()
    assert not Gallery.exists(tmp_path / "g")
    with Gallery.create(tmp_path / "g", faces(1)) as made:
        made.add(["x"], faces(1))
    assert Gallery.exists(tmp_path / "g")


# ------------------------------------------------------------------ interrupted, cut short, left behind


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt may hit a __del__
def test_interrupts(gallery: Gallery) -> None:
    """Ctrl-C anywhere is Ctrl-C, never a report of damage, and a commit is made or not."""
    stored = faces(200)
    rng = torch.Generator().manual_seed(2)
    expected = list(gallery.ids())
    interrupted = 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(60):
            new = [f"{turn}-{i}" for i in range(40)]
            after, change = [
                (expected + new, partial(gallery.add, new, stored[:40])),
                (expected[9:], partial(gallery.remove, expected[:9])),
                (expected, gallery.compact),
                (expected, gallery.verify),
            ][turn % 4]
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.015 * float(torch.rand(1, generator=rng)))
                change()
                signal.setitimer(signal.ITIMER_REAL, 0)
                expected = after
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            found = list(gallery.refresh().ids())
            assert found in (expected, after), turn
            expected = found
    finally:
        signal.signal(signal.SIGALRM, old)
    assert interrupted > 10 and gallery.verify()["ok"]
    gallery.compact()


def manifest(gallery: Gallery) -> Path:
    """Of the newest version."""
    return sorted((gallery.path / "templates.lance" / "_versions").glob("*.manifest"))[0]


def test_a_commit_that_power_loss_cut_short(gallery: Gallery) -> None:
    gallery.close()
    stored = faces(200)
    log = gallery.path / "commits.log"
    lines = log.read_text().splitlines(keepends=True)
    newest = manifest(gallery)
    whole = newest.read_bytes()
    for damaged in (b"", whole[:-100]):
        newest.write_bytes(damaged)
        with pytest.raises(GalleryDamagedError, match=r"cannot be opened|not what was written"):  # it was reported
            Gallery.open(gallery.path)
    log.write_text("".join(lines[:-1]) + lines[-1][:-9])  # it was not: the line is not whole
    with Gallery.open(gallery.path) as other:
        assert len(other) == 100
        expect(other, stored[:100])
        other.add(names(100, 100), stored[100:])
        expect(other, stored)
    with Gallery.open(gallery.path) as other:
        assert other.verify()["ok"] and len(other) == 200
        other.compact()


def test_flipped_manifests_and_lists_of_deleted_rows(gallery: Gallery) -> None:
    stored = faces(200)
    gallery.remove(names(30))
    deleted = sorted((gallery.path / "templates.lance" / "_deletions").iterdir())[-1]
    rng = torch.Generator().manual_seed(3)
    for path in (manifest(gallery), deleted):
        whole = path.read_bytes()
        for _ in range(20):
            path.write_bytes(another_bit(whole, rng))
            with pytest.raises(GalleryDamagedError):
                Gallery.open(gallery.path)
            assert not gallery.verify()["ok"]  # which has it open
        path.write_bytes(whole)
    log = gallery.path / "commits.log"
    whole = log.read_bytes()
    for at in range(0, len(whole), 7):  # derived data: it only finds damage
        log.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with Gallery.open(gallery.path) as other:
            assert len(other) == 170
    log.unlink()
    with Gallery.open(gallery.path) as other:
        expect(other, stored[30:])
        other.add(["x"], stored[:1])


def test_bytes_that_are_no_text(gallery: Gallery) -> None:
    flip(data_file(gallery), b"identity-00042", mask=0x80)
    report = gallery.refresh().verify()
    assert not report["ok"] and len(report["unreadable"]) == 1
    assert 42 in report["unreadable"][0]["positions"] and max(report["unreadable"][0]["positions"]) < 100
    with pytest.raises(GalleryDamagedError, match="labels at positions") as caught:
        gallery.search(faces(4, 9, "probe"), 200)
    assert 42 in caught.value.rows and max(caught.value.rows) < 100
    flip(data_file(gallery, 1), b"metadata-00142", mask=0x80)  # of the metadata each row stands alone
    report = gallery.refresh().verify()
    assert report["unreadable"][1]["positions"] == [142] and "positions 142 (" in report["unreadable"][1]["reason"]
    with pytest.raises(GalleryDamagedError, match="labels at positions 142 "):
        gallery.snapshot.labels(np.arange(100, 200))
    assert report["faces"] >= 99 and gallery.snapshot.labels(np.array([141]))["id"] == ["identity-00141"]


def test_what_killed_writers_left_is_swept(gallery: Gallery) -> None:
    data, later = gallery.path / "templates.lance", 2e9
    left = [data / "data" / "x.lance", data / "data" / ".tmpX", data / "_transactions" / ".tmpX", data / "_deletions-x"]
    left += [data / "_versions" / "18446744073709551000.manifest#1", gallery.path / "tiles" / ".x.tmp"]
    expect(gallery, faces(200))
    for path in left:
        path.write_bytes(b"template of somebody who was removed")
    for path in data.rglob("*"):
        os.utime(path, (later, later))  # the clock was wrong
    gallery.compact()
    assert not any(path.exists() for path in left) and len(list(data.rglob("*.txn"))) == 1


# ------------------------------------------------------------------ tiles


def test_damaged_tiles_are_noticed_wherever_they_are_read(gallery: Gallery) -> None:
    stored, probes = faces(200), faces(4, 9, "probe")
    expect(gallery, stored)
    before = gallery.search(probes, 6, explain=True)
    assert stored.bias is not None and before.maps is not None
    needle = stored.bias[150].numpy().tobytes()[:24]
    for read in (
        lambda g: g.get(names(1, 150))[0].bias,
        lambda g: g.search(probes, 6, rerank=200).scores,
        lambda g: g.search(probes, 6, explain=True).maps.attention,
    ):
        flip(gallery.path / "tiles" / f"{gallery.snapshot.fragments[1].key}.arrow", needle)
        with Gallery.open(gallery.path) as other:
            wanted = {3: stored.bias[150:151], 2: before.scores, 4: before.maps.attention}
            found = read(other)
            torch.testing.assert_close(found, wanted[found.dim()], rtol=0, atol=0)
        reads(gallery, stored)  # makes them again


def test_tiles_of_other_rows_are_not_taken(gallery: Gallery) -> None:
    stored = faces(200)
    expect(gallery, stored)
    one, two = (gallery.path / "tiles" / f"{f.key}.arrow" for f in gallery.snapshot.fragments)
    two.write_bytes(one.read_bytes())
    reads(gallery, stored)
    assert two.read_bytes() != one.read_bytes()


def test_random_flips_of_tiles(gallery: Gallery) -> None:
    stored, rng = faces(200), torch.Generator().manual_seed(8)
    expect(gallery, stored)
    path = gallery.path / "tiles" / f"{gallery.snapshot.fragments[1].key}.arrow"
    whole = path.read_bytes()
    places = [int(at) for at in torch.randint(len(whole), (15,), generator=rng)]
    places += [len(whole) - 1 - int(at) for at in torch.randint(1500, (25,), generator=rng)]  # structure
    places += [int(at) for at in torch.randint(3000, (15,), generator=rng)]
    for at in places:
        path.write_bytes(another_bit(whole, rng, at))
        reads(gallery, stored)


def test_tiles_that_a_compaction_swept_are_written_by_the_next_search(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.compact()
    batches = Snapshot.fragment_batches

    def swept(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield from batches(*arguments, **options)
        gallery.compact()

    with Gallery.open(gallery.path) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(Snapshot, "fragment_batches", swept)
            expect(reader, faces(200))
        assert reader.info()["tiles_ready"] == 0
        expect(reader, faces(200))
        assert reader.info()["tiles_ready"] == 1


def test_tiles_do_not_keep_files_open(tmp_path: Path) -> None:
    stored = faces(60)
    with Gallery.create(tmp_path / "g", stored) as made:
        for i in range(60):
            made.add(names(1, i), stored[i : i + 1])
        for _ in range(2):
            expect(made, stored)
        before = len(os.listdir("/proc/self/fd"))
        with Gallery.open(made.path) as other:
            expect(other, stored)
            assert len(os.listdir("/proc/self/fd")) < before + 10


# ------------------------------------------------------------------ disks and locks, closer


@pytest.mark.process
def test_every_amount_of_room(tmp_path: Path) -> None:
    """Whatever room is left, a commit is made, or refused without a trace."""
    out = in_a_mount(
        tmp_path,
        f"mount -t tmpfs -o size=3m none {tmp_path}/mount",
        """
        import os
        stored = faces(400)
        gallery = Gallery.create("mount/g", stored)
        gallery.add(names(100), stored[:100])
        expected, outcomes = names(100), set()
        for turn, room in enumerate([0, 4, 8, 12, 16, 24, 32, 64, 128, 160, 168, 172, 176, 180, 184, 188, 400] * 3):
            state = os.statvfs("mount")
            with open("mount/filler", "wb") as filler:
                filler.write(b"x" * max(0, state.f_bavail * state.f_frsize - room * 1024))
            new = [f"{turn}-{i}" for i in range(100)]
            operation = ("add", "remove", "compact")[turn // 17]
            try:
                if operation == "add":
                    gallery.add(new, stored[:100])
                    after = expected + new
                elif operation == "remove":
                    gallery.remove(expected[:2])
                    after = expected[2:]
                else:
                    gallery.compact()
                    after = expected
                expected = after
                outcomes.add((operation, "done"))
            except GalleryError as error:
                assert "No space left on device" in str(error), error
                outcomes.add((operation, "refused"))
            kept = stored[[int(name.split("-")[-1]) % 100 for name in expected]]
            assert list(gallery.refresh().ids()) == expected, (operation, room)
            expect(gallery, kept)                   # tiles or not
            os.unlink("mount/filler")
            with Gallery.open("mount/g") as other:
                assert list(other.ids()) == expected and other.verify()["ok"]
            if operation == "add" and len(expected) > 100:
                gallery.remove(expected[100:])
                expected = expected[:100]
                gallery.compact()
        gallery.compact()
        data = len(os.listdir("mount/g/templates.lance/data"))
        assert data == len(gallery.snapshot.fragments), data
        print(sorted(outcomes))
        """,
    )
    for operation in ("add", "remove", "compact"):
        assert f"('{operation}', 'done')" in out and f"('{operation}', 'refused')" in out


@pytest.mark.process
def test_files_must_not_grow(tmp_path: Path, gallery: Gallery) -> None:
    """A full disk as every user can have it: a limit on the size of files."""
    gallery.close()
    code = (
        PRELUDE
        + f"""
import resource
stored = faces(200)
gallery = Gallery.open({str(gallery.path)!r})
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
before = sorted(path for path in gallery.path.rglob("*"))
with pytest.raises(GalleryError, match="File too large.; nothing was changed"):
    gallery.add(["x" + name for name in names(200)], stored)
expect(gallery, stored)
assert sorted(path for path in gallery.path.rglob("*") if path.name != "tiles") == before
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
assert gallery.add(["x"], stored[:1]) == 1
gallery.remove(["x"])
with Gallery.open(gallery.path) as other:
    expect(other, stored)
    assert other.info()["tiles_ready"] == 2
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_versions_that_are_being_deleted_cannot_be_read(gallery: Gallery) -> None:
    version = gallery.version
    old = ReaderLock(gallery.path, version - 1)
    with pytest.raises(GalleryBusyError, match=f"version {version - 1} is still"):
        wait_for_readers(gallery.path, [version - 1], 0.1)
    old.release()
    wait_for_readers(gallery.path, [version - 1], 0.1)
    assert ReaderLock(gallery.path, version - 1).refused
    with Gallery.open(gallery.path) as other:
        assert other.version == version
    with pytest.raises(GalleryError, match="is gone: it was compacted"):
        gallery._store.snapshot(version - 1)


@pytest.mark.process
def test_readers_that_are_forgotten_do_not_block(gallery: Gallery) -> None:
    Gallery.open(gallery.path)  # and not closed
    reader = Gallery.open(gallery.path)
    gallery.remove(names(1))
    child = subprocess.Popen(  # has the reader's lock, as a forked worker would
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[reader._lock._descriptor]
    )
    with pytest.raises(GalleryBusyError):
        gallery.compact(timeout=0.1)
    reader.close()
    gallery.compact(timeout=0.1)
    child.communicate(b"\n")


def test_threads_write(gallery: Gallery) -> None:
    stored, added = faces(50), []

    def work(name: str) -> None:
        with Gallery.open(gallery.path, timeout=60) as own:
            for i in range(6):
                added.append(own.add([f"both-{i}", f"{name}-{i}"], stored[:2], on_duplicate="skip"))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = list(gallery.refresh().ids())
    assert len(ids) == len(set(ids)) == 200 + 6 * 4 and sum(added) == 6 * 4


def test_a_reader_while_others_write(gallery: Gallery) -> None:
    stored, probes = faces(200), faces(4, 9, "probe")
    with Gallery.open(gallery.path, cache=False) as reader:
        before = reader.search(probes, 50)
        for i in range(5):
            gallery.add([f"new-{i}"], stored[:1])
            gallery.remove(names(10, 10 * i))
            gallery.add(names(5, 100 + 5 * i), stored[:5], on_duplicate="replace")
            with pytest.raises(GalleryBusyError):
                gallery.compact(timeout=0)
            hits = reader.search(probes, 50)
            assert hits.ids == before.ids and torch.equal(hits.scores, before.scores) and len(reader) == 200
        assert len(reader.refresh()) == len(gallery) == 200 + 5 - 50
        gallery.compact(timeout=0)  # nobody is left on an older version


def test_conditions_on_damaged_rows_blame_the_rows(gallery: Gallery) -> None:
    stored = faces(4)
    gallery.add(["n"], stored[:1], metadata=[{"number": 77}])
    path = data_file(gallery, 2)
    whole = path.read_bytes()
    at = whole.find(b"number")
    outcomes = set()
    for bit in range(8):
        data = bytearray(whole)
        data[at - 1 - bit // 2] ^= 1 << bit
        path.write_bytes(data)
        with Gallery.open(gallery.path, cache=False) as other:
            found = None
            try:
                found = other.search(faces(1, 9, "probe"), 300, where="json_get_int(metadata, 'number') > 5").ids
            except GalleryDamagedError as error:
                outcomes.add(error.rows)
            report = other.verify()
            damaged = [row["position"] for row in report["damaged"]]
            damaged += [row for part in report["unreadable"] for row in part["positions"]]
            assert damaged == [200] or (damaged, found) == ([], [["n"]])  # some bits say nothing
    assert outcomes & {(200,)}
    with pytest.raises(GalleryError, match="where: expected an SQL condition") as caught:
        gallery.search(faces(1, 9, "probe"), 3, where="number >")
    assert not isinstance(caught.value, GalleryDamagedError)
