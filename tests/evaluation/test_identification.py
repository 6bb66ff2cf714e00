"""Identification figures against a slow reference that reads the lists as the definitions do."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from xcos_ext import evaluation as ev

PEOPLE = 12  # the last four are not enrolled
ENROLLED = {f"p{i}" for i in range(8)}


class Searches:
    """Random candidate lists of several probes a person: scores with or without ties, lists that may end early."""

    def __init__(self, seed: int, *, probes: int = 90, k: int = 6, ties: bool = False, people: range = range(PEOPLE)):
        rng = np.random.default_rng(seed)
        self.persons = [f"p{i}" for i in rng.choice(people, probes)]
        self.k, self.enrolled = k, ENROLLED
        self.scores = np.full((probes, k), -np.inf)
        self.candidates: list[list[str]] = []
        names = sorted(ENROLLED)
        for probe, person in enumerate(self.persons):
            # fp32 as galleries give them; the mate is a little more alike than the others.
            scores = (rng.normal(size=len(names)) + [1.5 * (name == person) for name in names]).astype(np.float32)
            scores = np.round(scores * 2) / 2 if ties else scores
            order = np.argsort(-scores, kind="stable")[: rng.integers(0 if probe % 5 == 0 else 1, k + 1)]
            self.candidates.append([names[i] for i in order])
            self.scores[probe, : len(order)] = scores[order]

    def report(self, **options: Any) -> ev.IdentificationReport:
        options = {"replicates": 0, **options}
        return ev.identification(self.candidates, self.scores, self.persons, self.enrolled, **options)

    # --- the definitions, one probe at a time

    def mated(self) -> list[int]:
        return [i for i, person in enumerate(self.persons) if person in self.enrolled]

    def others(self) -> list[int]:
        return [i for i, person in enumerate(self.persons) if person not in self.enrolled]

    def rate(self, rank: int) -> float:
        return np.mean([self.persons[i] in self.candidates[i][:rank] for i in self.mated()]).item()

    def fpir(self, threshold: float) -> float:
        return np.mean([any(s >= threshold for s in self.listed(i)) for i in self.others()]).item()

    def fnir(self, threshold: float, rank: int) -> float:
        def found(i: int) -> bool:
            best = list(zip(self.candidates[i], self.listed(i), strict=True))[:rank]
            return any(name == self.persons[i] and score >= threshold for name, score in best)

        return np.mean([not found(i) for i in self.mated()]).item()

    def listed(self, probe: int) -> list[float]:
        return [float(score) for score in self.scores[probe] if score > -math.inf]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_figures_are_what_the_definitions_say(seed: int, ties: bool, rank: int) -> None:
    searches = Searches(seed, ties=ties)
    report = searches.report(fpirs=(0.5, 0.1, 0.03), thresholds=(-9, 0.5, 1, 9), rank=rank)
    assert (report.mated, report.non_mated) == (len(searches.mated()), len(searches.others()))
    assert report.mated + report.non_mated == 90 and report.enrolled == 8
    assert (report.mated_people, report.non_mated_people) == (8, 4)
    assert report.cmc == pytest.approx([searches.rate(n) for n in range(1, 7)])
    assert report.rates == {1: report.cmc[0], 5: report.cmc[4]}
    assert [point.requested for point in report.operating_points] == [0.5, 0.1, 0.03]
    assert [point.threshold for point in report.at_thresholds] == [-9, 0.5, 1, 9]
    for point in report.at_thresholds:
        assert point.fpir == searches.fpir(point.threshold) and point.fnir == searches.fnir(point.threshold, rank)
        assert point.requested is None and point.resolved
    scores = sorted({score for i in range(90) for score in searches.listed(i)})
    for point in report.operating_points:
        assert point.fpir == searches.fpir(point.threshold) <= point.requested
        assert point.fnir == searches.fnir(point.threshold, rank)
        assert point.tpir == pytest.approx(1 - point.fnir)
        # The smallest: at the next lower score of a non-mated probe the rate is passed.
        bests = [max(searches.listed(i), default=-math.inf) for i in searches.others()]
        assert searches.fpir(max(best for best in bests if best < point.threshold)) > point.requested
        assert point.false_positives == sum(best >= point.threshold for best in bests)
        assert point.resolved == (point.non_mated * point.requested >= 1)
        assert point.threshold > scores[0]


def test_a_rate_that_too_few_probes_can_tell_is_called_unresolved() -> None:
    searches = Searches(0)
    one, hundredth = searches.report(fpirs=(0.1, 0.01)).operating_points
    assert one.resolved and not hundredth.resolved
    assert hundredth.false_positives == 0 and hundredth.fpir == 0
    best = max(searches.scores[searches.others(), 0])
    assert best < hundredth.threshold < best + 1e-6
    assert hundredth.fpir_upper95 == pytest.approx(1 - 0.05 ** (1 / hundredth.non_mated))  # no event in n trials


def test_without_non_mated_probes_there_is_no_threshold() -> None:
    searches = Searches(1, people=range(8))
    report = searches.report(replicates=40, thresholds=[0.5])
    assert report.non_mated == report.non_mated_people == 0
    assert report.operating_points == report.at_thresholds == ()
    assert report.rates[1] == searches.rate(1)
    assert set(report.intervals) == {"rank@1", "rank@5"}


def test_without_mated_probes_there_are_thresholds_only() -> None:
    searches = Searches(2, people=range(8, 12))
    report = searches.report(replicates=40, fpirs=(0.1,))
    assert report.mated == 0 and report.cmc == () and report.rates == {} and report.intervals == {}
    (point,) = report.operating_points
    assert point.tpir is None and point.fnir is None
    assert 0 < point.fpir == searches.fpir(point.threshold) <= 0.1
    json.dumps(report.as_dict(), allow_nan=False)


def test_no_threshold_is_needed_where_enough_probes_get_no_candidate() -> None:
    searches = Searches(3)
    for i in searches.others()[2:]:
        searches.candidates[i], searches.scores[i] = [], -np.inf
    share = sum(bool(searches.candidates[i]) for i in searches.others()) / len(searches.others())
    at, above = searches.report(fpirs=(share / 2, share), rank=6).operating_points
    assert at.threshold > -math.inf and at.fpir < share
    assert above.threshold == -math.inf and above.fpir == share
    assert above.tpir == searches.rate(6)  # whoever is listed is found
    values = searches.report(fpirs=(share,)).as_dict()
    assert values["operating_points"][0]["threshold"] is None
    json.dumps(values, allow_nan=False)


def test_nobody_is_listed_at_all() -> None:
    report = ev.identification([[], []], np.full((2, 3), -np.inf), ["p0", "p9"], ENROLLED, ranks=[3], replicates=0)
    assert report.cmc == (0, 0, 0) and report.rates == {3: 0}
    assert [(point.fpir, point.tpir, point.threshold) for point in report.operating_points] == [(0, 0, -math.inf)] * 2


@pytest.mark.thorough
def test_intervals_come_from_drawing_people() -> None:
    searches = Searches(4)
    report = searches.report(replicates=200, fpirs=(0.2,), seed=5)
    assert set(report.intervals) == set(report.figures) == {"rank@1", "rank@5", "tpir@0.2"}
    people = np.unique(searches.persons)
    rng = np.random.default_rng(5)
    slow = []
    for count in (64, 64, 64, 8):
        for drawn in rng.multinomial(PEOPLE, np.full(PEOPLE, 1 / PEOPLE), count):
            times = dict(zip(people, drawn, strict=True))
            again = Searches(4)
            chosen = [i for i, person in enumerate(again.persons) for _ in range(times[person])]
            again.persons = [again.persons[i] for i in chosen]
            again.candidates, again.scores = [again.candidates[i] for i in chosen], again.scores[chosen]
            complete = bool(again.mated() and again.others())
            slow.append([*again.report(fpirs=(0.2,)).figures.values()] if complete else [np.nan] * 3)
    for column, (name, draws) in enumerate(report.draws.items()):
        expected = np.array(slow)[:, column]
        np.testing.assert_allclose(draws, expected, atol=1e-12)
        assert report.intervals[name] == pytest.approx(np.nanpercentile(expected, [2.5, 97.5]))
        low, high = report.intervals[name]
        assert low <= report.figures[name] <= high
    assert searches.report(replicates=200, fpirs=(0.2,), seed=5) == report
    narrow = searches.report(replicates=200, fpirs=(0.2,), seed=5, confidence=0.5).intervals["rank@1"]
    assert report.intervals["rank@1"].low < narrow.low < narrow.high < report.intervals["rank@1"].high


def test_replicates_without_a_kind_of_probes_are_left_out() -> None:
    searches = Searches(6, people=range(1, 9))  # one person is not enrolled: missing in a third of the draws
    with pytest.raises(ValueError, match="persons: 8 people on probes are too few to be resampled"):
        searches.report(replicates=200)
    searches = Searches(6, people=range(5, 12))  # four of seven: rarely missing
    report = searches.report(replicates=200, fpirs=(0.2,))
    missing = np.isnan(report.draws["rank@1"])
    assert 0 < missing.sum() < 20
    assert np.isfinite(list(report.intervals.values())).all()


def test_parts_are_averaged_and_compared() -> None:
    options: dict[str, Any] = {"replicates": 60, "fpirs": (0.2,)}
    ours = [Searches(seed).report(**options, seed=seed) for seed in (7, 8)]
    theirs = [Searches(seed, ties=True).report(**options, seed=seed) for seed in (7, 8)]
    mean = ev.average_identification(ours)
    assert set(mean) == {"rank@1", "rank@5", "tpir@0.2"}
    for name, (value, interval) in mean.items():
        assert value == pytest.approx((ours[0].figures[name] + ours[1].figures[name]) / 2)
        replicates = (ours[0].draws[name] + ours[1].draws[name]) / 2
        assert interval == pytest.approx(np.nanpercentile(replicates, [2.5, 97.5]))
    difference = ev.average_identification(ours, theirs)
    other = ev.average_identification(theirs)
    assert difference["rank@1"].value == pytest.approx(mean["rank@1"].value - other["rank@1"].value)
    assert ev.average_identification(ours, ours)["rank@1"] == (0, (0, 0))
    assert ev.average_identification([Searches(7).report()])["rank@1"].interval is None
    with pytest.raises(ValueError, match="reports, minus: expected one or more, as many of both, got 2 and 1"):
        ev.average_identification(ours, theirs[:1])
    with pytest.raises(ValueError, match="reports, minus: expected one or more"):
        ev.average_identification([])
    with pytest.raises(ValueError, match=r"expected as many replicates of all, got \[0, 60\]"):
        ev.average_identification([ours[0], Searches(8).report(fpirs=(0.2,))])
    with pytest.raises(ValueError, match=r"confidence: expected a number in \(0, 1\), got 95"):
        ev.average_identification(ours, confidence=95)


def test_a_report_is_plain_values() -> None:
    report = Searches(9).report(replicates=40)
    values = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert "draws" not in values and values["rates"]["1"] == report.rates[1]
    assert values["operating_points"][0]["fnir"] == report.operating_points[0].fnir
    assert values["intervals"]["tpir@0.1"] == list(report.intervals["tpir@0.1"])
    assert values["cmc"] == list(report.cmc) and values["rank"] == 1


@pytest.mark.parametrize("ties", [False, True])
def test_persons_are_ranked_by_their_best_template(ties: bool) -> None:
    rng = np.random.default_rng(0)
    persons = [f"p{i}" for i in rng.choice(5, 14)]
    scores = rng.normal(size=(20, 14))
    scores = np.round(scores) if ties else scores
    found = ev.ranked_persons(torch.from_numpy(scores), persons, 3)
    for row, listed, given in zip(scores, found.persons, found.scores, strict=True):
        best: dict[str, float] = {}
        for place in sorted(range(14), key=lambda place: (-row[place], place)):
            best.setdefault(persons[place], row[place])
        expected = list(best)[:3]
        assert listed == expected and given.tolist() == [best[name] for name in expected]
    longer = ev.ranked_persons(scores, persons, 9)
    assert longer.scores.shape == (20, 9) and {len(row) for row in longer.persons} == {5}
    assert (longer.scores[:, 5:] == -np.inf).all()
    ev.identification(*longer, ["p0"] * 20, set(persons), ranks=[9], replicates=0)
    empty = ev.ranked_persons(np.empty((2, 0)), [], 4)
    assert empty.persons == [[], []] and (empty.scores == -np.inf).all()


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        (np.zeros((2, 3)), 1, r"scores: expected \[P, 2\], a column for each of persons, got \(2, 3\)"),
        (np.zeros(2), 1, r"scores: expected \[P, 2\]"),
        (np.zeros((2, 2)), 0, "k: expected a number from 1, got 0"),
        (np.array([[0, np.nan]]), 1, "scores: 1 of 2 are NaN or infinite"),
    ],
)
def test_matrices_that_cannot_be_ranked(scores: NDArray[np.float64], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ev.ranked_persons(scores, ["a", "b"], k)


GOOD: dict[str, Any] = {
    "candidates": [["p0", "p1"], ["p1"]],
    "scores": [[0.5, 0.25], [0.75, -math.inf]],
    "persons": ["p0", "p9"],
    "enrolled": ENROLLED,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": [[0.5, 0.25]]}, r"scores: expected \[2, k\], a row for each of candidates, got \(1, 2\)"),
        ({"scores": [0.5, 0.25]}, r"scores: expected \[2, k\], .* got \(2,\)"),
        ({"candidates": [], "scores": np.empty((0, 2)), "persons": []}, "at least one probe, got none"),
        (
            {"candidates": [["p0", "p1", "p2"], ["p1"]]},
            r"candidates: expected at most 2, a column of scores each, got 3 \(probe=0\)",
        ),
        ({"candidates": [["p0", "p0"], ["p1"]]}, r"expected every person once, got 'p0', 'p0' \(probe=0\)"),
        ({"candidates": [["p0", "p1"], ["p9"]]}, r"expected persons who are enrolled, got 'p9' \(probe=1\)"),
        ({"scores": [[0.5, math.nan], [0.75, -math.inf]]}, r"expected a finite one, got nan \(probe=0, place=1\)"),
        ({"scores": [[0.5, -math.inf], [0.75, -math.inf]]}, r"expected a finite one, got -inf \(probe=0, place=1\)"),
        ({"scores": [[math.inf, 0.5], [0.75, -math.inf]]}, "expected a finite one, got inf"),
        ({"scores": [[0.5, 0.25], [0.75, 0.5]]}, r"expected -inf behind 1 candidates, got 0.5 \(probe=1, place=1\)"),
        ({"scores": [[0.25, 0.5], [0.75, -math.inf]]}, r"the best first, got 0.25 before 0.5 \(probe=0, place=0\)"),
        ({"persons": ["p0"]}, "persons: expected 2 names, one a probe, got 1"),
        ({"ranks": [1, 3]}, "ranks: expected 1 to 2, the length of the candidate lists, got 3"),
        ({"rank": 5}, "rank: expected 1 to 2, the length of the candidate lists, got 5"),
        ({"rank": 0}, "rank: expected 1 to 2"),
        ({"fpirs": [0.1, 1]}, r"fpirs: expected rates in \(0, 1\), got 1"),
        ({"thresholds": [math.inf]}, r"thresholds: expected finite numbers, got \[inf\]"),
        ({"replicates": 5}, "replicates: expected 0 or at least 20, got 5"),
        ({"confidence": 1.0}, r"confidence: expected a number in \(0, 1\), got 1.0"),
    ],
)
def test_mistakes_are_named(changed: dict[str, Any], message: str) -> None:
    ev.identification(**GOOD, replicates=0)
    with pytest.raises(ValueError, match=message):
        ev.identification(**{**GOOD, **changed})
