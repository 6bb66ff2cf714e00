"""The xcos command: verdicts, JSON, exit statuses, one-line messages; real photographs are in test_faces_real.py."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import Result
from commands import run, strict, trouble
from drawn import background, draw_face, portrait
from PIL import Image

import xcos_ext
from xcos_ext import backbones
from xcos_ext.cli.app import xcos
from xcos_ext.io.errors import ModelError, PictureError
from xcos_ext.model import load_model, plug, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def recogniser(folder: Path) -> Path:
    """Weights of a small recogniser that has learnt nothing."""
    torch.manual_seed(0)
    network = backbones.create("mobilefacenet")
    torch.save(network.state_dict(), folder / "recogniser.pt")
    return folder / "recogniser.pt"


@pytest.fixture(scope="module")
def model(folder: Path, recogniser: Path) -> Path:
    """The same as an xCos model with a threshold."""
    from xcos_ext.model import load_recogniser

    rng = np.random.default_rng(0)
    faces = rng.integers(0, 256, (8, 112, 112, 3), dtype=np.uint8)
    save_model(plug(load_recogniser(recogniser), faces, threshold=0.5), folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def photos(folder: Path) -> dict[str, str]:
    """Names to paths: two drawn people, two of the first, a team, a wall, and crops."""
    paths = {}

    def save(name: str, rgb: np.ndarray) -> None:
        Image.fromarray(rgb).save(folder / f"{name}.png")
        paths[name] = str(folder / f"{name}.png")

    save("a", portrait())
    save("b", portrait(tint=0.8, degrees=6))
    team = background(300, 600)
    draw_face(team, (140, 150), 110)
    draw_face(team, (430, 150), 140)
    save("team", team)
    save("wall", background(200, 200))
    rng = np.random.default_rng(1)
    for name in ("crop1", "crop2"):
        save(name, rng.integers(0, 256, (112, 112, 3), dtype=np.uint8))
    save("pixel", np.zeros((1, 1, 3), np.uint8))
    return paths


# --- verify


@pytest.mark.thorough
def test_same_picture_is_the_same_person(photos: dict[str, str], model: Path) -> None:
    result = run("verify", photos["a"], photos["a"], "--model", model)
    assert result.exit_code == 0, result.output
    assert re.search(r"^score +1\.0000$", result.stdout, re.M)
    assert re.search(r"^threshold +0\.5000$", result.stdout, re.M)
    assert re.search(r"^verdict +same person$", result.stdout, re.M)
    said = "Both crops are the same picture, pixel by pixel: the score says nothing about the person"
    assert result.stderr == f"xcos: {said}\n"
    assert strict(run("verify", photos["a"], photos["a"], "--model", model, "--json").stdout)["identical"] == "pictures"


@pytest.mark.thorough
def test_threshold_decides(photos: dict[str, str], model: Path) -> None:
    result = run("verify", photos["a"], photos["b"], "--model", model, "--threshold", "0.999999")
    assert result.exit_code == 1
    assert re.search(r"^verdict +different people$", result.stdout, re.M)
    assert run("verify", photos["a"], photos["b"], "--model", model, "--threshold", "-1").exit_code == 0


def test_json(photos: dict[str, str], model: Path) -> None:
    result = run("verify", photos["a"], photos["b"], "--model", model, "--json", "--threshold", "0.3")
    data = strict(result.stdout)
    assert {"score", "threshold", "same", "similarity", "attention", "contribution", "model"} <= set(data)
    assert data["same"] is (data["score"] >= 0.3)
    assert result.exit_code == (0 if data["same"] else 1)
    s, w, c = (np.array(data[key]) for key in ("similarity", "attention", "contribution"))
    assert s.shape == w.shape == c.shape == (7, 7)
    assert w.sum() == pytest.approx(1, abs=1e-5)
    assert (w * s).sum() == pytest.approx(data["score"], abs=1e-5)
    np.testing.assert_allclose(c, w * (s - 0.3), atol=1e-12)
    assert c.sum() == pytest.approx(data["score"] - 0.3, abs=1e-5)
    assert data["model"]["fingerprint"] == load_model(model).fingerprint()
    assert data["a"]["picture"] == photos["a"]
    assert np.shape(data["a"]["landmarks"]) == (5, 2)


@pytest.mark.thorough
def test_aligned_crops_score_as_the_library_does(photos: dict[str, str], model: Path) -> None:
    data = strict(run("verify", photos["crop1"], photos["crop2"], "--model", model, "--aligned", "--json").stdout)
    loaded = load_model(model)
    faces = [np.asarray(Image.open(photos[name])) for name in ("crop1", "crop2")]
    with torch.no_grad():
        expected = loaded(loaded.preprocessing(faces[:1]), loaded.preprocessing(faces[1:]))
    assert data["score"] == pytest.approx(float(expected.score), abs=1e-6)
    np.testing.assert_allclose(data["similarity"], expected.similarity[0], atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_picture(photos: dict[str, str], model: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    result = run("verify", photos["crop1"], photos["crop1"], "--model", model, "--aligned", "--out", out)
    assert result.exit_code == 0, result.output
    assert os.listdir(tmp_path) == [out.name]
    assert out.stat().st_size > 5000
    assert str(out) in result.stdout


def test_model_from_the_environment(photos: dict[str, str], model: Path) -> None:
    result = run("verify", photos["crop1"], photos["crop1"], "--aligned", env={"XCOS_MODEL": str(model)})
    assert result.exit_code == 0


def test_several_faces(photos: dict[str, str], model: Path) -> None:
    result = run("verify", photos["team"], photos["a"], "--model", model, "--json")
    assert "2 faces found, took the most prominent" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    first = strict(result.stdout)["a"]
    assert first["faces"] == 2
    largest = strict(run("verify", photos["team"], photos["a"], "--model", model, "--face", "largest", "--json").stdout)
    assert largest["a"]["box"][0] > 300
    trouble(
        run("verify", photos["team"], photos["a"], "--model", model, "--face", "only"),
        photos["team"],
        "expected one face, found 2",
    )


def test_what_is_no_face_is_said_or_refused(photos: dict[str, str], model: Path) -> None:
    arguments = (photos["crop1"], photos["crop2"], "--aligned", "--model", model)
    result = run("verify", *arguments)
    assert result.exit_code in (0, 1)
    for line, name in zip(result.stderr.splitlines(), ("crop1", "crop2"), strict=True):
        said = "it does not look like a face, so its scores say nothing about a person (--strict refuses it)"
        assert line == f"xcos: {photos[name]}: {said}"
    assert re.search(r"^meaning +none: a false match rate is one of faces$", result.stdout, re.M)
    data = strict(run("verify", *arguments, "--json").stdout)
    assert data["a"]["faces"] == 0 and data["a"]["face_likelihood"] < 0.5
    assert f"{photos['crop1']} does not look like a face" in run("explain", *arguments).stdout
    for command in ("verify", "explain"):
        trouble(run(command, *arguments, "--strict"), photos["crop1"], "expected an aligned face, got a picture that")


@pytest.mark.thorough
def test_recogniser_without_known_statistics_needs_a_threshold(photos: dict[str, str], recogniser: Path) -> None:
    arguments = ("verify", photos["crop1"], photos["crop2"], "--aligned", "--model", recogniser)
    result = run(*arguments)
    assert result.exit_code == 2
    notes = result.stderr.splitlines()
    assert len(notes) == 2 and all(line.startswith("xcos: ") for line in notes)
    assert "no statistics are known" in notes[0]
    assert "knows no decision threshold; give one (threshold=, --threshold)" in notes[1]
    assert run(*arguments, "--threshold", "0.4").exit_code in (0, 1)


# --- trouble


def test_pictures_that_cannot_be_used(photos: dict[str, str], model: Path, tmp_path: Path) -> None:
    def verify(path: str | Path, *more: str) -> Result:
        return run("verify", photos["a"], path, "--model", model, *more)

    (tmp_path / "text.jpg").write_text("hello")
    data = Path(photos["a"]).read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    trouble(verify(tmp_path / "none.jpg"), "none.jpg: no such file")
    trouble(verify(tmp_path), f"{tmp_path}: expected a picture file, got a directory")
    trouble(verify(tmp_path / "text.jpg"), "text.jpg: not a picture")
    trouble(verify(tmp_path / "cut.png"), "cut.png: damaged or truncated PNG")
    trouble(verify("/dev/zero"), "/dev/zero: expected a picture file, got a device")
    trouble(verify(photos["pixel"]), "pixel.png: no face found in 1 x 1 pixels", "--aligned", "--detector")
    trouble(verify(photos["wall"]), "wall.png: no face found")
    trouble(verify(photos["a"], "--aligned"), "expected an aligned crop of 112 x 112 pixels, got 320 x 360")
    trouble(verify(photos["a"], "--max-pixels", "1000"), "too large: 320 x 360 pixels, at most 1,000")


def test_models_that_cannot_be_used(photos: dict[str, str], tmp_path: Path) -> None:
    def verify(path: str | Path) -> Result:
        return run("verify", photos["crop1"], photos["crop2"], "--aligned", "--model", path)

    trouble(verify(tmp_path / "none.pt"), "none.pt: no such file")
    trouble(verify(tmp_path), "expected a weights file")
    (tmp_path / "bad.pt").write_bytes(b"not weights")
    trouble(verify(tmp_path / "bad.pt"), "bad.pt")
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pt")
    trouble(verify(tmp_path / "other.pt"), "other.pt")
    for word in ("Slim", "best"):
        hint, crop = f"{word}: no such file, and no such name", photos["crop1"]
        trouble(verify(word), hint, "Known are slim, sface, mobilefacenet")
        trouble(run("verify", crop, crop, "--aligned", env={"XCOS_MODEL": word}), hint)
    with pytest.raises(ModelError, match=r"^Slim: no such file, and no such name; did you mean slim\?"):
        load_model("Slim")


def test_code_in_a_weights_file_is_not_run(photos: dict[str, str], tmp_path: Path) -> None:
    import pickle

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Harm()))
    trouble(run("verify", photos["crop1"], photos["crop2"], "--aligned", "--model", tmp_path / "evil.pt"), "evil.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("out", ["a.jpg", "none/a.png", "noname"])
def test_output_is_checked_before_any_work(tmp_path: Path, out: str) -> None:
    """Nothing else given is there, and still the output is what the message is about."""
    start = time.perf_counter()
    trouble(run("verify", "no1.jpg", "no2.jpg", "--model", "none.pt", "--out", tmp_path / out), os.path.basename(out))
    assert time.perf_counter() - start < 2
    assert os.listdir(tmp_path) == []


OVER = (
    ("verify a.png b.png --aligned --out ./a.png", "--out", "which is A"),
    ("explain b.png a.png --figure link.png", "--figure", "which is B"),
    ("explain a.png b.png --html page.html --figure page.png", "--figure", "another file than that of --html"),
    ("report list.csv --html page.html --root pictures.zip", "--html", "which is --root"),
    ("report named.csv --html page.html", "--html", "which is the picture a.png"),
    ("evaluate verification --pairs named.csv --root . --plot link.png", "--plot", "which is the picture a.png"),
    ("evaluate faithfulness --pairs named.csv --root . --plot ./a.png", "--plot", "which is the picture a.png"),
    ("evaluate faithfulness --pairs named.csv --root . --plot c.png", "--plot (2)", "which is the picture c-2.png"),
    ("evaluate faithfulness --pairs old.json --out old.json", "--out", "which is --pairs"),
    ("bench --compare old.json --json ./old.json", "--json", "which is --compare"),
    ("bench --picture a.png --plot link.png", "--plot", "which is --picture"),
    ("plug w.safetensors --faces . --out ./w.safetensors", "--out", "which is WEIGHTS"),
    ("export onnx --model w.safetensors --out w.onnx", "--out", "which is --model"),
    ("export tensorrt w.onnx --out w.plan", "--out", "which is GRAPH.onnx"),
    ("dedupe g --model w.safetensors --out t.csv", "--out", "which is --model"),
    ("train e.toml --out .", "--out model.safetensors", "which is model.recogniser"),
    ("train e.toml --out s3://b/x", "s3://b/x", "got an address"),  # nor is a folder "s3:" made
    ("verify a.png b.png --aligned --out file:///tmp/x.png", "file:///tmp/x.png", "got an address"),
)


@pytest.mark.parametrize(("line", "option", "which"), OVER, ids=[line for line, _, _ in OVER])
def test_nothing_that_is_read_is_written_over(
    line: str, option: str, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "c-2.png", "w.safetensors", "model.safetensors", "pictures.zip", "list.csv"):
        Path(name).write_bytes(name.encode())
    Path("old.json").write_text("{}")
    Path("named.csv").write_text("a,b,genuine\na.png,b.png,1\na.png,c-2.png,0\n")
    tables = "[data]\npictures = '.'\n[model]\nrecogniser = 'model.safetensors'\n[train]\nsteps = 2\nbatch = 2\n"
    Path("e.toml").write_text(f"task = 'head'\n{tables}")
    links = {"link.png": "a.png", "w.onnx": "w.safetensors", "w.plan": "w.safetensors", "t.csv": "w.safetensors"}
    links["page.html"] = {"explain a": "page.png", "report li": "pictures.zip", "report na": "a.png"}.get(line[:9], "-")
    for name, target in links.items():
        os.symlink(target, name)
    before = {path: path.read_bytes() for path in Path().iterdir() if path.exists()}
    trouble(run(*line.split(), env={"XCOS_MODEL": "w.safetensors"}), f"xcos: {option}: expected", which)
    assert {path: path.read_bytes() for path in Path().iterdir() if path.exists()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify"], "Missing argument"),
        (["verify", "a.jpg"], "Missing argument"),
        (["verify", "a", "b", "c"], "unexpected extra argument"),
        (["verify", "a", "b", "--threshold", "high"], "expected a number, got 'high'"),
        (["verify", "a", "b", "--threshold", "nan"], "expected a finite number, got nan"),
        (["verify", "a", "b", "--face", "best"], "best"),
        (["verify", "a", "b", "--max-pixels", "0"], "0"),
        (["verify", "a", "b", "--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["Verfy"], "No such command 'Verfy'. Did you mean 'verify'?"),
        (["evaluate", "verificaton"], "Did you mean 'verification'?"),
        (["demo", "one.jpg"], "unexpected extra argument"),
        (["plug", "w.pt"], "Missing option"),
        # An empty path, which a variable that was not set gives, is the working folder to the file system.
        (["enroll", "", "a.jpg"], "'GALLERY': expected a path, got an empty text"),
        (["search", "g", "a.jpg", ""], "'PROBES...': expected a path, got an empty text"),
        (["verify", "a.jpg", ""], "'B': expected a path, got an empty text"),
        (["verify", "a.jpg", "b.jpg", "--model", ""], "'--model': expected a path, got an empty text"),
        (["train", "x.toml", "--out", ""], "'--out': expected a path, got an empty text"),
        (["report", "x.csv", "--html", ""], "'--html': expected a path, got an empty text"),
        (["gallery", "compact", "g", "--timeout", "nan"], "expected a finite number, got nan"),
        (["gallery", "compact", "g", "--timeout", "1e999"], "expected a finite number, got 1e999"),
        (["bench", "--threads", "9" * 30], "not in the range 1<=x<=1024"),
        (["export", "onnx", "--out", "a.onnx", "--opset", "9" * 30], "of at most 64 bits"),
        (["verify", "a.jpg", "b.jpg", "--max-pixels", "1e6"], "'1e6' is not a valid integer"),
    ],
)
def test_usage_errors(arguments: list[str], words: str) -> None:
    line = trouble(run(*arguments), words)
    assert "--help" in line


def test_detector_setting(photos: dict[str, str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "y.onnx").write_bytes(b"no network")
    for spec, words in (
        ("mtcnn", "mtcnn: no such file, and no such name. Known are small, yunet"),
        (str(tmp_path / "none.onnx"), "none.onnx: no such file"),
        (str(tmp_path / "y.onnx"), "not a YuNet network"),
    ):
        trouble(run("verify", photos["a"], photos["a"], "--model", model, "--detector", spec), words)


def test_any_exception_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from xcos_ext.cli import info

    def fail(as_json: bool) -> int:
        raise RuntimeError("first line\nsecond \x1b[31mline")

    monkeypatch.setattr(info.run, "callback", fail)
    line = trouble(run("info"), "RuntimeError: first line second")
    assert "\x1b" not in line
    debug = run("info", env={"XCOS_DEBUG": "1"})
    assert debug.exit_code == 2
    assert "Traceback" in debug.stderr


def test_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from xcos_ext.cli import info

    def interrupted(as_json: bool) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info.run, "callback", interrupted)
    result = run("info")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


def test_json_refuses_what_it_cannot_hold() -> None:
    from xcos_ext.cli.console import print_json
    from xcos_ext.io.errors import XCosError

    with pytest.raises(XCosError, match="not finite"):
        print_json({"a": float("nan")})


def test_names_in_what_is_printed_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from xcos_ext.cli.console import echo, note, print_rows, print_tables, table

    name = "\x1b]0;mine\x07\n\u202e[/red]"
    echo(name)
    print_rows(("model", name))
    print_tables(table(f"{name}: 3 pairs", ["a"]))
    note("x" * 10_000 + name)
    printed = capsys.readouterr()
    assert all(line.isprintable() for line in (printed.out + printed.err).splitlines())
    # The title of a narrow table goes over several lines.
    assert "".join(printed.out.split()).count(r"\x1b]0;mine\x07\n\u202e[/red]") == 3
    assert len(printed.err) < 5000


@pytest.mark.parametrize("width", [None, 150, 80, 50])
def test_tables_are_whole_at_any_width(
    width: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xcos_ext.bench import tables
    from xcos_ext.cli.bench import _say
    from xcos_ext.cli.console import print_tables, table

    if width is not None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))
    said = [
        ["backbone", "1", "for_inference (channels_last)", "cpu", "96.1 ms (95.9 \u2013 98.2)", "10,123 pictures/s"]
    ]
    columns = ["stage", "batch", "runtime", "device", "p50 of a call (95 %)", "throughput"]
    _say([tables.Table("Share of a pair's time; aim for the head", columns, 4, 2, said)], [])
    other = table("A model: 3 pairs", ["attention", *(f"TAR % at FMR {rate:g}" for rate in (0.1, 0.01, 0.001))])
    other.add_row("[italic]symmetric[/italic]", *3 * ["99.10\n\\[99.10, 99.50]"])
    print_tables(other)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert width is None or max(map(len, lines)) <= width
    words = [re.findall(r"[^ \u2502\u2503]+", line) for line in lines]
    found = {word for line in words for word in line}
    for cell in (*columns, *said[0], "head", "symmetric", "0.001", "[99.10,", "99.50]"):
        assert set(cell.split()) <= found, cell


# --- info, demo, plug


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0
    for word in (
        "library: isa",
        "library: cuda",
        "torch",
        "python",
        "pillow",
        "GPU",
        "processor",
        "pylance",
        "pyarrow",
    ):
        assert word in result.stdout
    data = strict(run("info", "--json").stdout)
    assert data["xcos_ext"] == xcos_ext.__version__
    assert data["library"]["isa"] in data["library"]["isa_compiled"]
    assert data["torch"]["version"] == torch.__version__
    assert isinstance(data["gpus"], list)


def test_info_survives_failing_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    from xcos_ext.cli import info

    def fail() -> None:
        raise OSError("probe broken")

    for name in ("_torch", "_gpus", "_processor"):
        monkeypatch.setattr(info, name, fail)
    result = run("info")
    assert result.exit_code == 0
    assert result.stdout.count("failed: OSError: probe broken") == 3
    assert strict(run("info", "--json").stdout)["torch"] == {"error": "OSError: probe broken"}
    monkeypatch.setattr(info, "_library", fail)
    assert run("info").exit_code == 2


@pytest.mark.thorough
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xcos_ext.cli import demo

    for name, value in (("_PAIRS", 64), ("_GALLERY", 13_000), ("_SECONDS", 0.02)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.chdir(tmp_path)
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert "the planted face 12345 is first" in result.stdout
    assert "results agree: yes" in result.stdout
    assert os.listdir(tmp_path) == ["xcos_demo.png"]
    data = strict(run("demo", "--json", "--out", "d.svg").stdout)
    assert data["agree"] is True
    assert data["search"]["found"] is True
    assert [job["agree"] for job in data["jobs"]] == [True] * 4
    assert all(job["largest_difference"] < 2e-5 for job in data["jobs"])
    trouble(run("demo", "--out", "d.gif"), "d.gif: expected a file ending in .png")


def test_demo_says_when_results_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xcos_ext.cli import demo

    for name, value in (("_PAIRS", 16), ("_GALLERY", 12_400), ("_SECONDS", 0.01)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "eager_score", lambda a, b: demo_score(a, b) + 0.01)
    result = run("demo", "--out", tmp_path / "d.png")
    assert result.exit_code == 2
    assert "disagree" in result.stderr


def demo_score(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=1).mean((1, 2))


@pytest.fixture(scope="module")
def people(folder: Path) -> Path:
    rng = np.random.default_rng(3)
    for i in range(24):
        (folder / "people" / f"p{i:02d}").mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(
            folder / "people" / f"p{i:02d}" / "1.png"
        )
    return folder / "people"


def test_plug(recogniser: Path, people: Path, photos: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    result = run("plug", recogniser, "--faces", people, "--out", out, "--threshold", "0.4", "--project", "16")
    assert result.exit_code == 0, result.output
    assert re.search(r"^threshold +0\.4000 \(given\)$", result.stdout, re.M)
    loaded = load_model(out)
    assert loaded.threshold == 0.4
    assert loaded.features(torch.zeros(1, 3, 112, 112)).shape == (1, 16, 7, 7)
    assert run("verify", photos["crop1"], photos["crop1"], "--aligned", "--model", out).exit_code == 0
    few = run("plug", recogniser, "--faces", people, "--out", out, "--json")
    assert strict(few.stdout)["threshold"] is None
    assert len(strict(few.stdout)["not_like_a_face"]) == 24 and "p00/1.png: it does not look like a face" in few.stderr
    assert "24 people are too few to find a threshold" in few.stderr


@pytest.mark.thorough
def test_plug_finds_a_threshold(
    recogniser: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xcos_ext.cli import plug as command

    monkeypatch.setattr(command, "_EXPECTED_MATCHES", 0.1)
    # The library's own guard against too few pairs, of which these few pictures make 276.
    import xcos_ext.evaluation as evaluation
    from xcos_ext.card import Calibration

    seen: dict[str, Any] = {}

    def calibrate(model: Any, features: torch.Tensor, names: list[str], **how: Any) -> Calibration:
        seen.update(how, features=features, names=names)
        scores = evaluation.all_pair_scores(model, features, names)[0]
        return Calibration(threshold=float(np.quantile(scores, 0.9)), rule="")

    monkeypatch.setattr(evaluation, "calibrate", calibrate)
    result = run("plug", recogniser, "--faces", people, "--out", tmp_path / "m.safetensors")
    assert result.exit_code == 0, result.output
    assert seen["features"].shape[0] == len(seen["names"]) == 24
    assert seen["fmrs"] == [1e-1, 1e-2, 1e-3]
    assert "false match rate 0.005 over 276 impostor pairs" in result.stdout
    assert load_model(tmp_path / "m.safetensors").threshold is not None


@pytest.mark.thorough
def test_plug_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from xcos_ext.cli.plug import _people

    (tmp_path / "ann").mkdir()
    for name in ("ann/1.png", "ann/2.heic", "loose.png"):
        (tmp_path / name).touch()
    with pytest.raises(PictureError, match="at least 20 people"):
        _people(str(tmp_path), 1000)
    told = capsys.readouterr().err
    assert "xcos: left out ann/2.heic: not a picture by its suffix" in told
    assert "xcos: left out loose.png: a picture in no person's folder" in told


def test_plug_trouble(recogniser: Path, model: Path, people: Path, photos: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    trouble(run("plug", recogniser, "--faces", people, "--out", tmp_path / "m.pt"), "m.pt: expected a file ending in")
    trouble(run("plug", recogniser, "--faces", tmp_path / "none", "--out", out), "none")
    trouble(run("plug", recogniser, "--faces", recogniser, "--out", out), "recogniser.pt")
    trouble(run("plug", tmp_path / "none.pt", "--faces", people, "--out", out), "none.pt")
    trouble(run("plug", model, "--faces", people, "--out", out), "model.safetensors")
    trouble(run("plug", recogniser, "--faces", people, "--out", out, "--limit", "5"), "at least 20 people")
    trouble(run("plug", recogniser, "--faces", people, "--out", out, "--project", "30"), "30 axes")
    (tmp_path / "x" / "p").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "x" / f"p{i}").mkdir()
        Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(tmp_path / "x" / f"p{i}" / "1.png")
    trouble(
        run("plug", recogniser, "--faces", tmp_path / "x", "--out", out),
        "p0/1.png: expected an aligned crop of 112 x 112 pixels, got 50 x 50",
    )
    assert not out.exists()


# --- as a process


def process(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    env.pop("XCOS_MODEL", None)
    return subprocess.run(
        [sys.executable, "-m", "xcos_ext", *arguments],
        text=True,
        env=env,
        timeout=120,
        **{"capture_output": True, **how},
    )


@pytest.mark.process
def test_help_is_quick_and_imports_nothing_heavy() -> None:
    process("--help")  # compiles what is not compiled
    start = time.perf_counter()
    result = process("--help")
    assert time.perf_counter() - start < 1.5
    assert result.returncode == 0
    commands = dict(re.findall(r"^  ([a-z]+) {2,}(\S.*)$", result.stdout.partition("Commands:")[2], re.M))
    assert set(commands) == set(xcos.list_commands(click.Context(xcos)))
    assert not [text for text in commands.values() if not text.endswith((".", "?")) or text.endswith("...")]
    code = (
        "import sys; from xcos_ext.cli.app import xcos; xcos(sys.argv[1:], standalone_mode=False); "
        "print([m for m in ('torch', 'cv2', 'numpy', 'PIL', 'matplotlib', 'rich') if m in sys.modules])"
    )
    for arguments in ([], ["verify", "--help"], ["evaluate", "faithfulness", "--help"]):
        command = [sys.executable, "-c", code, *arguments]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("\n[]\n")


def test_a_working_folder_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.getcwd", lambda: os.stat(tmp_path / "gone"))
    trouble(run("info"), "the working folder cannot be used (No such file or directory)")


@pytest.mark.parametrize("name", ["pipe", "device"])
def test_what_is_no_regular_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    path = tmp_path / "pipe" if name == "pipe" else Path("/dev/zero")
    if name == "pipe":
        os.mkfifo(path)
    trouble(run("train", path), f"{path}: expected a TOML file, got something that is not a regular file")
    trouble(run("evaluate", "verification", "--pairs", path), f"{path}: expected a list of pairs, got something")
    trouble(run("plug", "slim", "--faces", path, "--out", tmp_path / "m.safetensors"), "zip archive, got something")


def test_help_says_what_is_taken() -> None:
    def pages(group: click.Group, *names: str) -> Iterator[str]:
        for name in group.list_commands(click.Context(group)):
            found = group.get_command(click.Context(group), name)
            yield from (
                pages(found, *names, name) if isinstance(found, click.Group) else [run(*names, name, "--help").stdout]
            )

    shown = list(pages(xcos))
    assert len(shown) > 15 and not any("None" in page for page in shown)
    assert all(".onnx)" in " ".join(run(name, "--help").stdout.split()) for name in ("verify", "explain"))


def test_version_and_no_arguments() -> None:
    assert run("--version").stdout == f"xcos {xcos_ext.__version__}\n"
    assert run().exit_code == 0
    assert "Usage: " in run().stdout
    for command in ("verify", "info", "demo", "plug"):
        assert run(command, "--help").exit_code == 0


@pytest.mark.process
def test_statuses_of_the_process(photos: dict[str, str], model: Path) -> None:
    same = process("verify", photos["crop1"], photos["crop1"], "--aligned", "--model", str(model), "--json")
    unlike = "it does not look like a face, so its scores say nothing about a person (--strict refuses it)"
    twice = "Both crops are the same picture, pixel by pixel: the score says nothing about the person"
    assert (same.returncode, same.stderr) == (0, f"xcos: {photos['crop1']}: {unlike}\nxcos: {twice}\n")  # of noise
    assert strict(same.stdout)["same"] is True
    different = process(
        "verify", photos["crop1"], photos["crop2"], "--aligned", "--model", str(model), "--threshold", "1"
    )
    assert different.returncode == 1
    missing = process("verify", "none.jpg", "none.jpg", "--model", str(model))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == "xcos: none.jpg: no such file\n"


@pytest.mark.process
def test_names_that_are_not_utf8(photos: dict[str, str], model: Path, tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    Path(os.fsdecode(raw)).write_bytes(Path(photos["crop1"]).read_bytes())
    arguments = ("verify", os.fsdecode(raw), os.fsdecode(raw), "--aligned", "--model", str(model), "--json")
    for env in ({"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        result = process(*arguments, env=env)
        assert result.returncode == 0, result.stderr
        assert strict(result.stdout)["a"]["picture"].endswith("\\xff\\xfe.png")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8", "latin-1:replace"])
def test_any_encoding_will_do(
    encoding: str, photos: dict[str, str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an encoding lacks is written otherwise: the numbers' minus, and letters of names."""
    name, _, errors = encoding.partition(":")
    odd = tmp_path / "zo\u00eb\u0416.png"
    odd.write_bytes(Path(photos["crop1"]).read_bytes())

    def lines(*arguments: str) -> tuple[int, str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=name, errors=errors or "strict") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            status = xcos(list(arguments), standalone_mode=False)
            for stream in streams:
                stream.flush()
        out, err = (stream.buffer.getvalue().decode(name) for stream in streams)  # type: ignore[attr-defined]
        return status, out, err

    common = (str(odd), photos["crop2"], "--aligned", "--model", str(model))
    status, out, err = lines("explain", *common, "--threshold", "2")
    assert status == 1 and "Different people" in out
    minus = {"utf-8": "\u2212", "latin-1:replace": "?"}.get(encoding, "-")
    assert re.search(rf"^sides .* {re.escape(minus)}\d\.\d{{3}}", out, re.M)
    shown = {"utf-8": "zo\u00eb\u0416", "ascii": "zo\\xeb\\u0416", "latin-1:replace": "zo\u00eb?"}
    assert f"{shown.get(encoding, chr(92).join(('zo' + chr(0xEB), 'u0416')))}.png" in err
    status, out, _ = lines("verify", *common, "--json", "--threshold", "2")
    assert status == 1 and strict(out)["a"]["picture"] == str(odd)


