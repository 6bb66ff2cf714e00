"""Reports of many pairs: what is on the page is what explain says, whatever is wrong with some of the pairs."""

from __future__ import annotations

import base64
import csv
import json
import math
import os
import re
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, open_browser, require
from commands import run, trouble
from explained import CURVE, crop, toy
from PIL import Image

from xcos_ext.explain import explain
from xcos_ext.explain.pairs_file import PairsFile, PairsFileError, ReportPair, pictures_below
from xcos_ext.explain.pairs_report import write_report
from xcos_ext.explain.regions import PARTS, cell_parts
from xcos_ext.io.atomic import OutputError
from xcos_ext.io.errors import PictureError
from xcos_ext.io.text import signed

PICTURES = 24
PAIRS = 300


def read(name: str) -> np.ndarray:
    """Picture ``<number>.png``; a few cannot be used."""
    number = int(name.rpartition("/")[2].split(".")[0])
    if number >= PICTURES:
        raise PictureError(f"{name}: no such file")
    return crop(number)


def pairs(count: int = PAIRS, seed: int = 0) -> list[ReportPair]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        a, b = rng.integers(0, PICTURES, 2)
        genuine = (True, False, None)[i % 3]
        made.append(ReportPair(f"p/{a}.png", f"p/{b}.png", genuine, (f"case {i}", ""), i + 2))
    return made


class Contents:
    """What a page holds, read as its program reads it."""

    def __init__(self, path: Path) -> None:
        page = path.read_text(encoding="utf-8")
        block = r'<script type="(?:application/json|text/plain)" class="(\w+)"[^>]*>(.*?)</script>'
        blocks = re.findall(block, page, re.S)
        self.settings = json.loads(next(text for name, text in blocks if name == "settings"))
        self.summary = json.loads(next(text for name, text in blocks if name == "summary"))
        self.names: list[str] = []
        self.why_pictures: dict[int, str] = {}
        self.jpegs: list[str] = []
        self.rows: list[dict[str, Any]] = []
        for name, text in blocks:
            if name == "names":
                data = json.loads(text)
                self.why_pictures |= {len(self.names) + int(k): v for k, v in data["why"].items()}
                self.names += data["names"]
            elif name == "jpegs":
                self.jpegs += text.split("\n")
            elif name == "pairs":
                data = json.loads(text)
                count = len(data["a"])
                cells = int(np.prod(self.settings["cells"]))
                maps = np.frombuffer(base64.b64decode(data["maps"]), "<u2").reshape(count, 2, cells) / 65535
                for i in range(count):
                    row = {key: data[key][i] for key in ("a", "b", "line", "genuine", "labels", "score", "fmr")}
                    row |= {"why": data["why"].get(str(i)), "identical": data["identical"].get(str(i))}
                    row["unlike"] = i in data["unlike"]
                    self.rows.append(row | {"s": 2 * maps[i, 0] - 1, "w": maps[i, 1]})


def write(path: Path, given: Any, model: Any = None, **how: Any) -> Any:
    return write_report(path, model or toy(), given, how.pop("read", read), label_names=("case", "note"), **how)


# --- the list


def listed(folder: Path, text: str | bytes) -> PairsFile:
    path = folder / "pairs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return PairsFile(path)


