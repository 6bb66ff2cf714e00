"""The protocols on models and maps whose answers are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xcos_ext import backbones
from xcos_ext.card import ARCFACE
from xcos_ext.evaluation.datasets import LFW, CSVPairs, PairList
from xcos_ext.evaluation.faithfulness import (
    CONTROLS,
    REGIONS,
    Faces,
    Faithfulness,
    Settings,
    Study,
    TooFewError,
    deletion_identification,
    deletion_verification,
    faithfulness,
    faithfulness_figure,
    locality,
    patch_replacement,
    region_swap,
)
from xcos_ext.evaluation.faithfulness.faces import Drawn
from xcos_ext.evaluation.faithfulness.maps import LEVELS
from xcos_ext.evaluation.faithfulness.study import mate_scorer, remembering
from xcos_ext.evaluation.faithfulness.swap import draw
from xcos_ext.explain.explainers import CentreMap, EmbeddingCosine, RandomMap, Saliency, XCosPairs
from xcos_ext.explain.fills import filled
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosModel, plug

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")

PEOPLE = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures each of people who are random 7x7 mosaics; two of the last two, who are in no pair."""
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for person in range(PEOPLE):
        mosaic = rng.integers(30, 226, (7, 7, 3))
        (folder / "crops" / f"P{person}").mkdir(parents=True)
        for number in range(1, 4 if person < 8 else 3):
            noisy = np.clip(mosaic + rng.integers(-6, 7, mosaic.shape), 0, 255).astype(np.uint8)
            picture = Image.fromarray(noisy).resize((112, 112), Image.Resampling.NEAREST)
            picture.save(folder / "crops" / f"P{person}" / f"P{person}_{number:04d}.png")
    lines = ["2\t4"]
    for fold in range(2):
        first = 4 * fold
        lines += [f"P{p}\t1\t2" for p in range(first, first + 4)]
        lines += [f"P{p}\t1\tP{first + (p + 1) % 4}\t2" for p in range(first, first + 4)]
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def faces(root: Path) -> Faces:
    return Faces(LFW(root / "crops", root / "pairs.txt"))


def cells_of(images: Tensor) -> Tensor:
    """Mean colours of the 49 cells [N, 49, 3]."""
    return images.view(-1, 3, 7, 16, 7, 16).mean((3, 5)).flatten(2).transpose(1, 2)


class Toy:
    """A score of some cells' colours: minus their mean distance."""

    preprocessing = ARCFACE
    threshold = None
    name = "toy"

    def __init__(self, cells: tuple[int, ...] = tuple(range(49))) -> None:
        self.cells = list(cells)
        self.pictures = 0

    def features(self, images: Tensor) -> Tensor:
        self.pictures += len(images)
        return cells_of(images)

    def score(self, a: Tensor, b: Tensor) -> Tensor:
        return -(a - b)[:, self.cells].abs().mean((1, 2))

    def channels(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def study(faces: Faces, model: Any, **settings: Any) -> Study:
    return Study(model, faces, Settings(**settings))


class Map:
    """Distance of colours, cell by cell: in mosaics exactly where two people are different."""

    def __init__(self, sign: float = 1.0, name: str = "oracle") -> None:
        self.sign, self.name = sign, name

    def __call__(self, model: Any, a: Tensor, b: Tensor) -> Saliency:
        distance = self.sign * (cells_of(a) - cells_of(b)).abs().mean(2).view(-1, 7, 7)
        return Saliency(-distance, distance)


class Fixed:
    """The same map for all pairs."""

    def __init__(self, values: Tensor, name: str = "fixed") -> None:
        self.values, self.name = values.float(), name

    def __call__(self, model: Any, a: Tensor, b: Tensor) -> Saliency:
        made = self.values.expand(len(a), *self.values.shape)
        return Saliency(made, made)


def one_cell(cell: int) -> Tensor:
    return (torch.arange(49) == cell).view(7, 7)


def local_recogniser() -> backbones.Recogniser:
    """Cells see exactly their own 16x16 pixels."""
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Flatten(), nn.Linear(147, 40))
    return backbones.SplitRecogniser(nn.AvgPool2d(16), tail, grid_shape=(3, 7, 7), embedding_size=40).eval()