@pytest.mark.process
def test_closed_full_and_broken_stdout(photos: dict[str, str], model: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m xcos_ext"
    verify = f"verify {photos['crop1']} {photos['crop1']} --aligned --model {model} --out {tmp_path}/o.png"

    def shell(text: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=env, timeout=120)

    closed = shell(f"{command} {verify} >&-")
    assert closed.returncode == 0 and closed.stderr.endswith("the score says nothing about the person\n")
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")  # nothing was printed into it
    assert shell(f"{command} {verify} 2>&- >&- <&-").returncode == 0
    silent = shell(f"{command} verify none.jpg none.jpg --json 2>&-")
    assert (silent.returncode, silent.stdout) == (2, "")  # what is said on stderr is no JSON
    broken = shell(f"{command} info | true; exit ${{PIPESTATUS[0]}}")
    assert (broken.returncode, broken.stderr) == (2, "")
    if os.path.exists("/dev/full"):
        full = shell(f"{command} info > /dev/full")
        assert full.returncode == 2
        assert full.stderr == "xcos: stdout: cannot be written: No space left on device\n"


@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
def test_ctrl_c() -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            # Jobs in the background are started with the signal ignored.
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "import xcos_ext.cli.info as i, time; i.run.callback = lambda as_json: time.sleep(60); "
            "import sys; sys.argv = ['xcos', 'info']; from xcos_ext.cli import main; "
            "print('ready', flush=True); main()",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.7)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (130, "", "")