def test_list(tmp_path: Path) -> None:
    found = listed(
        tmp_path, '\ufeffB,note, a ,Genuine\nx.jpg,"one, two",y.jpg,1\n\nu.jpg,,v.jpg,\r\nq.jpg,,q.jpg,FALSE\n'
    )
    assert len(found) == 3
    assert found.label_names == ("note",)
    first, second, third = found
    assert first == ReportPair("y.jpg", "x.jpg", True, ("one, two",), 2)
    assert second == ReportPair("v.jpg", "u.jpg", None, ("",), 4)
    assert third.genuine is False and third.line == 5
    assert list(found) == [first, second, third]  # again
    assert [p.genuine for p in listed(tmp_path, "a,b\n1,2\n")] == [None]
    assert [p.genuine for p in listed(tmp_path, "a,b,same\n1,2,yes\n")] == [True]
    spaced = listed(tmp_path, "a,b,genuine,case\n 1 , 2,1.0 , x \n1,2,,y\n3,4, 0.0,z\n")
    assert next((p.a, p.b, p.genuine, p.labels) for p in spaced) == ("1", "2", True, ("x",))
    assert [p.genuine for p in spaced] == [True, None, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: expected a header with the columns a and b, each column once, got nothing"),
        ("x,y\n1,2\n", "line 1: expected a header with the columns a and b, each column once, got 'x', 'y'"),
        ("a,b,b\n1,2,3\n", "each column once"),
        ("a,b\n", "no pairs in it"),
        ("a,b\n1,2\n3,\n", "line 3: expected two pictures, got '3' and ''"),
        ("a,b\n1,2\n3,4,5\n", "line 3: expected 2 columns as in the header, got 3"),
        ("a,b\n1\n", "line 2: expected 2 columns as in the header, got 1"),
        ("a,b,genuine\n1,2,maybe\n", "line 2: genuine: expected 1, 0 or nothing, got 'maybe'"),
        ('a,b\n1,2\n"3,4\n', "line 3: not CSV"),
        ("a,b\n1,2\n3,\0\n", "line 3: not CSV (line contains NUL)"),
        (b"a,b\n1,2\n\xff\xfe,4\n", "expected text in UTF-8"),
    ],
)
def test_lists_that_cannot_be(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(PairsFileError, match=re.escape(words)) as caught:
        listed(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "pairs.csv"))


def test_many_columns_take_no_time(tmp_path: Path) -> None:
    row = ",".join(map(str, range(50_000)))
    begin = time.perf_counter()
    assert len(listed(tmp_path, f"a,b,{row}\n1,2,{row}\n").label_names) == 50_000
    assert time.perf_counter() - begin < 5  # comparing each with each took longer


def test_no_list(tmp_path: Path) -> None:
    with pytest.raises(PairsFileError, match=r"none\.csv: cannot be read \(No such file"):
        PairsFile(tmp_path / "none.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path, tmp_path / "pipe.csv"):
        with pytest.raises(PairsFileError, match="not a regular file"):
            PairsFile(path)


def test_pictures_in_folders_and_archives(tmp_path: Path) -> None:
    (tmp_path / "all" / "p").mkdir(parents=True)
    Image.fromarray(crop(1)).save(tmp_path / "all" / "p" / "1.png")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "all" / "p" / "1.png", "all/p/1.png")
    for root, path in (
        (tmp_path / "all", "p/1.png"),
        (tmp_path / "all", "1.png"),  # the only folder in it
        (tmp_path / "all" / "p", str(tmp_path / "all" / "p" / "1.png")),
        (tmp_path / "all.zip", "all/p/1.png"),
        (tmp_path / "all.zip", "p/1.png"),
    ):
        np.testing.assert_array_equal(pictures_below(root)(path), crop(1))
    for root in (tmp_path / "all", tmp_path / "all.zip"):
        with pytest.raises(PictureError, match=r"^no/2\.png: ") as caught:
            pictures_below(root)("no/2.png")
        if root.is_dir():
            assert str(tmp_path) not in str(caught.value)
    with pytest.raises(PictureError, match="too large"):
        pictures_below(tmp_path / "all", max_pixels=10)("p/1.png")
    for bad in (tmp_path / "none", tmp_path / "all" / "p" / "1.png"):
        with pytest.raises(PictureError, match="expected a folder or a zip archive"):
            pictures_below(bad)


# --- the page against explain


