"""Verification figures against independent, slower computations; calibration; the protocol on real faces."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from xcos_ext import evaluation as ev
from xcos_ext.datasets import LFW
from xcos_ext.evaluation.lfw import score_model
from xcos_ext.nn import load_model

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
    grid = np.arange(-3, 5, 0.1)
    chosen = ev.best_threshold(scores, genuine, grid)
    assert chosen in grid and accuracy(chosen) == max(map(accuracy, grid))


@pytest.mark.parametrize("candidates", [None, np.arange(-4, 6, 0.01)])
def test_kfold_accuracy_by_hand(candidates: NDArray[np.float64] | None) -> None:
    scores, genuine = example(1, 400)
    folds = np.random.default_rng(2).integers(0, 5, 400) * 3
    result = ev.kfold_accuracy(scores, genuine, folds, candidates)
    accuracies = []
    for index, fold in enumerate(sorted(set(folds.tolist()))):
        train = folds != fold
        threshold = ev.best_threshold(scores[train], genuine[train], candidates)
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
    with pytest.raises(ValueError, match=r"fmr: expected a rate in \(0, 1\), got 0"):
        ev.operating_point(scores, genuine, 0)
    with pytest.raises(ValueError, match="candidates: expected at least one finite threshold"):
        ev.best_threshold(scores, genuine, [])
    with pytest.raises(ValueError, match="false_matches, impostors"):
        ev.fmr_upper_bound(3, 2)
    with pytest.raises(ValueError, match="impostor_scores: expected at least one score"):
        ev.fmr_threshold([], 0.1)


class CosineModel:
    """Stands in for a model: the score is the cosine of the flattened features."""

    @staticmethod
    def score(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(a.flatten(1), b.flatten(1))


def test_all_pair_scores_and_calibration() -> None:
    features = torch.randn(120, 4, 2, 2)
    people = [f"p{i // 2}" for i in range(120)]
    scores, genuine = ev.all_pair_scores(CosineModel(), features, people)  # type: ignore[arg-type]
    assert scores.size == genuine.size == 120 * 119 // 2 and genuine.sum() == 60
    flat = torch.nn.functional.normalize(features.flatten(1))
    expected = (flat @ flat.T)[torch.triu_indices(120, 120, 1).unbind()]
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)
    model = CosineModel()
    found = ev.calibrate(model, features, people, decision_fmr=0.02, fmrs=(0.1, 0.01))  # type: ignore[arg-type]
    impostors = scores[~genuine]
    assert found.impostor_pairs == impostors.size and found.genuine_pairs == 0
    for rate, threshold in {**found.fmr, 0.02: found.threshold}.items():
        assert rate - 1 / impostors.size < (impostors >= threshold).mean() <= rate
    with pytest.raises(ValueError, match="at least 30000 are needed"):
        ev.calibrate(model, features, people)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="people: expected 120 names, got 3"):
        ev.all_pair_scores(model, features, people[:3])  # type: ignore[arg-type]


@pytest.mark.real_data
def test_closed_form_on_lfw(shared_data: Path) -> None:
    """The shipped mean and threshold, which no LFW pair took part in choosing, on the first two of eight folds."""
    model = load_model(shared_data / "mobilefacenet_arcface.pt")
    lfw = LFW(shared_data / "lfw112.zip", shared_data / "pairs.txt", folds=[0, 1])
    scores = score_model(model, lfw)
    accuracy = float(((scores >= model.threshold) == lfw.genuine).mean())
    report = ev.verification(scores, lfw.genuine, lfw.folds)
    assert accuracy >= 0.99, f"{accuracy:.4f} at the shipped threshold {model.threshold}"
    assert report.accuracy.mean >= 0.99 and report.auc >= 0.999
    # The thresholds' false match rates hold on people who were not there when they were set.
    for rate, threshold in model.fmr_thresholds.items():
        observed = (scores[~lfw.genuine] >= threshold).sum()
        assert abs(observed - 600 * rate) <= 3 * math.sqrt(600 * rate) + 1
