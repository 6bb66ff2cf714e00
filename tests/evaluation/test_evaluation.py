"""Verification figures against independent, slower computations; calibration; the protocol on real faces."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from xcos_ext import evaluation as ev
from xcos_ext.evaluation.datasets import LFW
from xcos_ext.model import XCosAttention, XCosHead, XCosModel, load_model

pytestmark = pytest.mark.usefixtures("one_thread")


def example(seed: int, n: int = 60, ties: bool = False) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    genuine = rng.random(n) < 0.4
    genuine[:2] = [True, False]
    scores = rng.normal(size=n) + 1.5 * genuine
    return (np.round(scores * 2) / 2 if ties else scores), genuine


CASES = [(seed, ties) for seed in range(5) for ties in (False, True)]


@pytest.mark.parametrize(("seed", "ties"), CASES)
def test_error_curves_by_counting(seed: int, ties: bool) -> None:
    scores, genuine = example(seed, ties=ties)
    curves = ev.error_curves(scores, genuine)
    assert curves.thresholds.tolist() == [*sorted(set(scores.tolist())), math.inf]
    for threshold, fmr, fnmr in zip(*curves, strict=True):
        accepted = [s >= threshold for s in scores]
        impostors = [a for a, g in zip(accepted, genuine, strict=True) if not g]
        genuines = [a for a, g in zip(accepted, genuine, strict=True) if g]
        assert fmr == pytest.approx(sum(impostors) / len(impostors))
        assert fnmr == pytest.approx(1 - sum(genuines) / len(genuines))


@pytest.mark.parametrize(("seed", "ties"), CASES)
def test_auc_by_comparing_every_pair(seed: int, ties: bool) -> None:
    scores, genuine = example(seed, ties=ties)
    wins = [1.0 if g > i else 0.5 if g == i else 0.0 for g in scores[genuine] for i in scores[~genuine]]
    assert ev.auc(scores, genuine) == pytest.approx(np.mean(wins), abs=1e-12)


@pytest.mark.parametrize(("seed", "ties"), CASES)
def test_eer_lies_where_the_curves_cross(seed: int, ties: bool) -> None:
    scores, genuine = example(seed, ties=ties)
    rate, threshold = ev.eer(scores, genuine)
    fmr = lambda t: float((scores[~genuine] >= t).mean())  # noqa: E731
    fnmr = lambda t: float((scores[genuine] < t).mean())  # noqa: E731
    step = 1e-9
    # Just below the crossing FMR is larger, at or above it FNMR is; the rate lies between.
    distinct = sorted(set(scores.tolist()))
    below = max([t for t in distinct if t <= threshold + step], default=distinct[0])
    above = min([t for t in [*distinct, math.inf] if t > threshold - step])
    assert fmr(below) >= rate - 1e-9 >= -1e-9 and fnmr(above) >= rate - 1e-9
    assert min(fnmr(below), fmr(above)) <= rate + 1e-9


def test_eer_of_known_distributions() -> None:
    grid = (np.arange(100_000) + 0.5) / 100_000
    # Impostors uniform on [0, 1], genuine on [0.8, 1.8]: FMR = 1 - t and FNMR = t - 0.8 cross at 0.9 with rate 0.1.
    scores, genuine = np.concatenate((grid, grid + 0.8)), np.repeat([False, True], 100_000)
    assert ev.eer(scores, genuine) == pytest.approx((0.1, 0.9), abs=1e-4)
    assert ev.auc(scores, genuine) == pytest.approx(1 - 0.2**2 / 2, abs=1e-6)


def test_perfect_and_useless_scores() -> None:
    genuine = np.repeat([True, False], 10)
    perfect = np.where(genuine, 1.0, 0.0)
    assert ev.auc(perfect, genuine) == 1 and ev.eer(perfect, genuine).rate == 0
    assert 0 < ev.eer(perfect, genuine).threshold <= 1
    assert ev.best_threshold(perfect, genuine) == 0.5
    constant = np.zeros(20)
    assert ev.auc(constant, genuine) == 0.5 and ev.eer(constant, genuine).rate == 0.5
    assert ev.auc(-perfect, genuine) == 0 and ev.eer(-perfect, genuine).rate == 1


@pytest.mark.parametrize(("seed", "ties"), CASES)
def test_best_threshold_is_optimal(seed: int, ties: bool) -> None:
    scores, genuine = example(seed, ties=ties)
    accuracy = lambda t: float(((scores >= t) == genuine).mean())  # noqa: E731
    best = max(accuracy(t) for t in [*scores, scores.max() + 1])
    assert accuracy(ev.best_threshold(scores, genuine)) == best


def test_kfold_accuracy_by_hand() -> None:
    scores, genuine = example(1, 400)
    folds = np.random.default_rng(2).integers(0, 5, 400) * 3
    result = ev.kfold_accuracy(scores, genuine, folds)
    accuracies = []
    for index, fold in enumerate(sorted(set(folds.tolist()))):
        train = folds != fold
        threshold = ev.best_threshold(scores[train], genuine[train])
        assert result.thresholds[index] == threshold
        test = [(s >= threshold) == g for s, g, f in zip(scores, genuine, folds, strict=True) if f == fold]
        accuracies.append(sum(test) / len(test))
    assert result.folds == pytest.approx(accuracies)
    assert result.mean == pytest.approx(sum(accuracies) / 5)
    assert result.std == pytest.approx(math.sqrt(sum((a - result.mean) ** 2 for a in accuracies) / 4))


def test_kfold_does_not_look_at_the_test_fold() -> None:
    scores, genuine = example(3, 300)
    folds = np.arange(300) % 3
    before = ev.kfold_accuracy(scores, genuine, folds)
    scores[folds == 1] = np.random.default_rng(0).normal(size=100)
    after = ev.kfold_accuracy(scores, genuine, folds)
    assert after.thresholds[1] == before.thresholds[1] and after.thresholds[0] != before.thresholds[0]


@pytest.mark.parametrize(("seed", "ties"), CASES)
@pytest.mark.parametrize("fmr", [0.5, 0.1, 0.03, 0.001])
def test_operating_point_is_the_smallest_threshold(seed: int, ties: bool, fmr: float) -> None:
    scores, genuine = example(seed, 120, ties)
    impostors = scores[~genuine]
    point = ev.operating_point(scores, genuine, fmr)
    rate = lambda t: float((impostors >= t).mean())  # noqa: E731
    assert point.fmr == rate(point.threshold) <= fmr
    # One distinct impostor score lower and the rate is exceeded.
    assert rate(max(s for s in impostors if s < point.threshold)) > fmr
    assert point.tar == pytest.approx((scores[genuine] >= point.threshold).mean())
    assert point.false_matches == round(point.fmr * impostors.size) and point.impostors == impostors.size
    assert point.resolved == (fmr >= 1 / impostors.size)


def test_rates_that_are_whole_numbers_of_pairs() -> None:
    for n in (30, 70, 100, 300):
        for k in range(1, 30):
            scores = np.append(np.arange(n) / n, 5.0)
            point = ev.operating_point(scores, np.append(np.zeros(n, bool), True), k / n)
            assert point.false_matches == k


def test_unresolved_rate_says_so() -> None:
    scores = np.concatenate((np.linspace(0, 0.5, 100), np.linspace(0.4, 1, 50))).astype(np.float32)
    genuine = np.repeat([False, True], [100, 50])
    point = ev.operating_point(scores, genuine, 1e-4)
    assert not point.resolved and point.fmr == 0 and point.threshold > 0.5
    assert not (scores[:100] >= np.float32(point.threshold)).any()  # also after rounding to fp32
    assert point.fmr_upper95 == pytest.approx(0.0295, abs=5e-4)  # about 3 / n: what 100 pairs can say at most


def test_fmr_upper_bound_inverts_the_binomial() -> None:
    for k, n in [(0, 10), (1, 20), (3, 50), (12, 400)]:
        p = ev.fmr_upper_bound(k, n)
        tail = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
        assert tail == pytest.approx(0.05, abs=1e-9)
    assert ev.fmr_upper_bound(5, 5) == 1
    # Against the normal approximation where that is good.
    assert ev.fmr_upper_bound(100_000, 1_000_000) == pytest.approx(0.1 + 1.645 * 3e-4, abs=3e-6)


def test_report_is_plain_json() -> None:
    scores, genuine = example(0, 200)
    report = ev.verification(scores, genuine, np.arange(200) % 4, fmrs=(0.1, 0.01))
    data = json.loads(json.dumps(report.as_dict()))
    assert data["auc"] == ev.auc(scores, genuine) and data["eer"] == ev.eer(scores, genuine).rate
    assert data["accuracy"]["mean"] == ev.kfold_accuracy(scores, genuine, np.arange(200) % 4).mean
    assert [p["requested"] for p in data["operating_points"]] == [0.1, 0.01]
    assert ev.verification(scores, genuine).accuracy is None


def test_errors() -> None:
    scores, genuine = example(0)
    with pytest.raises(ValueError, match=r"scores, genuine: expected two equal lengths, got \(60,\) and \(59,\)"):
        ev.auc(scores, genuine[1:])
    with pytest.raises(ValueError, match="scores: 2 of 60 are NaN or infinite"):
        ev.eer(np.r_[np.nan, np.inf, scores[2:]], genuine)
    with pytest.raises(ValueError, match="genuine: expected pairs of both kinds, got 60 genuine of 60"):
        ev.best_threshold(scores, np.ones(60, bool))
    with pytest.raises(ValueError, match="genuine: expected booleans or 0 and 1"):
        ev.auc(scores, np.arange(60))
    with pytest.raises(ValueError, match="folds: expected at least two, got 1"):
        ev.kfold_accuracy(scores, genuine, np.zeros(60))
    with pytest.raises(ValueError, match=r"folds: expected shape \(60,\)"):
        ev.kfold_accuracy(scores, genuine, np.zeros(3))
    with pytest.raises(ValueError, match="folds: expected at least two, got 0"):
        ev.kfold_accuracy([], [], [])
    with pytest.raises(ValueError, match="pairs: expected at least one, got 0"):
        ev.Resampling(0)
    with pytest.raises(ValueError, match=r"fmr: expected a rate in \(0, 1\), got 0"):
        ev.operating_point(scores, genuine, 0)
    with pytest.raises(ValueError, match="false_matches, impostors"):
        ev.fmr_upper_bound(3, 2)
    with pytest.raises(ValueError, match="impostor_scores: expected at least one score"):
        ev.fmr_threshold([], 0.1)
    masked = np.ma.masked_array(scores, mask=scores > 0)
    for name, figure in (
        ("scores", lambda: ev.auc(masked, genuine)),
        ("scores", lambda: ev.kfold_accuracy(masked, genuine, np.arange(60) % 2)),
        ("scores", lambda: ev.ranked_persons(masked.reshape(6, 10), list("abcdefghij"), 2)),
        ("impostor_scores", lambda: ev.fmr_threshold(masked, 0.1)),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected an array without a mask, got a MaskedArray"):
            figure()


def small_model(attention: XCosAttention | Literal["uniform", "norm"] | None) -> XCosModel:
    """A head on 4x3x3 features; there is no backbone to speak of."""
    return XCosModel(nn.Identity(), XCosHead(4, 4, attention=attention)).eval()


@pytest.mark.parametrize("attention", [XCosAttention(4, 3), XCosAttention(4, 3, symmetric=True), "norm", "uniform"])
def test_all_pair_scores_are_the_pairs_scores(
    attention: XCosAttention | Literal["uniform", "norm"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xcos_ext.evaluation.fmr._PROBES_AT_ONCE", 7)
    model = small_model(attention)
    features = torch.randn(20, 4, 3, 3)
    people = [f"p{i // 2}" for i in range(20)]
    scores, genuine = ev.all_pair_scores(model, features, people)
    first, second = torch.triu_indices(20, 20, 1)
    with torch.no_grad():
        expected = model.score(features[first], features[second])
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-6)
    assert genuine.tolist() == [people[i] == people[j] for i, j in zip(first, second, strict=True)]
    assert ev.all_pair_scores(model, features[:1], people[:1])[0].size == 0
    with pytest.raises(ValueError, match="people: expected 20 names, got 3"):
        ev.all_pair_scores(model, features, people[:3])


def test_calibration_is_of_one_piece() -> None:
    model = small_model("norm")
    features = torch.randn(120, 4, 3, 3)
    people = [f"p{i // 2}" for i in range(120)]
    found = ev.calibrate(model, features, people, decision_fmr=0.02, fmrs=(0.1, 0.01))
    scores, genuine = ev.all_pair_scores(model, features, people)
    impostors = scores[~genuine]
    assert found.impostor_pairs == impostors.size == 120 * 119 // 2 - 60
    assert found.curve is not None and (found.curve.pairs, found.curve.people) == (impostors.size, 60)
    for rate, threshold in {**found.fmr, 0.02: found.threshold}.items():
        observed = (impostors >= threshold).mean()
        assert rate - 1 / impostors.size < observed <= rate
        assert found.curve.at(threshold).rate == pytest.approx(observed, rel=1e-9)
    model.set_calibration(found)
    assert (model.threshold, model.fmr_thresholds, model.fmr_curve) == (found.threshold, found.fmr, found.curve)
    with pytest.raises(ValueError, match="at least 30000 are needed"):
        ev.calibrate(model, features, people)


def test_fmr_curve_is_the_samples_rate() -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal(size=20_000)
    curve = ev.fmr_curve(sample, thresholds=[1.2345])
    assert len(curve.scores) < 80 and curve.people is None and curve.pairs == 20_000
    assert curve.at(1.2345).rate == pytest.approx((sample >= 1.2345).mean(), rel=1e-12)
    previous = 1.0
    for score in np.linspace(-5, 5, 301):
        found = curve.at(score)
        assert found.rate <= previous and found.upper95 >= found.rate
        previous = found.rate
        observed = (sample >= score).mean()
        if observed >= 30 / 20_000:
            assert found.resolved and found.rate == pytest.approx(observed, rel=0.1)
    assert curve.at(-9).rate == 1
    beyond = curve.at(sample.max() + 1)
    assert not beyond.resolved and beyond.rate == curve.smallest == ev.fmr_upper_bound(0, 20_000)
    assert curve.smallest == pytest.approx(3 / 20_000, rel=0.01)  # the rule of three
    # With ties and a single score.
    assert ev.fmr_curve([0.5] * 10).at(0.5).rate == 1 and not ev.fmr_curve([0.5]).at(0.6).resolved
    for bad, message in (([], "at least one score"), ([np.nan], "all finite")):
        with pytest.raises(ValueError, match=message):
            ev.fmr_curve(bad)
    with pytest.raises(ValueError, match="people: expected two integers for each of 2 pairs"):
        ev.fmr_curve([0.1, 0.2], ([1], [2, 3]))


def test_bounds_of_the_curve_reckon_with_people_in_many_pairs() -> None:
    """All pairs of 60 people, some of whom resemble everybody: the bound holds as often as it says."""
    rng = np.random.default_rng(0)
    first, second = np.triu_indices(60, 1)
    true = 0.05125  # P(N(0, 1.5) >= 2)
    held = naive = 0
    for _ in range(150):
        likeness = rng.normal(size=60) / 2
        scores = rng.normal(size=first.size) + likeness[first] + likeness[second]
        held += ev.fmr_curve(scores, (first, second), thresholds=[2]).at(2).upper95 >= true
        naive += ev.fmr_curve(scores, thresholds=[2]).at(2).upper95 >= true
    assert held / 150 > 0.88 and naive / 150 < 0.8


def test_weights_are_repetitions() -> None:
    scores, genuine = example(5, 40, ties=True)
    weights = np.random.default_rng(1).integers(0, 4, 40)
    weighted = ev.error_curves(scores, genuine, weights)
    repeated = ev.error_curves(np.repeat(scores, weights), np.repeat(genuine, weights))
    for got, expected in zip(weighted, repeated, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_bootstrap_of_pairs_covers_and_repeats() -> None:
    """Against brute force: each replicate's figures recomputed from repeated pairs."""
    scores, genuine = example(7, 200)
    folds = np.arange(200) % 4
    draws = ev.Resampling(200).draw(np.random.default_rng(0), 40)
    assert (draws.sum(1) == 200).all()
    expected: dict[str, list[float]] = {"accuracy": [], "auc": [], "eer": [], "tar@0.1": []}
    for row in draws:
        s, g, f = (np.repeat(x, row) for x in (scores, genuine, folds))
        report = ev.verification(s, g, f, fmrs=(0.1,))
        assert report.accuracy is not None
        for key, value in zip(
            expected, (report.accuracy.mean, report.auc, report.eer, report.operating_points[0].tar), strict=True
        ):
            expected[key].append(value)
    found = ev.bootstrap(scores, genuine, ev.Resampling(200), folds, fmrs=(0.1,), replicates=40)
    assert set(found) == set(expected)
    for key, values in expected.items():
        # Of equally good thresholds, which one depends on the pairs that are there: these leave out some.
        tolerance = 0.03 if key == "accuracy" else 1e-12
        assert found[key] == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))), abs=tolerance), key
    assert found == ev.bootstrap(scores, genuine, ev.Resampling(200), folds, fmrs=(0.1,), replicates=40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genuine": [0.5, 1] * 20}, "genuine: expected booleans or 0 and 1"),
        ({"genuine": ["no", "yes"] * 20}, "genuine: expected booleans or 0 and 1"),
        ({"scores": np.zeros((40, 1))}, "scores, genuine: expected two equal lengths"),
        ({"resampling": ev.Resampling(41)}, "scores: expected 41, as many as resampling has pairs, got 40"),
        ({"fmrs": [0.1, 2]}, r"fmrs: expected rates in \(0, 1\), got 2"),
        ({"folds": [0] * 40}, "folds: expected 40, at least two of them different"),
        ({"folds": [0, 1]}, r"folds: expected 40, at least two of them different, got \(2,\)"),
    ],
)
def test_bootstrap_refuses_what_the_figures_refuse(change: dict[str, object], message: str) -> None:
    given = {"scores": np.linspace(0, 1, 40), "genuine": [0, 1] * 20, "resampling": ev.Resampling(40)} | change
    with pytest.raises(ValueError, match=message):
        ev.bootstrap(**given, replicates=20)  # type: ignore[arg-type]