def local_model(faces: Faces, spread: float = 0.0) -> XCosPairs:
    pictures = [faces.pairs.read(key) for key in faces.pairs.keys]
    return XCosPairs(plug(local_recogniser(), pictures, spread=spread))


# Region swap


def test_swap_of_an_oracle_its_opposite_and_constants(faces: Faces) -> None:
    explainers = [Map(), Map(-1, "opposite"), CentreMap(), Fixed(torch.zeros(7, 7))]
    result = region_swap(study(faces, Toy(), count=6, replicates=50), explainers)
    assert {draw.direction: draw.pairs for draw in result.draws} == {
        "impostor-into-genuine": 6,
        "genuine-into-impostor": 6,
    }
    for direction in ("impostor-into-genuine", "genuine-into-impostor"):
        for region in (*REGIONS, "mean"):
            oracle, opposite, centre, fixed = (
                result.find(name, direction=direction, region=region)
                for name in ("oracle", "opposite", "centre", "fixed")
            )
            assert oracle.absolute.value > 0.97 and oracle.difference.value > 0.97
            assert opposite.absolute.value == pytest.approx(1 - oracle.absolute.value)
            assert opposite.centred.value == pytest.approx(1 - oracle.centred.value)
            assert fixed.absolute.value == fixed.difference.value == fixed.centred.value == 0.5
            assert oracle.behind is None
            for other in (opposite, centre, fixed):
                assert other.behind is not None and other.behind.interval is not None
                assert other.behind.value == pytest.approx(oracle.absolute.value - other.absolute.value)
            # The centre map is told apart from a pair's own by two of the three readings.
            assert centre.difference.value == centre.centred.value == 0.5
        assert result.find("centre", direction=direction, region="nose").absolute.value > 0.95
        assert result.find("centre", direction=direction, region="forehead").absolute.value < 0.4
        # Of one person, mosaics differ by noise alone: the control is near chance.
        for reading in ("absolute", "difference", "centred"):
            control = getattr(result.find("oracle", direction=direction, paste="same-person"), reading)
            assert 0.3 < control.value < 0.7
    assert result.unit == "people"
    interval = result.find("oracle").absolute.interval
    assert interval is not None and interval.low <= result.find("oracle").absolute.value <= interval.high
    with pytest.raises(KeyError):
        result.find("nobody")


@pytest.mark.thorough
def test_swap_is_the_same_again_and_whatever_the_batch(faces: Faces, root: Path) -> None:
    def run(batch_size: int, seed: int = 0) -> dict[str, Any]:
        fresh = Faces(LFW(root / "crops", root / "pairs.txt"))
        return region_swap(
            study(
                fresh,
                Toy(),
                count=5,
                regions=("nose",),
                sizes=("small", "large"),
                seed=seed,
                batch_size=batch_size,
                replicates=30,
                pixels=True,
            ),
            [Map(), CentreMap()],
        ).as_dict()

    first = run(16)
    assert run(16) == first and run(16, seed=1) != first
    for a, b in zip(first["rows"], run(2)["rows"], strict=True):
        assert a["absolute"]["value"] == pytest.approx(b["absolute"]["value"], abs=1e-9)
    json.dumps(first, allow_nan=False)


@pytest.mark.parametrize(("blend", "matched"), [("soft", False), ("hard", True), ("soft", True)])
def test_swap_without_seams(faces: Faces, blend: Any, matched: bool) -> None:
    result = region_swap(
        study(faces, Toy(), count=4, regions=("both eyes",), blend=blend, match_colour=matched, replicates=0),
        [Map()],
    )
    row = result.find("oracle")
    # A cell of a mosaic has one colour; where it is matched, nothing of the person is left.
    assert row.absolute.value > 0.9 or matched
    assert row.absolute.interval is None
    assert (result.blend, result.match_colour) == (blend, matched)


def test_swap_over_pixels(faces: Faces) -> None:
    class Pixels(Map):
        def __call__(self, model: Any, a: Tensor, b: Tensor) -> Saliency:
            distance = (a - b).abs().mean(1)
            return Saliency(-distance, distance)

    result = region_swap(study(faces, Toy(), count=4, regions=("mouth",), pixels=True, replicates=0), [Pixels()])
    pixels = result.find("oracle").pixels
    assert pixels is not None and min(estimate.value for estimate in pixels) > 0.99
    assert result.as_dict()["rows"][0]["pixels"].keys() == {"absolute", "difference"}


