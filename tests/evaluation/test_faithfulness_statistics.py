"""Areas, orders, standardised maps, and intervals of means over pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics

from xcos_ext.evaluation.bootstrap import Estimator, Resampling
from xcos_ext.evaluation.faithfulness.maps import LEVELS, areas, kept_pixels, mean_curve, ranks, standardised
from xcos_ext.evaluation.figures import plain
from xcos_ext.explain.fills import blurred, filled

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("levels", [0, 4])
def test_areas_are_scikit_learns(levels: int) -> None:
    maps = RNG.normal(size=(20, 49))
    if levels:
        maps = np.round(maps * levels / 4)  # many ties
    truth = RNG.random((20, 49)) < 0.2
    truth[:, 0], truth[:, 1] = True, False
    expected = [metrics.roc_auc_score(t, m) for t, m in zip(truth, maps, strict=True)]
    assert areas(maps, truth) == pytest.approx(expected, abs=1e-12)
    assert areas(maps, truth[0]) == pytest.approx([metrics.roc_auc_score(truth[0], m) for m in maps], abs=1e-12)


def test_areas_of_oracle_opposite_and_constant() -> None:
    truth = np.arange(49) % 7 == 3
    assert areas([truth, -1.0 * truth, np.full(49, 0.3)], truth).tolist() == [1.0, 0.0, 0.5]


def test_areas_refuse_what_has_none() -> None:
    with pytest.raises(ValueError, match="truth: expected cells inside and outside"):
        areas(np.zeros((1, 4)), np.ones(4, bool))
    with pytest.raises(ValueError, match="maps: 1 values are NaN or infinite"):
        areas([[0.0, np.nan]], [True, False])


def test_standardised_removes_what_is_always_there() -> None:
    usual = np.linspace(-3, 9, 49)
    clean = usual + RNG.normal(size=(200, 49)) * np.linspace(0.1, 4, 49)
    scaled = standardised(clean, clean)
    assert np.abs(scaled.mean(0)).max() < 1e-12 and np.abs(scaled.std(0) - 1).max() < 1e-12
    changed = clean.copy()
    changed[:, 0] += 10 * 0.1  # ten of its deviations, but still the lowest value of the map
    truth = np.arange(49) == 0
    assert areas(changed, truth).mean() < 0.2 and areas(standardised(changed, clean), truth).mean() > 0.99
    constant = np.tile(usual.astype(np.float32).astype(np.float64), (30, 1))
    assert (areas(standardised(constant, constant), truth) == 0.5).all()


def test_areas_under_curves() -> None:
    alone = Estimator(1, replicates=0)
    for curve in RNG.random((5, 11)):
        assert mean_curve(LEVELS, curve[None], alone).area.value == pytest.approx(100 * metrics.auc(LEVELS, curve))
    uneven = np.array([0, 0.02, 0.1, 0.7, 1])
    assert mean_curve(uneven, uneven[None], alone).area.value == pytest.approx(50)


def test_ranks_follow_the_map_and_mix_equal_values() -> None:
    maps = torch.rand(3, 8, 8)
    places = ranks(maps, torch.Generator().manual_seed(0))
    for row, values in zip(places, maps.flatten(1), strict=True):
        assert row[values.argsort(descending=True)].equal(torch.arange(64))
    flat = ranks(torch.zeros(1, 40, 40), torch.Generator().manual_seed(0))[0].view(40, 40)
    first = flat < 800
    assert 300 < first[:20].sum() < 500  # not the upper half
    assert flat.flatten().sort().values.equal(torch.arange(1600))
    again = ranks(torch.zeros(1, 40, 40), torch.Generator().manual_seed(0))[0]
    assert again.equal(flat.flatten())


def test_kept_pixels_are_complements() -> None:
    places = ranks(torch.rand(2, 100), torch.Generator().manual_seed(0))
    for level in LEVELS:
        deleted, inserted = (kept_pixels(places, level, mode) for mode in ("deletion", "insertion"))
        assert deleted.equal(~inserted) and inserted.sum(1).tolist() == [round(100 * level)] * 2


def test_estimator_is_the_weighted_mean_of_the_bootstrap() -> None:
    people = RNG.integers(0, 12, 30), RNG.integers(0, 12, 30)
    values = RNG.normal(size=30)
    found = Estimator(30, people, replicates=100, seed=3).mean(values)
    weights = np.concatenate(
        [Resampling(30, people).draw(rng, count) for rng in [np.random.default_rng(3)] for count in (64, 36)]
    )
    means = (weights @ values) / weights.sum(1)
    assert found.value == pytest.approx(values.mean())
    assert found.interval == pytest.approx(np.percentile(means, (2.5, 97.5)))


def test_intervals_cover() -> None:
    covered = 0
    for trial in range(60):
        values = np.random.default_rng(trial).normal(2.0, 1.0, 50)
        interval = Estimator(50, (np.arange(50), np.arange(50)), replicates=200, seed=trial).mean(values).interval
        assert interval is not None
        covered += interval.low <= 2.0 <= interval.high
    assert covered >= 51  # of 60 at 95 %: below 51 has a chance of 1 in 2,000


def test_estimator_without_replicates_people_or_values() -> None:
    values = np.array([1.0, np.nan, 3.0])
    assert Estimator(3, replicates=0).mean(values) == (2.0, None)
    estimator = Estimator(3, replicates=50)
    assert estimator.unit == "pairs" and estimator.mean(values).value == 2.0
    assert estimator.mean([1.0, np.nan, np.nan]) == (1.0, None)
    # Half of all replicates draw one person twice and no pair at all: no interval rather than a wrong one.
    assert Estimator(2, (np.array([0, 1]), np.array([1, 0])), replicates=50).mean([0.0, 1.0]).interval is None
    for bad, message in ((np.full(3, np.nan), "no pair has one"), (np.zeros(2), r"expected \[3\]")):
        with pytest.raises(ValueError, match=message):
            estimator.mean(bad)
    with pytest.raises(ValueError, match="replicates: expected 0 or at least 20, got 5"):
        Estimator(3, replicates=5)
    with pytest.raises(ValueError, match="confidence"):
        Estimator(3, confidence=1.0)


def test_mean_curve_leaves_out_rows_without_values() -> None:
    values = np.array([[0.0, 1.0], [np.nan, np.nan], [1.0, 1.0]])
    curve = mean_curve((0, 1), values, Estimator(3, replicates=0))
    assert curve.values == (0.5, 1.0) and curve.area.value == pytest.approx(75)
    assert plain(curve) == {"levels": [0, 1], "values": [0.5, 1.0], "area": {"value": 75.0, "interval": None}}


def test_fills() -> None:
    from xcos_ext.card import IMAGENET

    black = np.zeros((112, 112, 3), np.uint8)
    images = torch.randn(2, 3, 112, 112)
    assert torch.allclose(filled("zero", images, IMAGENET), IMAGENET(black).expand(2, -1, -1, -1), atol=1e-6)
    soft = filled("blur", images, IMAGENET)
    assert soft.shape == images.shape and soft.std() < 0.1
    flat = torch.full((1, 3, 20, 20), 2.5)
    assert torch.allclose(blurred(flat, 3.0), flat, atol=1e-5)
    point = torch.zeros(1, 1, 31, 31)
    point[0, 0, 15, 15] = 1
    spread = blurred(point, 2.0)[0, 0]
    assert spread.sum() == pytest.approx(1, abs=1e-3) and torch.allclose(spread, spread.T) and spread.argmax() == 480
    mean = torch.randn(3, 112, 112)
    assert filled("mean-face", images, IMAGENET, mean)[1].equal(mean)
    with pytest.raises(ValueError, match="mean_face: expected a picture"):
        filled("mean-face", images, IMAGENET)
    with pytest.raises(ValueError, match="fill: expected one of zero, blur, mean-face, got 'pink'"):
        filled("pink", images, IMAGENET)
