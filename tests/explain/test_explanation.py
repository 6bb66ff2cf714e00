"""Explanations: the identity they promise, their words, and what they say where something is missing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run, trouble
from explained import CURVE, crop, toy
from PIL import Image

from xcos_ext.explain import Explanation, Face, ModelCard, explain
from xcos_ext.explain.regions import PARTS, cell_parts
from xcos_ext.faces import ARCFACE_TEMPLATE, AlignedFace
from xcos_ext.io.text import printable, signed
from xcos_ext.model import load_model, save_model

KINDS = ("learned", "uniform", "norm", "symmetric")


def made(similarity: np.ndarray, attention: np.ndarray, threshold: float | None = 0.3, **more: Any) -> Explanation:
    """An explanation of given maps."""
    attention = attention / attention.sum()
    card = ModelCard("m", None, "f", more.pop("attention_kind", "learned"))
    score = more.pop("model_score", float((similarity * attention).sum()))
    return Explanation(similarity, attention, score, threshold, Face(), Face(), card, **more)


# --- arithmetic


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [0.25, -0.7, 0.0, 1.0])
def test_contributions_add_up_exactly(kind: str, threshold: float) -> None:
    model = toy(kind)  # type: ignore[arg-type]
    for seed in range(8):
        e = explain(model, crop(seed), crop(seed + 100), threshold=threshold)
        assert e.contribution is not None and e.margin is not None
        # Rationals: the sum of what is stored, without any rounding of our own.
        exact = sum((Fraction(v) for v in e.contribution.ravel().tolist()), Fraction(0))
        assert abs(exact - (Fraction(e.score) - Fraction(threshold))) < 64 * np.finfo(np.float64).eps
        assert math.fsum(e.contribution.ravel()) == pytest.approx(e.score - threshold, abs=1e-15)
        np.testing.assert_array_equal(e.contribution, e.attention * (e.similarity - threshold))
        assert math.fsum(e.weighted.ravel()) == pytest.approx(e.score, abs=1e-15)
        assert math.fsum(e.attention.ravel()) == pytest.approx(1, abs=1e-15)
        assert e.contribution.dtype == e.attention.dtype == e.similarity.dtype == np.float64


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_the_models_own(kind: str) -> None:
    model = toy(kind)  # type: ignore[arg-type]
    a, b = crop(1), crop(2)
    e = explain(model, a, b)
    with torch.no_grad():
        expected = model(model.preprocessing(a), model.preprocessing(b))
    # The network sees two faces at once there: sums of other orders, so fp32's rounding.
    assert e.model_score == pytest.approx(float(expected.score), abs=1e-6)
    assert e.score == pytest.approx(float(expected.score), abs=1e-6)
    np.testing.assert_allclose(e.similarity, expected.similarity[0], atol=1e-6)
    np.testing.assert_allclose(e.attention, expected.attention[0], atol=1e-6)
    assert e.same is (e.score >= 0.25)


def test_tolerance_is_that_of_the_models_type() -> None:
    assert explain(toy(), crop(1), crop(2)).eps == np.finfo(np.float32).eps
    coarse = made(np.full((7, 7), 0.5), np.ones((7, 7)), model_score=0.505, eps=2.0**-10)
    assert coarse.score == 0.5 and coarse.model_score == 0.505


def test_what_does_not_add_up_is_refused() -> None:
    s, w = np.full((7, 7), 0.5), np.ones((7, 7))
    with pytest.raises(ValueError, match=r"model_score: expected 0\.5"):
        made(s, w, model_score=0.51)
    card = ModelCard("m", None, "f", "learned")
    with pytest.raises(ValueError, match="attention: expected weights that are not negative and sum to 1"):
        Explanation(s, w, 24.5, 0.3, Face(), Face(), card)
    bad = np.full((7, 7), 1.0)
    bad[0, 0] = -1
    with pytest.raises(ValueError, match="attention: expected weights that are not negative"):
        made(s, bad)
    for similarity, attention in (
        (np.full((7, 7), np.nan), w / 49),
        (np.ones((7, 6)), w / 49),
        (np.ones(49), np.ones(49) / 49),
    ):
        with pytest.raises(ValueError, match="result: expected"):
            Explanation(similarity, attention, 1.0, 0.3, Face(), Face(), card)
    with pytest.raises(ValueError, match="threshold: expected a finite number or None, got nan"):
        made(s, w, math.nan)


def test_frozen() -> None:
    e = explain(toy(), crop(1), crop(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.score = 1.0  # type: ignore[misc]
    for values in (e.similarity, e.attention, e.contribution):
        assert values is not None
        with pytest.raises(ValueError, match="read-only"):
            values[0, 0] = 0


def test_the_callers_maps_are_not_touched() -> None:
    s, w = np.full((3, 3), 0.5), np.full((3, 3), 1 / 9 + 1e-8)
    before = w.copy()
    made(s, w)
    np.testing.assert_array_equal(w, before)
    w[0, 0] = 0  # still the caller's to write


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_any_gradient_mode(context: Any) -> None:
    model = toy()
    with context():
        e = explain(model, crop(1), crop(2))
    assert e.score == explain(model, crop(1), crop(2)).score
    assert all(p.grad is None for p in model.parameters())


# --- parts of the face


def test_parts_of_the_template() -> None:
    drawn = """
        s F F F F F s
        s F F F F F s
        s l l N r r s
        s l l N r r s
        s c c N k k s
        s c M M M k s
        s C C C C C s
    """
    letters = dict(zip("FlrNckMCs", PARTS, strict=True))
    expected = [[PARTS.index(letters[letter]) for letter in line.split()] for line in drawn.strip().splitlines()]
    np.testing.assert_array_equal(cell_parts((7, 7)), expected)


@pytest.mark.parametrize("cells", [(7, 7), (1, 1), (14, 14), (5, 9), (28, 28)])
def test_regions_are_a_partition(cells: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    e = made(rng.uniform(-1, 1, cells), rng.uniform(0, 1, cells))
    seen = [cell for region in e.regions for cell in region.cells]
    assert len(seen) == len(set(seen)) == cells[0] * cells[1]
    assert math.fsum(r.share for r in e.regions) == pytest.approx(1, abs=1e-12)
    assert math.fsum(r.contribution for r in e.regions) == pytest.approx(e.score - 0.3, abs=1e-14)
    for region in e.regions:
        rows, columns = np.array(region.cells).T
        assert e.contribution is not None
        assert region.similarity == pytest.approx(e.similarity[rows, columns].mean())
        assert region.contribution == pytest.approx(e.contribution[rows, columns].sum())


def test_parts_follow_the_landmarks() -> None:
    size = (112, 112)
    shifted = cell_parts((14, 14), size, ARCFACE_TEMPLATE + np.array([16, 0]))
    straight = cell_parts((14, 14), size)
    np.testing.assert_array_equal(shifted[:, 4:], straight[:, 2:-2])  # two columns of eight pixels
    # A template on a crop of another size is the same drawing.
    np.testing.assert_array_equal(cell_parts((7, 7), (224, 224)), cell_parts((7, 7)))
    angle = math.radians(90)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turned = cell_parts((7, 7), size, (ARCFACE_TEMPLATE - 55.5) @ turn.T + 55.5)
    np.testing.assert_array_equal(turned, np.rot90(cell_parts((7, 7)), -1))


def test_landmarks_of_both_faces_are_averaged() -> None:
    model = toy()
    up, down = (ARCFACE_TEMPLATE + np.array([0, y]) for y in (-8, 8))
    both = explain(model, crop(1), crop(2), landmarks_a=up, landmarks_b=down)
    one = explain(model, crop(1), crop(2), landmarks_a=up)
    plain = explain(model, crop(1), crop(2))
    assert [r.cells for r in both.regions] == [r.cells for r in plain.regions]
    assert [r.cells for r in one.regions] != [r.cells for r in plain.regions]
    assert one.score == plain.score


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (np.zeros((4, 2)), r"five finite points \[5, 2\], got shape \[4, 2\]"),
        (np.full((5, 2), np.nan), "five finite points"),
        (np.zeros((5, 2)), "two eyes apart"),
        ("points", r"five points \[5, 2\], got str"),
        (ARCFACE_TEMPLATE[[1, 0, 2, 4, 3]], r".* as in the picture, got eyes the other way round: \[\[73.5, 51.5\]"),
        (ARCFACE_TEMPLATE[[0, 1, 2, 4, 3]], r".* got corners of the mouth the other way round"),
        (ARCFACE_TEMPLATE[:, ::-1], r".* got eyes the other way round"),  # (y, x)
        (111 - ARCFACE_TEMPLATE, r".* got eyes that are not above the mouth"),
    ],
)
def test_landmarks_that_cannot_be(points: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"landmarks_b: expected {words}"):
        explain(toy(), crop(1), crop(2), landmarks_b=points)


# --- words


def test_words_follow_the_signs() -> None:
    s = np.full((7, 7), 0.9)
    s[6, 1:6] = -0.5
    w = np.ones((7, 7))
    w[:, [0, 6]] = 1e-4
    e = made(s, w, 0.3)
    words = {r.name: r.word for r in e.regions}
    assert words["chin"] == "differs"
    assert words["sides"] == "counts little"
    assert {words[n] for n in ("forehead", "left eye", "right eye", "nose")} == {"agrees"}
    assert "Against it" in str(e) and "chin \u2212" in str(e)
    assert e.summary.startswith("Same person: score ") and " above the threshold 0.3000." in e.summary
    other = made(-s, w, 0.3)
    assert other.summary.startswith("Different people: score ") and " below the threshold" in other.summary


def test_a_score_beside_the_threshold_is_printed_as_what_it_is() -> None:
    below = made(np.full((1, 2), 0.5800753), np.ones((1, 2)), 0.5800756)
    assert below.same is False and below.printed == ("0.5800753", "0.5800756")
    assert below.summary.startswith("Different people: score 0.5800753 is 0.0000003 below the threshold 0.5800756.")
    assert "score 0.5800753, threshold 0.5800756" in repr(below)
    on = made(np.full((1, 2), 0.5), np.ones((1, 2)), 0.5)
    assert on.same is True and on.printed == ("0.5000", "0.5000")


def test_uncertainty_in_false_match_rates() -> None:
    w = np.ones((7, 7))
    e = made(np.full((7, 7), 0.5), w, 0.0, curve=CURVE)
    assert e.fmr == CURVE.at(e.score) and e.fmr_at_threshold == CURVE.at(0.0)
    assert e.certainty.startswith("The share of impostor pairs that score at least 0.500 is 1.0 %")
    assert "at the threshold it is 10 %" in e.certainty and ": 10 times fewer." in e.certainty
    below = made(np.full((7, 7), 0.0), w, 0.5, curve=CURVE)
    assert "10 times more" in below.certainty
    high = made(np.full((7, 7), 0.95), w, 0.5, curve=CURVE)
    assert "the smallest this calibration resolves" in high.certainty and "fewer" not in high.certainty
    people = made(np.full((7, 7), 0.5), w, 0.0, curve=dataclasses.replace(CURVE, people=46))
    assert ". Measured on 1,000 impostor pairs of 46 people: on other people" in people.certainty
    sets = dataclasses.replace(CURVE, people=46, domains=("LFW", "CFP"))
    assert "of 46 people; the worse of LFW and CFP: on" in made(np.full((7, 7), 0.5), w, 0.0, curve=sets).certainty


def test_without_calibration() -> None:
    e = explain(toy(threshold=None, curve=None), crop(1), crop(2))
    assert (e.same, e.margin, e.contribution, e.fmr, e.fmr_at_threshold) == (None,) * 5
    assert e.verdict == "no verdict"
    assert "not calibrated" in e.certainty
    assert any("not calibrated" in remark for remark in e.remarks)
    assert {r.word for r in e.regions} <= {"much weight", "usual weight", "little weight"}
    assert math.fsum(r.contribution for r in e.regions) == pytest.approx(e.score, abs=1e-14)
    data = e.as_dict()
    assert data["same"] is data["threshold"] is data["contribution"] is data["fmr"] is None
    assert all(region["contribution"] is None for region in data["regions"])
    given = explain(toy(threshold=None, curve=None), crop(1), crop(2), threshold=0.1)
    assert given.same is (given.score >= 0.1) and given.given
    assert any("was given for this comparison" in remark for remark in given.remarks)


@pytest.mark.parametrize("kind", ["uniform", "norm"])
def test_models_without_attention_say_so(kind: Any) -> None:
    e = explain(toy(kind), crop(1), crop(2))
    assert e.model.attention == kind
    assert any(f"{kind}, not learned" in remark for remark in e.remarks)
    if kind == "uniform":
        np.testing.assert_allclose(e.attention, 1 / 49)
    assert not any("learned" in r for r in explain(toy(), crop(1), crop(2)).remarks)


def test_closed_form_weighs_by_norms() -> None:
    from xcos_ext import backbones
    from xcos_ext.model import plug

    torch.manual_seed(0)
    faces = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    model = plug(backbones.create("mobilefacenet").eval(), faces, threshold=0.5)
    e = explain(model, crop(1), crop(2))
    assert e.model.attention == "norm"
    assert e.curve is None and "not calibrated" in e.certainty


def test_identical_pictures() -> None:
    model = toy()
    same = explain(model, crop(1), crop(1).copy())
    assert same.identical == "pictures" and same.score == pytest.approx(1, abs=1e-6)
    assert "pixel by pixel" in str(same)
    assert explain(model, crop(1), crop(2)).identical is None


def test_features_that_are_equal() -> None:
    model = toy()
    with torch.no_grad():
        model.backbone.mix.weight.zero_()
    e = explain(model, crop(1), crop(2))
    assert e.identical == "features"
    assert "keeps exactly the same" in str(e)


def test_order_of_the_faces() -> None:
    model = toy()
    forth, back = explain(model, crop(1), crop(2)), explain(model, crop(2), crop(1))
    assert forth.exchanged == pytest.approx(back.model_score, abs=1e-6)
    assert abs(forth.score - back.score) > 1e-4
    assert any("With the faces exchanged" in remark for remark in forth.remarks)
    between = explain(model, crop(1), crop(2), threshold=(forth.score + back.score) / 2)
    assert any("and the verdict the other" in remark for remark in between.remarks)
    even = explain(toy("symmetric"), crop(1), crop(2))
    assert not any("exchanged" in remark for remark in even.remarks)


def test_on_the_threshold() -> None:
    e = made(np.full((7, 7), 0.25), np.ones((7, 7)), 0.25)
    assert e.same is True
    assert any("within rounding" in remark for remark in e.remarks)


def test_text_helpers() -> None:
    assert printable("a\u202egpj.exe\n\x00\ud800") == "a\\u202egpj.exe\\n\\x00\\ud800"
    assert printable("Zo\u00eb \u674e.jpg") == "Zo\u00eb \u674e.jpg"
    assert (signed(-0.0001), signed(0.25), signed(-0.25)) == ("0.000", "+0.250", "\u22120.250")


# --- ways out


def test_json_is_strict_and_has_verifys_keys() -> None:
    e = explain(
        toy(), crop(1), crop(2), names=("a.jpg", "b\u202e.jpg"), details=({"faces": 2}, {}), file="m.safetensors"
    )

    def refuse(name: str) -> None:
        raise AssertionError(name)

    data = json.loads(e.to_json(), parse_constant=refuse)
    assert data == json.loads(json.dumps(e.as_dict()))
    assert list(data)[:10] == [
        "score", "threshold", "same", "fmr", "similarity", "attention", "contribution", "model", "a", "b",
    ]  # fmt: skip
    assert data["a"] == {"picture": "a.jpg", "faces": 2}
    assert data["b"] == {"picture": "b\\u202e.jpg"}
    assert data["model"] == {"name": "toy", "file": "m.safetensors", "fingerprint": toy().fingerprint()}
    assert math.fsum(np.ravel(data["contribution"])) == pytest.approx(data["score"] - data["threshold"], abs=1e-15)
    assert {r["name"] for r in data["regions"]} == set(PARTS)
    assert data["text"]["summary"] == e.summary
    assert repr(e) == f"<Explanation: {e.verdict}, score {e.score:.4f}, threshold 0.2500, 7x7 cells>"


@pytest.mark.thorough
@pytest.mark.parametrize("threshold", [0.25, None])
def test_figure(threshold: float | None) -> None:
    from matplotlib.text import Text

    e = explain(toy(threshold=threshold), crop(1), crop(2), names=("x/a.jpg", "$b$.jpg"))
    words = {t.get_text() for t in e.figure().findobj(Text)}
    assert {"a.jpg", "$b$.jpg", "toy"} <= words
    assert ("from zero to score" in words) is (threshold is None)
    assert ("no verdict: no threshold" in words) is (threshold is None)
    bare = made(np.full((7, 7), 0.5), np.ones((7, 7)), threshold)
    assert bare.figure() is not None


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).resolve().parents[2]
    page = source / "docs" / "verify.md"
    if not page.is_file():
        pytest.skip("needs the source folder")
    for name, file in (("a.jpg", "astronaut.jpg"), ("b.jpg", "astronaut-masked.jpg")):
        (tmp_path / name).symlink_to(source / "examples" / "photographs" / file)
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)[:2]:
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["e"].same is True


# --- bad input


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f: f[:100], ValueError, r"a: expected an aligned face \[112, 112, 3\], got \[100, 112, 3\]"),
        (lambda f: f[..., 0], ValueError, r"a: expected an aligned face \[112, 112, 3\], got \[112, 112\]"),
        (lambda f: f.astype(np.float32), TypeError, "a: expected an aligned face, uint8 RGB, got float32"),
        (lambda f: "a.jpg", TypeError, "a: expected an aligned face, uint8 RGB, got str"),
        (lambda f: torch.from_numpy(f), TypeError, "a: expected an aligned face"),
        (lambda f: np.ma.masked_array(f, mask=f > 9), TypeError, "a: expected an array without a mask, got a MaskedAr"),
        (lambda f: AlignedFace(f, "x", None, 1), TypeError, "a: expected .*, got AlignedFace; its .rgb is the picture"),
    ],
)
def test_faces_that_cannot_be(change: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        explain(toy(), change(crop(1)), crop(2))
    with pytest.raises(error, match="b" + words[1:]):
        explain(toy(), crop(1), change(crop(2)))


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        explain(toy().train(), crop(1), crop(2))
    for threshold, error in ((math.inf, ValueError), (math.nan, ValueError), ("0.3", TypeError), (True, TypeError)):
        with pytest.raises(error, match="threshold: expected"):
            explain(toy(), crop(1), crop(2), threshold=threshold)  # type: ignore[arg-type]
    broken = toy()
    with torch.no_grad():
        broken.backbone.mix.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="result: expected finite values, got NaN or infinity"):
        explain(broken, crop(1), crop(2))


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    for i in (1, 2):
        Image.fromarray(crop(i)).save(folder / f"{i}.png")
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(folder / "small.png")
    Image.fromarray(np.full((200, 200, 3), 90, np.uint8)).save(folder / "wall.png")
    model = load_model()
    model.threshold = model.fmr_curve = None
    model.fmr_thresholds = {}
    save_model(model, folder / "bare.safetensors")
    return folder


def test_command(folder: Path, tmp_path: Path) -> None:
    a, b = folder / "1.png", folder / "2.png"
    page, picture = tmp_path / "why.html", tmp_path / "why.png"
    result = run("explain", a, b, "--aligned", "--html", page, "--figure", picture)
    assert result.exit_code in (0, 1), result.output
    assert result.stderr.count("does not look like a face") == len(result.stderr.splitlines()) == 2  # they are noise
    assert re.search(r"^(Same person|Different people): score ", result.stdout)
    for name in PARTS:
        assert re.search(rf"^{name} +\S+ +\S+ % +\S+  \w+", result.stdout, re.M), name
    assert sorted(os.listdir(tmp_path)) == ["why.html", "why.png"]
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run("explain", a, a, "--aligned").exit_code == 0
    assert run("explain", a, b, "--aligned", "--threshold", "1").exit_code == 1
    assert "pixel by pixel" in run("explain", a, a, "--aligned").stdout


def test_command_and_verify_agree(folder: Path) -> None:
    arguments = (folder / "1.png", folder / "2.png", "--aligned", "--json")
    explained, verified = run("explain", *arguments), run("verify", *arguments)
    assert explained.exit_code == verified.exit_code
    long, short = json.loads(explained.stdout), json.loads(verified.stdout)
    assert {key: long[key] for key in short} == short
    assert long["text"]["summary"] and len(long["regions"]) == len(PARTS)


def test_command_without_a_threshold(folder: Path, tmp_path: Path) -> None:
    arguments = ("explain", folder / "1.png", folder / "2.png", "--aligned", "--model", folder / "bare.safetensors")
    result = run(*arguments, "--html", tmp_path / "p.html", "--json")
    assert result.exit_code == 2
    assert "no verdict" in result.stderr.splitlines()[-1]
    assert json.loads(result.stdout)["same"] is None
    assert "not calibrated" in (tmp_path / "p.html").read_text(encoding="utf-8")
    assert run(*arguments, "--threshold", "-1").exit_code == 0
    trouble(run("verify", *arguments[1:]), "knows no decision threshold")


def test_command_in_trouble(folder: Path, tmp_path: Path) -> None:
    good = str(folder / "1.png")
    trouble(run("explain", good, folder / "wall.png"), "no face found")
    trouble(run("explain", good, folder / "small.png", "--aligned"), "expected an aligned crop of 112 x 112", "60 x 60")
    trouble(run("explain", good, tmp_path / "none.jpg"), "no such file")
    for option, name in (
        ("--html", "a.txt"),
        ("--html", "no/a.html"),
        ("--figure", "a.html"),
        ("--figure", "no/a.png"),
    ):
        trouble(run("explain", "no1.jpg", "no2.jpg", "--model", "none.pt", option, tmp_path / name), name)
    assert os.listdir(tmp_path) == []
    for arguments in (["explain", "a"], ["explain", "a", "b", "--threshold", "nan"]):
        assert run(*arguments).exit_code == 2


def test_command_names_what_it_cannot_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xcos_ext.model import XCosModel

    plain = XCosModel.score

    def broken(self: XCosModel, *features: torch.Tensor, return_maps: bool = False) -> Any:
        return plain(self, *(f * math.nan for f in features), return_maps=return_maps)  # type: ignore[call-overload]

    monkeypatch.setattr(XCosModel, "score", broken)
    for command in ("explain", "verify"):
        trouble(
            run(command, folder / "1.png", folder / "2.png", "--aligned"), "the model gave an unusable result", "NaN"
        )


@pytest.mark.real_data
def test_real_pairs(shared_data: Path) -> None:
    """On real faces: the identity, and parts that say where a pasted mouth is."""
    from xcos_ext.evaluation.datasets import LFW

    lfw = LFW(shared_data / "lfw112.zip", shared_data / "pairs.txt")
    model = load_model()
    chosen = np.flatnonzero(lfw.genuine)[:6]
    drops = []
    for i in chosen:
        a, b = (lfw.pictures.read(lfw.keys[k[i]]) for k in (lfw.first, lfw.second))
        e = explain(model, a, b)
        assert e.margin is not None and e.contribution is not None
        assert math.fsum(e.contribution.ravel()) == pytest.approx(e.margin, abs=1e-15)
        other = lfw.pictures.read(lfw.keys[lfw.second[np.flatnonzero(~lfw.genuine)[i]]])
        pasted = a.copy()
        pasted[80:112] = other[80:112]
        after = {r.name: r.contribution for r in explain(model, pasted, b).regions}
        before = {r.name: r.contribution for r in e.regions}
        drops.append({name: before[name] - after[name] for name in before})
    mean = {name: float(np.mean([drop[name] for drop in drops])) for name in drops[0]}
    lower = mean["mouth"] + mean["chin"]
    assert lower > 0 and lower > mean["forehead"]


@pytest.mark.parametrize("threshold", [np.float32(0.25), np.float64(0.25), 0, 1e17])
def test_numbers_of_numpy_and_extreme_thresholds_are_drawn_and_written(threshold: Any) -> None:
    card = ModelCard("toy", None, "0123", "learned")
    s, w = np.full((2, 2), 0.5, np.float16), np.full((2, 2), 0.25, np.float16)
    e = Explanation(s, w, np.float16(0.5), threshold, Face(), Face(), card)
    assert json.loads(e.to_json())["same"] is bool(threshold < 1)
    assert e.figure() and e.to_html()


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model: expected an XCosModel or an OnnxModel, got NoneType"):
        explain(None, crop(1), crop(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names: expected two, of a and b, got 1"):
        explain(toy(), crop(1), crop(2), names=("a",))  # type: ignore[arg-type]