def test_donors_are_never_trivial(faces: Faces) -> None:
    genuine, _ = draw(study(faces, Toy(), count=8), "impostor-into-genuine")
    for pair in genuine:
        assert pair.donor is not None and faces.person(pair.donor) != faces.person(pair.a)
        assert pair.own not in (None, pair.a, pair.b) and faces.person(pair.own) == faces.person(pair.a)
    impostor, passed = draw(study(faces, Toy(), count=8), "genuine-into-impostor")
    assert passed == 0
    for pair in impostor:
        assert pair.donor not in (None, pair.b) and faces.person(pair.donor) == faces.person(pair.b)
        assert pair.own not in (None, pair.a) and faces.person(pair.own) == faces.person(pair.a)
        assert faces.person(pair.a) != faces.person(pair.b)


def test_people_with_one_picture_are_passed_over(root: Path, tmp_path: Path) -> None:
    # Of a CSV list only the pictures that it names are known: P0 and P2 have two, the others one.
    rows = [(0, 1, 0, 2), (2, 1, 2, 2), (0, 1, 1, 1), (3, 1, 2, 1), (2, 2, 4, 1), (5, 1, 6, 1)]
    lines = ["a,b,genuine"]
    lines += [f"P{p}/P{p}_{i:04d}.png,P{q}/P{q}_{j:04d}.png,{int(p == q)}" for p, i, q, j in rows]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    faces = Faces(CSVPairs(root / "crops", tmp_path / "list.csv"))
    assert faces.of("P0") == ("P0/P0_0001.png", "P0/P0_0002.png") and faces.of("P5") == ("P5/P5_0001.png",)
    result = region_swap(study(faces, Toy(), count=2, regions=("nose",), replicates=0), [Map()])
    into_genuine, into_impostor = result.draws
    # Nobody of a genuine pair has a third picture, so there is no control.
    assert (into_genuine.pairs, into_genuine.controls) == (2, 0)
    assert into_impostor.pairs == 2 and {row.paste for row in result.rows} == {"swap"}
    with pytest.raises(TooFewError, match=r"count: expected 1..2, the genuine pairs that there are, got 3"):
        region_swap(study(faces, Toy(), count=3), [Map()])
    drawn, passed = faces.draw(
        False, 4, np.random.default_rng(0), lambda p: faces.with_donor(p, False, np.random.default_rng(0))
    )
    # P0 is only in A's place and so changes it; the pair of P5 and P6 has no relative at all.
    assert len(drawn) == 3 and passed == 1
    assert all(faces.person(pair.b) in ("P0", "P2") for pair in drawn)


# Deletion and insertion


def slow_deletion(
    model: Toy, explainer: Map, faces: Faces, pairs: list[tuple[str, str, bool]], fill: str, threshold: float
) -> dict[tuple[str, str], list[float]]:
    """Accuracy at every level, one pair, one picture and one pixel order at a time."""
    keys = sorted({key for a, b, _ in pairs for key in (a, b)})
    mean = study(faces, model).mean_face(keys)
    curves: dict[tuple[str, str], list[float]] = {}
    for key_a, key_b, genuine in pairs:
        a, b = (study(faces, model).pictures([key]) for key in (key_a, key_b))
        empty = filled(fill, a, ARCFACE, mean)
        for kind in ("similar", "dissimilar"):
            order = getattr(explainer(model, a, b), kind).flatten().argsort(descending=True)
            for mode in ("deletion", "insertion"):
                curve = curves.setdefault((kind, mode), [0.0] * len(LEVELS))
                for place, level in enumerate(LEVELS):
                    first = torch.zeros(112 * 112, dtype=torch.bool)
                    first[order[: round(level * 112 * 112)]] = True
                    keep = (first if mode == "insertion" else ~first).view(112, 112)
                    changed = torch.where(keep, a, empty)
                    score = model.score(model.features(changed), model.features(b)).item()
                    curve[place] += ((score >= threshold) == genuine) / len(pairs)
    return curves


class Smooth(Map):
    """A pixel map without equal values, so that the order is unique."""

    def __call__(self, model: Any, a: Tensor, b: Tensor) -> Saliency:
        generator = torch.Generator().manual_seed(1)
        noise = torch.rand(112, 112, generator=generator) + (a - b).abs().mean(1)
        return Saliency(-noise, noise)