def test_nonsense_is_named() -> None:
    with pytest.raises(ValueError, match="weights: expected 2 numbers that are not negative"):
        ev.error_curves([0.9, 0.1], [1, 0], [-1, 1])
    with pytest.raises(ValueError, match=r"people: expected two sides of 3, one a pair, got lengths \[3, 2\]"):
        ev.Resampling(3, (np.zeros(3, np.int64), np.zeros(2, np.int64)))
    with pytest.raises(ValueError, match="impostors: expected at least two pairs, got 1"):
        ev.roc_figure({}, 1)
    with pytest.raises(TypeError, match="score: expected a number, got str"):
        ev.fmr_curve([0.1, 0.2]).at("x")  # type: ignore[arg-type]
    model, cells = XCosModel(nn.Identity(), XCosHead(4, 4, attention="norm")).eval(), torch.randn(60, 4, 7, 7)
    people = [str(i) for i in range(60)]
    with pytest.raises(ValueError, match=r"decision_fmr, fmrs: expected rates in \(0, 1\), got 0"):
        ev.calibrate(model, cells, people, decision_fmr=0)
    assert not ev.calibrate(model, cells, people, decision_fmr=0.05, fmrs=()).fmr


def test_bootstrap_of_people() -> None:
    first, second = np.array([0, 1, 0, 2]), np.array([0, 1, 1, 0])
    resampling = ev.Resampling(4, (first, second))
    assert (resampling.unit, resampling.units) == ("people", 3)
    drawn = np.random.default_rng(3).multinomial(3, np.full(3, 1 / 3), 50)
    expected = np.stack((drawn[:, 0], drawn[:, 1], drawn[:, 0] * drawn[:, 1], drawn[:, 2] * drawn[:, 0]), 1)
    np.testing.assert_array_equal(resampling.draw(np.random.default_rng(3), 50), expected)
    # People with many pairs each: wider than if pairs were independent.
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(20), 30)
    genuine = people % 2 == 0
    scores = rng.normal(size=20)[people] + 0.3 * rng.normal(size=600) + genuine
    one = np.where(genuine, people, people + 100)  # impostors: of two people who are in no other pair
    wide = ev.bootstrap(scores, genuine, ev.Resampling(600, (people, one)), replicates=200)["auc"]
    narrow = ev.bootstrap(scores, genuine, ev.Resampling(600), replicates=200)["auc"]
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    with pytest.raises(ValueError, match="replicates: expected at least 20, got 5"):
        ev.bootstrap(scores, genuine, ev.Resampling(600), replicates=5)
    with pytest.raises(ValueError, match="2 pairs are too few to be resampled"):
        ev.bootstrap([0.1, 0.9], [False, True], ev.Resampling(2), replicates=200, seed=1)