@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
def test_sigterm_leaves_no_temporary_file(tmp_path: Path) -> None:
    code = (
        "import sys, time; import xcos_ext.cli.info as i; from xcos_ext.io.atomic import write_atomically; "
        "wait = lambda file: (print('ready', flush=True), time.sleep(60)); "
        "i.run.callback = lambda as_json: write_atomically(sys.argv.pop(), wait); "
        "sys.argv = ['xcos', 'info', sys.argv[1]]; from xcos_ext.cli.app import xcos; xcos(['info'])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.txt")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 1
    child.terminate()
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err, list(tmp_path.iterdir())) == (-signal.SIGTERM, "", [])


@pytest.mark.process
def test_missing_packages_are_named() -> None:
    def without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        code = (
            f"import sys; sys.modules[{module!r}] = None; sys.argv = ['xcos', *{list(arguments)!r}]; "
            "from xcos_ext.cli import main; main()"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    for module, package, arguments in (
        ("click", "click", ("--help",)),
        ("PIL", "pillow", ("verify", __file__, __file__, "--model", __file__)),
        ("matplotlib", "matplotlib", ("verify", __file__, __file__, "--model", __file__, "--out", "a.png")),
    ):
        result = without(module, *arguments)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert package in result.stderr and "pip install 'xcos_ext[cli]'" in result.stderr, result.stderr


def test_a_file_called_as_an_option_is_a_file(photos: dict[str, str]) -> None:
    assert trouble(run("verify", "model", photos["a"])).startswith("xcos: model: no such file")


def test_the_demo_measures_where_no_picture_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_PAIRS": 8, "_GALLERY": 13_000, "_SECONDS": 0.001, "_SHARE": 8}.items():
        monkeypatch.setattr(f"xcos_ext.cli.demo.{name}", value)
    (tmp_path / "xcos_demo.png").mkdir()
    monkeypatch.chdir(tmp_path)
    found = run("demo", "--json")
    assert found.exit_code == 0 and "no picture is drawn (choose a place with --out)" in found.stderr
    assert "picture" not in strict(found.stdout)


@pytest.mark.parametrize(("value", "message"), [("20,20", "whole number"), ("x", "whole number"), ("7", "at least 20")])
def test_replicates_are_one_number(value: str, message: str) -> None:
    trouble(run("evaluate", "verification", "--pairs", "pairs.txt", "--bootstrap", value), message)