@pytest.mark.parametrize("fill", ["zero", "blur", "mean-face"])
def test_deletion_is_a_slow_loops(faces: Faces, fill: str) -> None:
    model = Toy()
    found, genuine, _ = faces.draw_both(2, 0)
    pairs = [(pair.a, pair.b, bool(same)) for pair, same in zip(found, genuine, strict=True)]
    result = deletion_verification(study(faces, model, count=2, fills=(fill,), replicates=30, batch_size=3), [Smooth()])
    assert result.threshold is not None and result.clean == 1.0 and result.pairs == 4
    expected = slow_deletion(model, Smooth(), faces, pairs, fill, result.threshold)
    for (kind, mode), curve in expected.items():
        row = result.find("oracle", kind=kind, mode=mode, fill=fill)
        assert row.curve.values == pytest.approx(curve)
        assert row.curve.area.value == pytest.approx(100 * np.trapezoid(curve, LEVELS))
    json.dumps(result.as_dict(), allow_nan=False)


def test_deletion_rewards_the_cell_that_counts(faces: Faces) -> None:
    model = Toy((24,))  # looks at the middle cell alone
    explainers = [Fixed(one_cell(24), "right"), Fixed(-one_cell(24).float(), "wrong"), RandomMap(), CentreMap()]
    result = deletion_verification(study(faces, model, count=4, replicates=0), explainers)
    right, wrong = (result.find(name).curve for name in ("right", "wrong"))
    # The cell's pixels, made larger bilinearly, are 8 % of all: they are among the first tenth, or among the last.
    assert right.values[0] == wrong.values[0] == 1.0
    assert set(right.values[1:]) == {0.5} and set(wrong.values[:-1]) == {1.0}
    assert right.area.value < wrong.area.value
    inserted = [result.find(name, mode="insertion").curve for name in ("right", "wrong")]
    assert set(inserted[0].values[1:]) == {1.0} and set(inserted[1].values[:-1]) == {0.5}
    # Both ends are the same for all maps.
    assert len({result.find(e.name).curve.values[-1] for e in explainers}) == 1


def test_identification_is_a_slow_loops(faces: Faces) -> None:
    model = Toy(tuple(range(10, 30)))
    result = deletion_identification(study(faces, model, count=4, replicates=0, batch_size=3), [Smooth()])
    assert (result.pairs, result.gallery, result.top, result.clean) == (4, 8, 1, 1.0)
    # The same draw, by hand.
    rng = np.random.default_rng(0)
    people = [person for person in faces.people if len(faces.of(person)) > 1]
    found = []
    for place in rng.permutation(len(people))[:4]:
        mate = faces.another(people[place], rng, ())
        assert mate is not None
        found.append((faces.another(people[place], rng, (mate,)), mate))
    others = [person for person in faces.people if person not in {faces.person(mate) for _, mate in found}]
    gallery = [mate for _, mate in found] + [faces.another(others[i], rng, ()) for i in rng.permutation(len(others))]
    enrolled = model.features(study(faces, model).pictures(gallery))  # type: ignore[arg-type]
    for level_index in (2, 6, 9):
        right = 0
        for number, (probe, mate) in enumerate(found):
            a, b = (study(faces, model).pictures([key]) for key in (probe, mate))  # type: ignore[list-item]
            order = Smooth()(model, a, b).similar.flatten().argsort(descending=True)
            changed = a.clone().view(3, -1)
            changed[:, order[: round(LEVELS[level_index] * 112 * 112)]] = -1.0
            score = model.score(model.features(changed.view(1, 3, 112, 112)).expand_as(enrolled), enrolled)
            right += int(score.argmax()) == number
        assert result.find("oracle").curve.values[level_index] == right / 4
    several = deletion_identification(study(faces, model, count=4, top=3, replicates=0), [Smooth(), RandomMap()])
    assert several.top == 3
    with pytest.raises(ValueError, match=r"top: expected 1..8, the gallery's size, got 9"):
        deletion_identification(study(faces, model, count=4, top=9), [Smooth()])
    with pytest.raises(TooFewError, match=r"count: expected 1..8, the people with two pictures, got 9"):
        deletion_identification(study(faces, model, count=9), [Smooth()])