@pytest.mark.parametrize("kind", ["learned", "norm", "uniform"])
def test_the_page_says_what_explain_says(tmp_path: Path, kind: Any) -> None:
    model, given = toy(kind), pairs()
    summary = write(tmp_path / "r.html", given, model, batch_size=7)
    found = Contents(tmp_path / "r.html")
    assert len(found.rows) == len(given) == summary.pairs == summary.compared
    assert found.settings["threshold"] == 0.25 and found.settings["part_names"] == list(PARTS)
    assert found.settings["parts"] == cell_parts((7, 7)).ravel().tolist()
    same = 0
    for pair, row in zip(given, found.rows, strict=True):
        assert (found.names[row["a"]], found.names[row["b"]]) == (pair.a, pair.b)
        assert row["genuine"] == (None if pair.genuine is None else int(pair.genuine))
        assert (row["labels"], row["line"]) == (list(pair.labels), pair.line)
        same += row["score"] >= 0.25
        if pair.line % 5 == 0:
            e = explain(model, read(pair.a), read(pair.b))
            assert row["score"] == pytest.approx(e.score, abs=2e-6)
            np.testing.assert_allclose(row["s"], e.similarity.ravel(), atol=2e-5)
            np.testing.assert_allclose(row["w"], e.attention.ravel(), atol=1e-5)
            rate = CURVE.at(row["score"])
            assert abs(row["fmr"]) == pytest.approx(rate.rate, rel=6e-3)
            assert (row["fmr"] > 0) is rate.resolved
            assert (row["identical"] is not None) is (pair.a == pair.b)
    assert (summary.same, summary.different) == (same, len(given) - same)
    assert summary.identical == sum(pair.a == pair.b for pair in given)
    assert summary.genuine == summary.impostor == PAIRS // 3
    assert summary.false_matches == sum(r["score"] >= 0.25 for r in found.rows if r["genuine"] == 0)
    assert summary.false_non_matches == sum(r["score"] < 0.25 for r in found.rows if r["genuine"] == 1)
    assert found.summary | {"bytes": 0} == summary.as_dict() | {"bytes": 0}
    assert summary.bytes == (tmp_path / "r.html").stat().st_size


def test_every_picture_is_there_once(tmp_path: Path) -> None:
    import io

    calls: list[str] = []

    def counted(name: str) -> np.ndarray:
        calls.append(name)
        return read(name)

    given = pairs()
    summary = write(tmp_path / "r.html", given, read=counted)
    found = Contents(tmp_path / "r.html")
    used = {name for pair in given for name in (pair.a, pair.b)}
    assert sorted(calls) == sorted(used) == sorted(found.names)
    assert summary.pictures == len(found.jpegs) == len(used)
    for name, jpeg in zip(found.names, found.jpegs, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg))), np.float64)
        assert picture.shape == (112, 112, 3)
        assert np.abs(picture - read(name)).mean() < 40  # a small JPEG of random blocks
    assert summary.bytes / len(used) < 40_000


def test_pairs_that_fail_are_listed(tmp_path: Path) -> None:
    given = [
        ReportPair("p/1.png", "p/2.png"),
        ReportPair("p/1.png", "p/99.png", True),
        ReportPair("p/98.png", "p/99.png"),
        ReportPair("p/98.png", "p/98.png"),
        ReportPair("p/2.png", "p/3.png"),
    ]
    summary = write(tmp_path / "r.html", given)
    rows = Contents(tmp_path / "r.html").rows
    assert (summary.compared, summary.failed, summary.without_face) == (2, 3, 2)
    assert [row["why"] for row in rows] == [
        None,
        "p/99.png: no such file",
        "p/98.png: no such file; p/99.png: no such file",
        "p/98.png: no such file",
        None,
    ]
    assert [row["score"] is None for row in rows] == [False, True, True, True, False]
    assert summary.genuine == 0
    # None at all is still a page.
    assert write(tmp_path / "none.html", given[1:3]).compared == 0


def test_crops_of_another_size_and_photographs_without_faces(tmp_path: Path) -> None:
    from xcos_ext.faces import create_detector

    def odd(name: str) -> np.ndarray:
        return np.full((60, 50, 3), 90, np.uint8)

    write(tmp_path / "a.html", [ReportPair("a", "b")], read=odd)
    assert (
        "a: expected an aligned crop of 112 x 112 pixels, got 50 x 60" in Contents(tmp_path / "a.html").rows[0]["why"]
    )
    write(tmp_path / "b.html", [ReportPair("a", "b")], read=odd, detector=lambda: create_detector())
    assert "a: no face found in 50 x 60 pixels" in Contents(tmp_path / "b.html").rows[0]["why"]


