"""What the card's figures are measured on: crops altered each its own way, and claims of one set checked on another."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from recipes.measure_default import ALTERATIONS, Altered, altered_pairs, claims, largest_share
from recipes.studies.ten_pairs import Pair, draw, nth
from xcos_ext.evaluation.datasets import PairList
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosHead, XCosModel

pytestmark = pytest.mark.usefixtures("one_thread")


def crop(key: str) -> np.ndarray:
    random = np.random.default_rng([*key.encode()])
    coarse = torch.from_numpy(random.uniform(0, 255, (1, 3, 7, 7))).float()
    fine = torch.nn.functional.interpolate(coarse, size=(112, 112), mode="bilinear")
    return fine[0].permute(1, 2, 0).to(torch.uint8).numpy()


@pytest.fixture
def pairs() -> PairList:
    named = [("Ann/1", "Ann/2"), ("Ann/1", "Bob/1"), ("Cid/1", "Cid/2"), ("Bob/1", "Cid/1")]
    pictures = types.SimpleNamespace(read=crop)
    return PairList(named, [True, False] * 2, [0, 0, 1, 1], lambda key: key.split("/")[0], pictures=pictures)


@pytest.fixture
def model() -> XCosModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return XCosModel(torch.nn.AvgPool2d(16), XCosHead(3, 8, attention="norm")).eval()


@pytest.mark.parametrize("name", ALTERATIONS)
def test_each_face_is_altered_its_own_way_and_always_alike(name: str, pairs: PairList) -> None:
    made = altered_pairs(pairs, name)  # type: ignore[arg-type]
    assert len(made) == len(pairs) and made.genuine.tolist() == pairs.genuine.tolist()
    first, second = made.keys[made.first[0]], made.keys[made.second[0]]
    picture = made.read(first)
    assert picture.shape == (112, 112, 3) and picture.dtype == np.uint8
    assert (picture != crop("Ann/1")).mean() > 0.02
    assert np.array_equal(picture, made.read(first))
    one_side = name in ("with a drawn mask", "with drawn sunglasses")
    assert np.array_equal(made.read(second), crop("Ann/2")) == one_side
    assert set(made.people or ()) == {"Ann", "Bob", "Cid"}


def test_two_faces_are_not_moved_alike() -> None:
    pictures = Altered(types.SimpleNamespace(read=lambda key: crop("same")), ALTERATIONS["moved by up to 8 px"])
    assert not np.array_equal(pictures.read("first:a"), pictures.read("second:a"))


def test_the_largest_share_of_attention_is_that_of_the_score(model: XCosModel, pairs: PairList) -> None:
    a, b = (model.features_of([crop(pairs.keys[i]) for i in side]) for side in (pairs.first, pairs.second))
    wanted = model.score(a, b, return_maps=True).attention.flatten(1).amax(1).mean()
    assert largest_share(model, pairs) == pytest.approx(float(wanted), rel=1e-5)


def test_a_threshold_of_one_set_is_held_against_the_other(model: XCosModel) -> None:
    sets = {name: {f"p{person}": [crop(f"{name}{person}")] for person in range(120)} for name in ("LFW", "CFP")}
    found = claims(model, sets)
    assert set(found) == {"LFW to CFP", "CFP to LFW"}
    for row in found.values():
        assert row["pairs"] == 120 * 119 // 2 and 0 <= row["fmr"] < 0.1


def test_pairs_are_drawn_with_what_was_changed_and_their_verdict(model: XCosModel, pairs: PairList) -> None:
    assert [nth(pairs, genuine, 1) for genuine in (True, False)] == [2, 3]
    model.threshold = 0.0
    pasted = torch.zeros(7, 7, dtype=torch.bool)
    pasted[2, 3] = True
    shown = [
        Pair("a set, same person", crop("Ann/1"), crop("Ann/2"), drawn=[[(10, 10), (40, 10), (20, 60)]]),
        Pair("a set, pasted", crop("Ann/1"), crop("Ann/1"), pasted=pasted),
    ]
    figure = draw(model, shown)
    assert len(figure.axes) == 8
    assert figure.axes[1].get_title().endswith("1.00: match")
    assert [len(axes.patches) for axes in figure.axes[3::2]] == [1, 1, 1]  # the pasted cell, on each of the maps
    model.threshold = None
    with pytest.raises(XCosError, match="expected one with a decision threshold"):
        draw(model, shown)