@pytest.mark.parametrize("kind", ["cells", "cosine", "toy"])
def test_a_gallery_is_scored_as_pairs_are(faces: Faces, kind: str) -> None:
    model: Any = Toy()
    if kind != "toy":
        model = local_model(faces) if kind == "cells" else EmbeddingCosine(local_recogniser())
    with torch.no_grad():
        features = model.features(study(faces, model).pictures(faces.pairs.keys[:6]))
        matrix = mate_scorer(model, features)(features[:3])
        for row in range(3):
            assert torch.allclose(matrix[row], model.score(features[row].expand_as(features), features), atol=1e-5)


# Locality


def test_local_cells_are_local(faces: Faces) -> None:
    result = locality(study(faces, local_model(faces), count=3, fills=("zero", "mean-face"), replicates=30), [])
    assert result.chance == pytest.approx(1 / 49) and result.chance_neighbourhood == pytest.approx(361 / 49**2)
    for row in result.rows:
        assert row.own.value > 0.999 and row.neighbourhood.value > 0.999 and row.unmoved < 0.1
    shared = locality(study(faces, local_model(faces, spread=1.0), count=3, replicates=0), []).rows[0]
    assert shared.own.value < 0.7 and shared.own.value < shared.neighbourhood.value < 1
    json.dumps(result.as_dict(), allow_nan=False)