def test_kfold_with_scores_of_their_own_for_every_fold() -> None:
    scores, genuine = example(3, 300)
    folds = np.arange(300) % 3
    same = ev.kfold_accuracy(np.stack([scores] * 3), genuine, folds)
    assert same == ev.kfold_accuracy(scores, genuine, folds)
    rows = np.stack([scores, -scores, scores + 5])
    mixed = ev.kfold_accuracy(rows, genuine, folds)
    for k in range(3):
        assert mixed.folds[k] == ev.kfold_accuracy(rows[k], genuine, folds).folds[k]
    with pytest.raises(ValueError, match="scores: expected a row for each of 3 folds, got 2"):
        ev.kfold_accuracy(rows[:2], genuine, folds)


@pytest.mark.thorough
@pytest.mark.real_data
def test_closed_form_on_lfw(shared_data: Path) -> None:
    """The shipped mean and threshold, which no LFW pair took part in choosing, on the first two of eight folds."""
    model = load_model(shared_data / "mobilefacenet_arcface.pt")
    lfw = LFW(shared_data / "lfw112.zip", shared_data / "pairs.txt", folds=[0, 1])
    scores = ev.evaluate(model, lfw, replicates=0).variants["own"].scores
    accuracy = float(((scores >= model.threshold) == lfw.genuine).mean())
    report = ev.verification(scores, lfw.genuine, lfw.folds)
    assert accuracy >= 0.99, f"{accuracy:.4f} at the shipped threshold {model.threshold}"
    assert report.accuracy.mean >= 0.99 and report.auc >= 0.999
    # The calibration's false match rates hold on people who were not there when it was made.
    assert model.fmr_curve is not None
    rates = {t: model.fmr_curve.at(t).rate for t in (0.0, 0.05, 0.1, 0.15, 0.2)}
    for threshold, rate in {**rates, **{t: rate for rate, t in model.fmr_thresholds.items()}}.items():
        observed = (scores[~lfw.genuine] >= threshold).sum()
        assert abs(observed - 600 * rate) <= 3 * math.sqrt(600 * rate) + 1