def test_results_that_are_not_finite_are_listed(tmp_path: Path) -> None:
    class Sick(torch.nn.Module):
        def __init__(self, body: torch.nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            grid = self.body(images)
            white = images.mean((1, 2, 3)) > 0.99
            return torch.where(white[:, None, None, None], math.nan, grid)

    model = toy()
    model.backbone = Sick(model.backbone)
    white = np.full((112, 112, 3), 255, np.uint8)
    given = [ReportPair("1", "2"), ReportPair("1", "w"), ReportPair("w", "w"), ReportPair("2", "1")]
    summary = write(tmp_path / "r.html", given, model, read=lambda name: white if name == "w" else crop(int(name)))
    rows = Contents(tmp_path / "r.html").rows
    assert (summary.compared, summary.failed) == (2, 2)
    assert [row["why"] for row in rows] == [None, *2 * ["the model gave a result that is not finite"], None]


def test_without_calibration(tmp_path: Path) -> None:
    summary = write(tmp_path / "r.html", pairs(5), toy(threshold=None, curve=None))
    found = Contents(tmp_path / "r.html")
    assert summary.threshold is None and (summary.same, summary.different) == (0, 0)
    assert found.settings["threshold"] is None and found.settings["calibration"] is None
    assert {row["fmr"] for row in found.rows} == {None}


# --- files, memory, interruptions


class Generated:
    """Pairs made while they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[ReportPair]:
        for i in range(self.count):
            yield ReportPair(
                f"p/{i % PICTURES}.png", f"p/{(i // PICTURES + 1) % PICTURES}.png", i % 2 == 0, ("x", "y"), i
            )


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_pairs(tmp_path: Path) -> None:
    peaks = []
    model = toy()
    for count in (256, 256, 4096):
        tracemalloc.start()
        assert write(tmp_path / "r.html", Generated(count), model, threads=1).compared == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 300_000, peaks  # the page itself is a megabyte larger


def test_features_lie_on_the_disk() -> None:
    from xcos_ext.explain.pairs_report import _Spool

    spool = _Spool("/tmp")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((10, 3, 2, 2)).astype(np.float32)
    assert spool.append(rows[:6]) == range(6) and spool.append(rows[6:]) == range(6, 10)
    np.testing.assert_array_equal(spool.take([9, 0, 6, 0]), rows[[9, 0, 6, 0]])
    spool.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("disk on fire")])
def test_interruptions_leave_the_old_page(tmp_path: Path, error: Any) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def tick(done: int, total: int) -> None:
        assert total == PAIRS
        if done > 200:
            raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RuntimeError):
        write(path, pairs(), progress=tick)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.html"]


def test_bad_input(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "r.txt", "expected a file ending in .html"),
        (tmp_path / "no" / "r.html", "no folder"),
    ):
        with pytest.raises(OutputError, match=words):
            write(path, pairs(3))
    for how, error, words in (
        ({"threshold": math.nan}, ValueError, "threshold: expected a finite number"),
        ({"batch_size": 0}, ValueError, "batch_size, threads: expected at least 1"),
        ({"model": toy().train()}, ValueError, "model: expected evaluation mode"),
    ):
        with pytest.raises(error, match=words):
            write(tmp_path / "r.html", pairs(3), **how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pairs: expected at least one, got none"):
        write(tmp_path / "r.html", [])
    assert os.listdir(tmp_path) == []


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for i in range(4):
        Image.fromarray(crop(i)).save(folder / f"{i}.png")
    with open(folder / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["a", "b", "genuine", "case"], ["0.png", "1.png", 1, "x"], ["2.png", "3.png", 0, "y"]])
        rows.writerows([["0.png", "none.png", 1, "z"], ["3.png", "3.png", "", ""]])
    return folder


def test_command(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    result = run("report", folder / "list.csv", "--html", page, "--aligned", "--title", "Mine & <others>")
    assert result.exit_code == 0, result.output
    assert re.search(r"^pairs +4 \(3 compared, 1 not\)$", result.stdout, re.M)
    assert "pictures that could not be used: 1" in result.stderr
    assert "pairs of identical pictures: 1" in result.stderr
    assert re.search(r"pictures that do not look like a face: \d; their pairs are marked on the page", result.stderr)
    assert [row["unlike"] for row in Contents(page).rows] == [True, True, False, True]  # they are noise, or missing
    assert "<h1>Mine &amp; &lt;others&gt;</h1>" in page.read_text(encoding="utf-8")
    assert Contents(page).settings["labels"] == ["case"]
    data = json.loads(run("report", folder / "list.csv", "--html", page, "--aligned", "--json").stdout)
    assert (data["pairs"], data["compared"], data["failed"], data["pictures"]) == (4, 3, 1, 5)
    assert data["page"] == str(page) and data["model"]["name"] == "xcos-slim"
    assert "<h1>list</h1>" in page.read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["r.html"]


def test_command_in_trouble(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    for out, words in (
        (tmp_path / "r.csv", "expected a file ending in .html"),
        (tmp_path / "no" / "r.html", "no folder"),
    ):
        trouble(run("report", "none.csv", "--model", "none.pt", "--html", out), words)
    trouble(run("report", tmp_path / "none.csv", "--html", page), "none.csv: cannot be read")
    trouble(run("report", folder / "list.csv", "--html", page, "--root", tmp_path / "no"), "expected a folder or a zip")
    trouble(
        run("report", folder / "list.csv", "--html", page, "--detector", "mtcnn"),
        "mtcnn: no such file, and no such name",
    )
    (tmp_path / "bad.csv").write_text("a,b,genuine\n1,2,1\n3,4,x\n")
    trouble(run("report", tmp_path / "bad.csv", "--html", page), "bad.csv, line 3: genuine: expected 1, 0 or nothing")
    assert run("report", folder / "list.csv").exit_code == 2  # no --html
    assert not page.exists()
    strictly = run("report", folder / "list.csv", "--html", page, "--aligned", "--strict")
    assert strictly.exit_code == 2 and "pictures that could not be used: 5" in strictly.stderr
    result = run("report", folder / "list.csv", "--html", page, "--root", tmp_path, "--aligned")
    assert result.exit_code == 2 and "not one pair could be compared" in result.stderr
    assert page.exists()  # says why


def test_command_interrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xcos_ext.explain import pairs_report

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pairs_report._Report, "add_pairs", interrupted)
    result = run("report", folder / "list.csv", "--html", tmp_path / "r.html", "--aligned")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")
    assert os.listdir(tmp_path) == []


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require()
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "r.html"
    broken = ReportPair("p/0.png", "p/99.png", True, ("broken", ""), 500)
    write(path, [*pairs(), broken])
    return path


def order(browser: Browser) -> list[int]:
    """Numbers of the pairs that are shown."""
    return browser.run("[...document.querySelectorAll('.pair')].map((p) => Number(p.dataset.pair))")


def choose(browser: Browser, which: int, value: str) -> None:
    browser.run(
        f"(() => {{ const s = document.querySelectorAll('#controls select')[{which}]; s.value = '{value}';"
        "s.dispatchEvent(new Event('change')); })()"
    )


def test_sorting(browser: Browser, page: Path) -> None:
    rows = Contents(page).rows
    browser.open(page)
    assert browser.run("document.body.dataset.ready") == "yes"
    assert order(browser) == list(range(20))
    assert browser.run("document.getElementById('counts').textContent").startswith(
        "301 pairs, 300 compared, 1 could not"
    )
    score = np.array([row["score"] if row["score"] is not None else np.inf for row in rows])

    def check(keys: np.ndarray) -> None:
        expected = np.lexsort((np.arange(len(keys)), keys))[:20]
        got = order(browser)
        np.testing.assert_allclose(keys[got], keys[expected], atol=1e-12)
        assert len(set(got)) == 20

    choose(browser, 1, "score")
    check(score)
    choose(browser, 1, "margin")
    check(np.abs(score - 0.25))
    for cell in (10, 24, 48):
        for name in ("c", "s", "w"):
            choose(browser, 2, name)
            browser.click(".picker .cell", cell)
            values = {"s": lambda r: r["s"], "w": lambda r: r["w"], "c": lambda r: r["w"] * (r["s"] - 0.25)}[name]
            keys = np.array([values(row)[cell] if row["score"] is not None else np.inf for row in rows])
            check(keys)
    assert "by attention W of row 7, column 7, sides, rising" in browser.run(
        "document.getElementById('found').textContent"
    )
    browser.click("#controls button")
    keys[np.isinf(keys)] = -np.inf
    check(-keys)
    assert browser.complaints() == []


def test_filters_search_and_pages(browser: Browser, page: Path) -> None:
    rows = Contents(page).rows
    browser.open(page)
    for name, keep in (
        ("genuine", lambda r: r["genuine"] == 1),
        ("impostor", lambda r: r["genuine"] == 0),
        ("unknown", lambda r: r["genuine"] is None),
        ("failed", lambda r: r["score"] is None),
        ("wrong", lambda r: None not in (r["score"], r["genuine"]) and (r["score"] >= 0.25) != (r["genuine"] == 1)),
    ):
        choose(browser, 0, name)
        expected = [i for i, row in enumerate(rows) if keep(row)]
        assert order(browser) == expected[:20], name
    choose(browser, 0, "failed")
    text = browser.run("document.querySelector('.pair').textContent")
    assert "not compared" in text and "p/99.png: no such file" in text and "case: broken" in text
    choose(browser, 0, "all")
    browser.run("document.querySelector('input').value = 'Case 29'")
    browser.run("document.querySelector('input').dispatchEvent(new Event('input'))")
    browser.run("new Promise((done) => setTimeout(done, 250))")
    assert order(browser) == [29, *range(290, 300)]
    browser.open(page)
    browser.click(".pager button", 3)
    assert order(browser) == [300]
    browser.click(".pager button", 1)
    assert order(browser) == list(range(280, 300))
    assert browser.complaints() == []


def test_hovering(browser: Browser, page: Path) -> None:
    rows = Contents(page).rows
    browser.open(page)
    browser.hover(".pair:nth-child(2) svg.face .cell", 17)
    frames = (
        "[...document.querySelectorAll('.pair .frame.light')].map((f) => [f.getAttribute('x'), f.getAttribute('y')])"
    )
    assert browser.run(frames) == [["300", "200"]] * 5
    s, w = rows[1]["s"][17], rows[1]["w"][17]
    c = w * (s - 0.25)
    text = browser.run("document.querySelectorAll('.readout')[1].textContent")
    numbers = (signed(s, 3).lstrip("+"), f"{100 * w:.1f} %", signed(c, 4))
    assert text == "Row 3, column 4, nose: similarity S {}, attention W {}, contribution {}".format(*numbers)
    browser.hover(".pair:nth-child(1) svg.s .cell", 0)
    assert browser.run(frames) == [["0", "0"]] * 5
    browser.run("document.querySelectorAll('.panels')[2].focus()")
    for key in ("ArrowUp", "ArrowLeft"):
        browser.press(key)
    assert browser.run(frames) == [["200", "200"]] * 5
    browser.press("Escape")
    assert browser.run(frames) == []
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 768, 1440])
def test_every_width(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark, phone=width < 500)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []


@pytest.mark.parametrize("threshold", [-0.9, 0.3, 0.99])
def test_words_of_the_score_axis_are_apart_and_whole(browser: Browser, tmp_path: Path, threshold: float) -> None:
    write(tmp_path / "r.html", pairs(30), threshold=threshold)
    browser.open(tmp_path / "r.html")
    boxes = browser.run(
        "[...document.querySelectorAll('.histogram text')].map((t) => { const r = t.getBoundingClientRect(),"
        " s = t.ownerSVGElement.getBoundingClientRect();"
        " return [r.left - s.left, r.right - s.left, r.top, r.bottom, s.width]; })"
    )
    assert len(boxes) == 3
    for i, (left, right, top, bottom, width) in enumerate(boxes):
        assert left >= -1 and right <= width + 1
        for other in boxes[:i]:
            assert right < other[0] or other[1] < left or bottom <= other[2] + 1 or other[3] <= top + 1


def test_nothing_foreign_runs(browser: Browser, tmp_path: Path) -> None:
    from test_explain_html import HOSTILE

    def any_name(name: str) -> np.ndarray:
        if "alert(2)" in name:
            raise PictureError(f"{name}: no such file")
        return crop(1)

    given = [ReportPair(name, f"x/{name}", None, (name, name)) for name in HOSTILE]
    write_report(
        tmp_path / "r.html",
        toy(name=HOSTILE[1]),
        given,
        any_name,
        title=HOSTILE[2],
        label_names=HOSTILE[:2],
        file=HOSTILE[0],
    )
    browser.open(tmp_path / "r.html")
    assert browser.run("document.body.dataset.ready") == "yes"
    assert len(order(browser)) == len(HOSTILE)
    assert browser.run("document.querySelectorAll('img, [onerror], [onmouseover], [style]').length") == 0
    shown = browser.run("document.body.textContent")
    assert "alert(1)" in shown and "\u202e" not in shown
    assert browser.complaints() == []


def test_uncalibrated_page(browser: Browser, tmp_path: Path) -> None:
    write(tmp_path / "r.html", pairs(30), toy(threshold=None, curve=None))
    browser.open(tmp_path / "r.html")
    assert "not calibrated" in browser.run("document.getElementById('counts').textContent")
    assert browser.run("document.querySelectorAll('.same, .different').length") == 0
    assert browser.complaints() == []
