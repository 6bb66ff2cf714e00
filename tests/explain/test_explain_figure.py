"""The figure of a decision, and files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from xcos_ext.explain import check_figure_path, contribution, save_figure, verification_figure
from xcos_ext.io.atomic import OutputError, check_output, write_atomically
from xcos_ext.ops import XCosScore


def result(height: int = 7, width: int = 7, seed: int = 0) -> XCosScore:
    generator = torch.Generator().manual_seed(seed)
    similarity = 2 * torch.rand(1, height, width, generator=generator) - 1
    attention = torch.rand(1, height, width, generator=generator)
    attention /= attention.sum()
    return XCosScore((similarity * attention).sum((1, 2)), similarity, attention)


def faces() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (112, 112, 3), dtype=np.uint8), rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)


def words(figure: object) -> str:
    """Everything that is written in a figure."""
    import matplotlib.text

    texts = [t.get_text() for t in figure.findobj(matplotlib.text.Text)]  # type: ignore[attr-defined]
    return "\n".join(t for t in texts if t)


# --- what it shows


def test_contribution_adds_up_to_the_margin() -> None:
    r = result()
    parts = contribution(r.similarity[0].numpy(), r.attention[0].numpy(), 0.2)
    assert parts.shape == (7, 7)
    assert parts.dtype == np.float64
    assert parts.sum() == pytest.approx(float(r.score) - 0.2, abs=1e-6)


@pytest.mark.parametrize(("threshold", "verdict", "sign"), [(-0.5, "same person", "≥"), (0.5, "different people", "<")])
def test_title_and_values(threshold: float, verdict: str, sign: str) -> None:
    r = result()
    text = words(verification_figure(*faces(), r, threshold, names=("a.jpg", "b.jpg"), note="the model"))
    score = f"{float(r.score):.3f}".replace("-", "−")
    bound = f"{threshold:.3f}".replace("-", "−")
    assert verdict in text
    assert f"score {score} {sign} threshold {bound}" in text
    assert {"a.jpg", "b.jpg", "the model"} <= set(text.split("\n"))
    parts = contribution(r.similarity[0].numpy(), r.attention[0].numpy(), threshold)
    for values, form in (
        (r.similarity[0].numpy(), "{:.2f}"),
        (100 * r.attention[0].numpy(), "{:.1f}"),
        (100 * parts, "{:+.1f}"),
    ):
        shown = [form.format(v) for v in values.ravel()]
        expected = {(form.format(0).lstrip("+") if float(t) == 0 else t).replace("-", "−") for t in shown}
        assert expected <= set(text.split("\n"))
    assert "-" not in "".join(re.findall(r"[-−]\d", text))  # minus signs, not hyphens


def test_on_the_threshold_is_the_same_person() -> None:
    r = SimpleNamespace(score=np.float64(0.25), similarity=np.full((7, 7), 0.25), attention=np.full((7, 7), 1 / 49))
    assert "same person" in words(verification_figure(None, None, r, 0.25))


@pytest.mark.parametrize(
    ("cosines", "said"),
    [
        ((0.9, 0.9), "2 cells for\n+0.600\n0 cells against\n0.000"),
        ((0.9, 0.1), "1 cell for\n+0.300\n1 cell against\n\u22120.100"),
    ],
)
def test_the_budget_counts_cells_and_the_threshold_crosses_no_word(cosines: tuple[float, float], said: str) -> None:
    maps = np.array([cosines]), np.array([[0.5, 0.5]])
    figure = verification_figure(
        *faces(), SimpleNamespace(score=np.mean(cosines), similarity=maps[0], attention=maps[1]), 0.3
    )
    assert said in words(figure)
    budget = next(axes for axes in figure.axes if "score" in {text.get_text() for text in axes.texts})
    assert all(text.get_bbox_patch().get_facecolor() == (1, 1, 1, 1) for text in budget.texts)


def test_colours_are_centred() -> None:
    figure = verification_figure(*faces(), result(), 0.25)
    images = {axes.get_title(loc="left"): axes.images[0] for axes in figure.axes if axes.images}
    similarity = images["similarity S"]
    assert similarity.norm.vmin + similarity.norm.vmax == pytest.approx(2 * 0.25)
    assert similarity.norm.vmax == pytest.approx(1)
    part = next(image for title, image in images.items() if title.startswith("contribution"))
    assert part.norm.vmin == -part.norm.vmax
    assert images["attention W, %"].norm.vmin == 0
    blue, red = part.cmap(1.0), part.cmap(0.0)
    assert blue[2] > blue[0] and red[0] > red[2]  # blue speaks for the same person


def test_grid_is_that_of_the_cells() -> None:
    figure = verification_figure(*faces(), result(5, 4), 0.25)
    face = next(axes for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 3)
    positions = {round(float(line.get_xdata()[0]), 6) for line in face.lines if len(set(line.get_xdata())) == 1}
    assert positions == {1, 2, 3}


def test_heading_without_faces() -> None:
    text = words(verification_figure(None, None, result(), 0.25, heading="generated feature maps"))
    assert "generated feature maps" in text
    assert "person" not in text


@pytest.mark.thorough
def test_names_are_text_not_formulas(tmp_path: Path) -> None:
    names = ("cost$\\frac{$.jpg", "a_very_long_name_" * 5 + "end.jpg")
    figure = verification_figure(*faces(), result(), 0.25, names=names, note="$x$ 日本 \\alpha")
    save_figure(figure, tmp_path / "a.png")
    text = words(figure)
    assert names[0] in text
    assert "…" in text and "end.jpg" in text


@pytest.mark.thorough
def test_extreme_values(tmp_path: Path) -> None:
    """All the same, saturated, tiny weights, a large grid, a threshold of 1."""
    flat = SimpleNamespace(score=1.0, similarity=np.ones((7, 7)), attention=np.full((7, 7), 1 / 49))
    one = np.zeros((7, 7))
    one[3, 3] = 1
    peak = SimpleNamespace(score=-1.0, similarity=-np.ones((7, 7)), attention=one)
    zero = SimpleNamespace(score=0.0, similarity=np.zeros((7, 7)), attention=np.full((7, 7), 1 / 49))
    for i, (r, t) in enumerate(
        [(flat, 0.3), (flat, 1.0), (peak, 0.3), (zero, 0.0), (result(28, 28), 0.3), (result(1, 1), 0)]
    ):
        save_figure(verification_figure(*faces(), r, t), tmp_path / f"{i}.png", dpi=40)


@pytest.mark.thorough
def test_tensors_arrays_and_half_precision_give_the_same_figure(tmp_path: Path) -> None:
    r = result()
    plain = SimpleNamespace(score=float(r.score), similarity=r.similarity[0].numpy(), attention=r.attention[0].numpy())
    graph = XCosScore(*(t.clone().requires_grad_() for t in r))
    for name, given in (("a", r), ("b", plain), ("c", graph)):
        save_figure(verification_figure(*faces(), given, 0.2), tmp_path / f"{name}.png", dpi=50)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    verification_figure(*faces(), XCosScore(*(t.bfloat16() for t in r)), 0.2)


def test_bad_arguments() -> None:
    a, b = faces()
    r = result()
    with pytest.raises(ValueError, match="threshold: expected a finite number or None, got nan"):
        verification_figure(a, b, r, float("nan"))
    with pytest.raises(ValueError, match="result: expected finite values"):
        verification_figure(a, b, XCosScore(r.score * float("nan"), r.similarity, r.attention), 0.2)
    with pytest.raises(ValueError, match="result: expected one pair"):
        verification_figure(a, b, XCosScore(r.score.expand(2), r.similarity, r.attention), 0.2)
    with pytest.raises(ValueError, match="result: expected similarity and attention of one shape"):
        verification_figure(a, b, XCosScore(r.score, r.similarity[:, :6], r.attention), 0.2)
    with pytest.raises(ValueError, match="face_b: expected uint8"):
        verification_figure(a, b.astype(float), r, 0.2)
    with pytest.raises(ValueError, match="expected two faces or none"):
        verification_figure(a, None, r, 0.2)


# --- files


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml"), (".PNG", b"\x89PNG")]
)
def test_formats(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    save_figure(verification_figure(*faces(), result(), 0.2), path)
    assert path.read_bytes().startswith(start)
    assert os.listdir(tmp_path) == [path.name]
    if suffix == ".png":
        with Image.open(path) as picture:
            assert min(picture.size) > 900


@pytest.mark.thorough
def test_same_decision_same_file(tmp_path: Path) -> None:
    for suffix in ("png", "pdf", "svg"):
        for name in "ab":
            save_figure(verification_figure(*faces(), result(), 0.2), tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt", ".png"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"expected a file ending in \.png or \.pdf or \.svg, got"):
        check_figure_path(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no folder"):
        check_figure_path(tmp_path / "no" / "a.png")
    (tmp_path / "d.png").mkdir()
    with pytest.raises(OutputError, match="it is a directory"):
        check_figure_path(tmp_path / "d.png")
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(OutputError, match="not a regular file"):
        check_figure_path(tmp_path / "p.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    with pytest.raises(OutputError, match="not a regular file"):
        check_figure_path(tmp_path / "null.png")
    with pytest.raises(OutputError, match="cannot be written"):
        check_figure_path("/proc/a.png")
    with pytest.raises(OutputError, match="cannot be written"):
        check_figure_path("a\0.png")
    with pytest.raises(OutputError, match="cannot be written"):
        check_figure_path(tmp_path / ("x" * 300 + ".png"))


def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("drawing failed")

    with pytest.raises(RuntimeError, match="drawing failed"):
        write_atomically(path, fail)

    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"a\.png: cannot be written: No space left on device"):
        write_atomically(path, full)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_links_are_followed_and_modes_are_usual(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a.png").symlink_to(tmp_path / "real" / "b.png")
    save_figure(verification_figure(None, None, result(), 0.2), tmp_path / "a.png", dpi=40)
    assert (tmp_path / "a.png").is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "real" / "b.png").stat().st_mode & 0o777 == 0o666 & ~umask


def test_other_suffixes_for_other_files(tmp_path: Path) -> None:
    assert check_output(tmp_path / "m.safetensors", (".safetensors",)) == str((tmp_path / "m.safetensors").resolve())


@pytest.mark.process
def test_nothing_global_is_touched() -> None:
    """No pyplot, no setting changed; and importing the package imports no matplotlib."""
    code = """
import sys, numpy as np
import xcos_ext.explain
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
from types import SimpleNamespace
r = SimpleNamespace(score=0.1, similarity=np.zeros((7, 7)), attention=np.full((7, 7), 1 / 49))
xcos_ext.explain.verification_figure(None, None, r, 0.2)
assert "matplotlib.pyplot" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams)  # this itself imports pyplot
xcos_ext.explain.verification_figure(None, None, r, 0.2)
assert dict(matplotlib.rcParams) == before
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