def test_locality_is_a_slow_loops(faces: Faces) -> None:
    model = local_model(faces, spread=0.7)
    found, _, _ = faces.draw_both(1, 0)
    shares = []
    with torch.no_grad():
        for pair in found:
            a, b = (study(faces, model).pictures([key]) for key in (pair.a, pair.b))
            clean = model.model(a, b).similarity[0]
            for row in range(7):
                for column in range(7):
                    dark = a.clone()
                    dark[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = -1
                    moved = (model.model(dark, b).similarity[0] - clean).abs()
                    shares.append((moved[row, column] / moved.sum()).item())
    result = locality(study(faces, model, count=1, replicates=0, batch_size=10), [])
    assert result.rows[0].own.value == pytest.approx(np.mean(shares), rel=1e-4)


def test_locality_needs_cells(faces: Faces) -> None:
    with pytest.raises(ValueError, match=r"model: locality is about an xCos model's cells, and toy has none"):
        locality(study(faces, Toy(), count=2), [])


# Patch replacement


def test_patches_that_decide_turn_the_verdict(faces: Faces) -> None:
    model = Toy((10,))
    last = Fixed(-one_cell(10).float(), "last")
    result = patch_replacement(
        study(faces, model, count=6, replicates=30), [Fixed(one_cell(10), "first"), last, RandomMap()]
    )
    assert result.right == 12
    for kind in ("genuine", "impostor", "all"):
        first, late = (result.find(name, pairs=kind).flips for name in ("first", "last"))
        assert first.levels[:3] == (0, 1 / 49, 2 / 49)
        assert first.values[0] == 0 and set(first.values[1:]) == {1.0}  # one cell is enough
        assert set(late.values[:-1]) == {0.0} and late.values[-1] == 1.0  # and nothing else does it
        assert late.area.value < result.find("random", pairs=kind).flips.area.value < first.area.value
        change = result.find("first", pairs=kind).change.values
        assert change[0] == 0 and change[1] > 0 and change[-1] == pytest.approx(change[1])
    json.dumps(result.as_dict(), allow_nan=False)


# Faces, models, runner


def test_pictures_that_cannot_be_used_are_counted(root: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(root / "crops", tmp_path / "crops")
    (tmp_path / "crops" / "P0" / "P0_0001.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 20)).save(tmp_path / "crops" / "P1" / "P1_0002.png")
    faces = Faces(LFW(tmp_path / "crops", root / "pairs.txt"))
    drawn, passed = faces.draw(True, 8, np.random.default_rng(0))
    assert len(drawn) == 6 and passed == 2 and len(faces.failures) == 2
    assert not {"P0/P0_0001.png", "P1/P1_0002.png"} & {key for pair in drawn for key in (pair.a, pair.b)}
    result = faithfulness(Toy(), faces, [Map()], protocols=["region-swap"], settings=Settings(regions=("nose",)))
    assert result.region_swap is not None and result.region_swap.draws[0].passed_over == 2
    assert len(result.as_dict()["failed_pictures"]) == 2
    for key in faces.pairs.keys:
        (tmp_path / "crops" / key).write_bytes(b"no picture")
    words = "none of the 8 genuine pairs has the pictures that are needed: .*not a picture"
    with pytest.raises(TooFewError, match=words):
        Faces(LFW(tmp_path / "crops", root / "pairs.txt")).draw(True, 2, np.random.default_rng(0))


def test_folds_and_their_people(root: Path) -> None:
    pairs = LFW(root / "crops", root / "pairs.txt")
    assert pairs.fold_numbers() == {1: 0, 2: 1}
    faces = Faces(pairs, folds=[1])
    assert faces.people == ("P4", "P5", "P6", "P7") and faces.of("P4") == tuple(f"P4/P4_000{i}.png" for i in (1, 2, 3))
    with pytest.raises(ValueError, match=r"folds: expected some of \[0, 1\], got \[2\]"):
        Faces(pairs, folds=[2])


def test_lists_that_do_not_say_who_is_who(root: Path) -> None:
    class Anonymous(PairList):
        format = "bin"

        def __init__(self, known: LFW) -> None:
            named = [(known.keys[a], known.keys[b]) for a, b in zip(known.first, known.second, strict=True)]
            super().__init__(named, known.genuine.tolist())
            self.read = known.read  # type: ignore[method-assign]

    faces = Faces(Anonymous(LFW(root / "crops", root / "pairs.txt")))
    with pytest.raises(TooFewError, match="pairs: region swap needs to know who is on a picture"):
        region_swap(study(faces, Toy(), count=2), [Map()])
    result = faithfulness(Toy(), faces, [Map()], settings=Settings(count=2, replicates=30))
    assert set(result.skipped) == {"region-swap", "identification", "patch", "locality"}
    assert result.deletion is not None and result.deletion.unit == "pairs" and result.complete


def test_remembered_features_are_the_models(faces: Faces) -> None:
    images = study(faces, Toy()).pictures(faces.pairs.keys[:4])
    for model in (local_model(faces), EmbeddingCosine(local_recogniser(), threshold=0.2)):
        kept: Any = remembering(model)
        assert isinstance(kept, type(model)) and (kept.threshold, kept.name) == (model.threshold, model.name)
        with torch.no_grad():
            first = kept.features(images)
            assert kept.features(images) is first and torch.equal(first, model.features(images))
            assert kept.features(images.clone()) is not first
            for _ in range(5):
                kept.features(images.clone())
            assert kept.features(images) is not first  # memory is bounded
        wanted = images.clone().requires_grad_()
        kept.features(wanted).sum().backward()
        assert wanted.grad is not None and wanted.grad.abs().sum() > 0
    toy = Toy()
    assert remembering(toy) is toy


def test_everything_at_once(faces: Faces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xcos_ext.evaluation.faithfulness.measure._TIMED", 3)
    model = local_model(faces)
    titles: list[str] = []
    ticks: dict[str, tuple[int, int]] = {}
    saved: list[Faithfulness] = []

    @contextmanager
    def stage(title: str) -> Iterator[Any]:
        titles.append(title)

        def tick(done: int, total: int) -> None:
            assert done >= ticks.get(title, (0, 0))[0] or title == "timing"
            ticks[title] = done, total

        yield tick

    settings = Settings(count=2, regions=("nose",), replicates=30)
    model.model.threshold = 0.3
    result = faithfulness(model, faces, ["xcos-similarity", Map()], settings=settings, stage=stage, save=saved.append)
    assert titles == ["timing", "region-swap", "deletion", "identification", "locality", "patch"]
    assert all(ticks[title][0] == ticks[title][1] for title in titles[1:])
    assert [found.complete for found in saved] == [False] * 5 and result.complete
    assert saved[0].region_swap is not None and saved[0].deletion is None
    assert result.explainers == ("xcos-similarity", "oracle", *CONTROLS)
    assert set(result.timings) == set(result.explainers) and not result.skipped
    assert all(0 < t.low <= t.median <= t.high and t.samples == 3 for t in result.timings.values())
    for found in (result.deletion, result.identification):
        assert found is not None and {row.explainer for row in found.rows} == set(result.explainers)
        assert {row.fill for row in found.rows} == {"zero"}
    json.dumps(result.as_dict(), allow_nan=False)

    # The same again, whatever else is run.
    alone = faithfulness(model, faces, ["xcos-similarity", Map()], protocols=["patch", "deletion"], settings=settings)
    assert alone.patch == result.patch and alone.deletion == result.deletion and alone.locality is None
    figure = faithfulness_figure(result)
    assert len(figure.subfigs) == 4 and [len(part.axes) for part in figure.subfigs] == [6, 4, 4, 3]
    assert len(faithfulness_figure(alone).subfigs) == 2
    with pytest.raises(ValueError, match="result: expected a region swap"):
        faithfulness_figure(faithfulness(model, faces, [], protocols=["locality"], settings=settings))


def test_explainers_that_cannot_explain_a_model(faces: Faces) -> None:
    model = local_model(faces)
    model.model.threshold = None
    settings = Settings(count=2, regions=("nose",), replicates=0)
    with pytest.raises(XCosError, match=r"xcos cannot explain this model: model: expected a decision threshold"):
        faithfulness(model, faces, ["xcos"], protocols=["region-swap"], settings=settings)
    result = faithfulness(model, faces, protocols=["region-swap"], settings=settings)
    assert "xcos" in result.skipped and "threshold" in result.skipped["xcos"] and result.threshold is None
    assert "xcos-similarity" in result.explainers and "xcos" not in result.explainers
    cosine = EmbeddingCosine(local_recogniser())
    with pytest.raises(XCosError, match=r"xcos-attention cannot explain this model: model: expected an xCos model"):
        faithfulness(cosine, faces, ["xcos-attention"], protocols=["region-swap"], settings=settings)
    # A recogniser has no threshold of its own: the pairs give one.
    lent = faithfulness(cosine, faces, protocols=["region-swap"], settings=settings)
    assert lent.threshold_from_pairs and lent.threshold is not None and cosine.threshold is None
    assert "xcos" in lent.skipped and "locality" not in lent.skipped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"explainers": ["lime"]}, "explainer: expected some of xcos, .*, got 'lime'"),
        ({"protocols": ["magic"]}, "protocol: expected one of region-swap, .*, got 'magic'"),
        ({"settings": Settings(fills=("pink",))}, "fill: expected one of zero, blur, mean-face, got 'pink'"),
        ({"settings": Settings(regions=("ear",))}, "region: expected one of left eye, .*, got 'ear'"),
        ({"settings": Settings(count=9)}, r"count: expected 1..8, the genuine pairs that there are, got 9"),
        ({"settings": Settings(replicates=3)}, "replicates: expected 0 or at least 20, got 3"),
    ],
)
def test_bad_input(faces: Faces, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        faithfulness(Toy(), faces, **({"explainers": [Map()]} | arguments))


def test_maps_that_are_none(faces: Faces) -> None:
    class Broken(Map):
        def __call__(self, model: Any, a: Tensor, b: Tensor) -> Saliency:
            made = torch.full((len(a), 7, 7), torch.nan)
            return Saliency(made, made) if self.sign > 0 else Saliency(made[0], made[0])

    with pytest.raises(ValueError, match="oracle: similar: a map has values that are NaN or infinite"):
        region_swap(study(faces, Toy(), count=2), [Broken()])
    with pytest.raises(ValueError, match=r"oracle: similar: expected \[2, h, w\], got \[7, 7\]"):
        region_swap(study(faces, Toy(), count=2), [Broken(-1)])


def test_drawn_pairs_are_tuples() -> None:
    assert Drawn("a", "b") == ("a", "b", None, None)


@pytest.mark.real_data
def test_real_faces(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xcos_ext.model import load_model

    faces = Faces(LFW(shared_data / "lfw112.zip", shared_data / "pairs.txt", folds=[6, 7]))
    model: XCosModel = load_model()
    monkeypatch.setattr("xcos_ext.evaluation.faithfulness.measure._TIMED", 3)
    settings = Settings(count=24, regions=("mouth",), replicates=0)
    result = faithfulness(
        XCosPairs(model), faces, ["xcos", "xcos-similarity"], protocols=["region-swap"], settings=settings
    )
    assert result.region_swap is not None and not result.failures
    for name in ("xcos", "xcos-similarity"):
        row, control = (result.region_swap.find(name, paste=paste) for paste in ("swap", "same-person"))
        assert row.difference.value > 0.6 and row.centred.value > 0.6
        assert row.difference.value > control.difference.value
    centre = result.region_swap.find("centre")
    assert centre.difference.value == centre.centred.value == 0.5
