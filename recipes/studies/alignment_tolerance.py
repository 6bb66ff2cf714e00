"""What matching cells with their neighbourhoods gains on turned and on badly aligned faces, and costs on good ones.

    python recipes/studies/alignment_tolerance.py --pictures lfw112.zip --pairs pairs.txt \\
        --recogniser mobilefacenet_arcface.pt --json benchmarks/results/alignment/lfw.json
    python recipes/studies/alignment_tolerance.py --table benchmarks/results/alignment/lfw.json

LFW pairs of the folds that the shipped model was not trained on. "turned": the pairs whose faces differ most in the
direction that they look, read off five landmarks. "moved" and the like: the first picture of every pair is shifted,
rotated or scaled before it is embedded, as if the alignment had been wrong. Every rule of matching is scored on the
same features; its threshold is chosen on the other fold's untouched pairs, separately for each rule. Intervals are of
the difference to radius 0, by resampling people.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import numpy as np
import torch
from harness import machine, write_json
from numpy.typing import NDArray
from study_tables import alignment_rules
from torch import Tensor
from torch.nn import functional

from xcos_ext.evaluation import best_threshold
from xcos_ext.evaluation.bootstrap import Resampling
from xcos_ext.evaluation.datasets import LFW
from xcos_ext.faces import ARCFACE_TEMPLATE, SmallDetector
from xcos_ext.faces.alignment import warp
from xcos_ext.model import XCosModel, load_model, load_recogniser, plug
from xcos_ext.ops import grid_cosine, grid_match, xcos_score

Floats = NDArray[np.float64]
Picture = NDArray[np.uint8]
BATCH = 64
REPLICATES = 2000
FMR = 1e-2


class Rule(NamedTuple):
    """How cells are matched.

    match: those of the operator, and two that it does not have: "step" is the best where every cell but the one in
    its place costs ``temperature``, "shift" one displacement of the whole face, the best of all.
    """

    radius: int
    match: str = "best"
    temperature: float = 0.1

    def label(self) -> str:
        if self.radius == 0:
            return "in place"
        how = {"best": "", "soft": f" T={self.temperature:g}", "step": f" cost {self.temperature:g}", "shift": ""}
        return f"{self.match} {self.radius}{how[self.match]}"


OPERATOR = (Rule(0), *(Rule(r) for r in (1, 2)), *(Rule(r, "soft", t) for r in (1, 2) for t in (0.05, 0.1, 0.3)))
OTHERS = (Rule(0), Rule(1), *(Rule(1, "step", cost) for cost in (0.05, 0.1, 0.2, 0.4)), Rule(1, "shift"))


def moved(pixels: float) -> Callable[[np.random.Generator], NDArray[np.float64]]:
    """A shift in a random direction; [2, 3], from the picture to the altered one."""

    def draw(rng: np.random.Generator) -> NDArray[np.float64]:
        angle = rng.uniform(0, 2 * math.pi)
        return np.array([[1, 0, pixels * math.cos(angle)], [0, 1, pixels * math.sin(angle)]])

    return draw


def turned_and_scaled(degrees: float, scale: float) -> Callable[[np.random.Generator], NDArray[np.float64]]:
    """A rotation either way and a scaling up or down about the middle of a 112-pixel crop."""

    def draw(rng: np.random.Generator) -> NDArray[np.float64]:
        angle = math.radians(degrees) * rng.choice((-1, 1))
        factor = (1 + scale) ** rng.choice((-1, 1))
        c, s, middle = factor * math.cos(angle), factor * math.sin(angle), 55.5
        return np.array([[c, -s, middle - c * middle + s * middle], [s, c, middle - s * middle - c * middle]])

    return draw


ALTERATIONS: dict[str, Callable[[np.random.Generator], NDArray[np.float64]]] = {
    **{f"moved {p} px": moved(p) for p in (2, 4, 8)},
    **{f"rotated {d} degrees": turned_and_scaled(d, 0.0) for d in (5, 10)},
    "scaled 5 %": turned_and_scaled(0.0, 0.05),
}


def altered(picture: Picture, key: str, name: str) -> Picture:
    """The same alteration of a picture in every run and for every model."""
    rng = np.random.default_rng(zlib.crc32(f"{key} {name}".encode()))
    return warp(picture, ALTERATIONS[name](rng), picture.shape[:2], extend=True)


def looking(pictures: Sequence[Picture]) -> Floats:
    """Where faces look: how far the nose tip lies beside the middle of the eyes, in distances of the eyes.

    For a face that looks straight ahead it is 0. If the nose tip stands half a distance of the eyes before them, the
    tangent of the angle is twice the value.
    """
    detector = SmallDetector()
    values = []
    for picture in pictures:
        points = detector.read(picture, ARCFACE_TEMPLATE[None])[0][0]
        eyes = points[1] - points[0]
        values.append(float((points[2] - (points[0] + points[1]) / 2) @ eyes / (eyes @ eyes)))
    return np.array(values)


@torch.inference_mode()
def embed(model: XCosModel, pictures: Sequence[Picture]) -> Tensor:
    """Grid features of all pictures."""
    parts = []
    for first in range(0, len(pictures), BATCH):
        parts.append(model.features_of(pictures[first : first + BATCH], BATCH))
        print(f"\r    {first + len(parts[-1])} of {len(pictures)} pictures", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return torch.cat(parts)


def shifted_score(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """The best score [N] of all displacements by at most a cell, of the cells that have a partner."""
    a, b = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
    h, w = a.shape[2:]
    found = []
    for row in (-1, 0, 1):
        for column in (-1, 0, 1):
            rows, columns = slice(max(0, -row), h - max(0, row)), slice(max(0, -column), w - max(0, column))
            to_rows, to_columns = slice(max(0, row), h + min(0, row)), slice(max(0, column), w + min(0, column))
            s = (a[:, :, rows, columns] * b[:, :, to_rows, to_columns]).sum(1)
            share = weights[:, rows, columns]
            found.append((share * s).sum((1, 2)) / share.sum((1, 2)))
    return torch.stack(found).amax(0)


def matched(a: Tensor, b: Tensor, rule: Rule, weights: Tensor) -> Tensor:
    """Scores [N] of one rule."""
    if rule.match == "shift":
        return shifted_score(a, b, weights)
    if rule.match == "step":  # of two candidates: the cell in its place, and the best of all less the cost
        in_place = grid_cosine(a, b)
        ways = (grid_match(x, y, radius=rule.radius, symmetric=False) for x, y in ((a, b), (b, a)))
        s = torch.stack([torch.maximum(in_place, way - rule.temperature) for way in ways]).mean(0)
    else:
        s = grid_match(a, b, radius=rule.radius, match=rule.match, temperature=rule.temperature)  # type: ignore
    return (weights * s).sum((1, 2))


@torch.inference_mode()
def scores(model: XCosModel, norm: bool, a: Tensor, b: Tensor, rules: Sequence[Rule]) -> Floats:
    """Scores [rules, N]; W is the pair's attention for every rule."""
    rows: list[list[Tensor]] = [[] for _ in rules]
    for first in range(0, len(a), 512):
        x, y = a[first : first + 512], b[first : first + 512]
        maps = xcos_score(x, y, "norm", return_maps=True) if norm else model.score(x, y, return_maps=True)
        for row, rule in zip(rows, rules, strict=True):
            row.append(matched(x, y, rule, maps.attention))
    return torch.stack([torch.cat(row) for row in rows]).double().numpy()


def areas(values: Floats, genuine: NDArray[np.bool_], weights: NDArray[np.int64]) -> Floats:
    """AUC under every row of weights [replicates, N]."""
    order = np.argsort(values, kind="stable")
    labels, w = genuine[order], weights[:, order].astype(np.float64)
    impostors = np.where(labels, 0.0, w)
    below = np.cumsum(impostors, 1)
    return (np.where(labels, w, 0.0) * below).sum(1) / (
        np.where(labels, w, 0.0).sum(1) * impostors.sum(1)
    )  # ties are as good as absent


def accept_rate(values: Floats, genuine: NDArray[np.bool_]) -> float:
    """TAR where at most FMR of the impostors are accepted."""
    impostors = np.sort(values[~genuine])[::-1]
    return float((values[genuine] > impostors[int(FMR * impostors.size)]).mean())


def figures(
    values: Floats,
    thresholds: Floats,
    genuine: NDArray[np.bool_],
    folds: NDArray[np.int64],
    people: tuple[NDArray[np.int64], NDArray[np.int64]],
    rules: Sequence[Rule],
) -> list[dict[str, Any]]:
    """Figures of every rule on one set of pairs; thresholds [rules, folds of the sample]."""
    weights = Resampling(genuine.size, people).draw(np.random.default_rng(0), REPLICATES)
    kinds = (weights[:, genuine].sum(1) > 0) & (weights[:, ~genuine].sum(1) > 0)
    weights = weights[kinds]
    rows: list[dict[str, Any]] = []
    base: tuple[Floats, Floats] | None = None
    for rule, row, cuts in zip(rules, values, thresholds, strict=True):
        right = ((row >= cuts[folds]) == genuine).astype(np.float64)
        drawn = areas(row, genuine, weights), (weights @ right) / weights.sum(1)
        base = base or drawn
        rows.append(
            {
                "rule": rule.label(),
                "auc": float(areas(row, genuine, np.ones((1, row.size), np.int64))[0]),
                "accuracy": float(right.mean()),
                f"tar@{FMR:g}": accept_rate(row, genuine),
                "genuine_mean": float(row[genuine].mean()),
                "impostor_mean": float(row[~genuine].mean()),
                **{
                    f"{name}_gain": np.percentile(one - other, (2.5, 97.5)).tolist()
                    for name, one, other in zip(("auc", "accuracy"), drawn, base, strict=True)
                },
            }
        )
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    rules = OTHERS if options.others else OPERATOR
    pairs = LFW(options.pictures, options.pairs, folds=options.folds)
    assert pairs.people is not None
    print(f"{len(pairs)} pairs, {len(pairs.keys)} pictures", file=sys.stderr)
    pictures = [pairs.read(key) for key in pairs.keys]
    look = looking(pictures)
    difference = np.abs(look[pairs.first] - look[pairs.second])
    sets: dict[str, NDArray[np.bool_]] = {"all, as they are": np.ones(len(pairs), bool)}
    for share in (25, 10):
        limits = {kind: np.quantile(difference[pairs.genuine == kind], 1 - share / 100) for kind in (True, False)}
        sets[f"turned most, {share} %"] = difference >= np.where(pairs.genuine, limits[True], limits[False])
    sets["turned least, 50 %"] = difference <= np.where(
        pairs.genuine, *(np.quantile(difference[pairs.genuine == kind], 0.5) for kind in (True, False))
    )
    names, ids = np.unique(np.array(pairs.people), return_inverse=True)
    people = ids[pairs.first], ids[pairs.second]
    own_folds, folds = np.unique(pairs.folds, return_inverse=True)

    shipped = load_model()
    models: dict[str, tuple[XCosModel, bool]] = {
        "shipped model, own attention": (shipped, False),
        "shipped model, norm attention": (shipped, True),
    }
    if options.recogniser is not None:
        models["closed form"] = (plug(load_recogniser(options.recogniser)), True)
    first_keys = np.unique(pairs.first)
    results: dict[str, Any] = {}
    features: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
    for label, (model, norm) in models.items():
        print(label, file=sys.stderr)
        if id(model) not in features:
            clean = embed(model, pictures)
            wrong = {
                name: embed(model, [altered(pictures[i], pairs.keys[i], name) for i in first_keys])
                for name in ([] if options.turned_only else ALTERATIONS)
            }
            features[id(model)] = clean, wrong
        clean, wrong = features[id(model)]
        second = clean[pairs.second]
        untouched = scores(model, norm, clean[pairs.first], second, rules)
        # A fold's threshold is the best one on the other folds' untouched pairs.
        thresholds = np.array(
            [
                [best_threshold(row[folds != k], pairs.genuine[folds != k]) for k in range(own_folds.size)]
                for row in untouched
            ]
        )

        def on(values: Floats, chosen: NDArray[np.bool_], cuts: Floats = thresholds) -> list[dict[str, Any]]:
            who = people[0][chosen], people[1][chosen]
            return figures(values[:, chosen], cuts, pairs.genuine[chosen], folds[chosen], who, rules)

        results[label] = {
            name: {"pairs": int(chosen.sum()), "rules": on(untouched, chosen)} for name, chosen in sets.items()
        }
        position = np.searchsorted(first_keys, pairs.first)
        everything = np.ones(len(pairs), bool)
        for name, first in wrong.items():
            found = on(scores(model, norm, first[position], second, rules), everything)
            results[label][name] = {"pairs": len(pairs), "rules": found}
        print("\n".join(alignment_rules({"results": {label: results[label]}})), flush=True)
    return {
        "machine": machine(),
        "folds": [int(fold) + 1 for fold in own_folds],
        "people": int(names.size),
        "looking": {
            "difference_quantiles": dict(
                zip(("50", "75", "90", "100"), np.quantile(difference, (0.5, 0.75, 0.9, 1.0)).tolist(), strict=True)
            )
        },
        "replicates": REPLICATES,
        "results": results,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="LFW's aligned crops, folder or zip")
    parser.add_argument("--pairs", type=Path, help="LFW's pairs file")
    parser.add_argument("--recogniser", type=Path, help="weights of a recogniser for the closed form")
    parser.add_argument("--folds", type=int, nargs="+", default=[6, 7], help="folds, from 0 (default: 6 7)")
    parser.add_argument("--others", action="store_true", help="rules that the operator does not have, for comparison")
    parser.add_argument("--turned-only", action="store_true", help="leave the altered pictures out")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--table", type=Path, help="print the tables of such a file and end")
    options = parser.parse_args()
    if options.table is not None:
        print("\n".join(alignment_rules(json.loads(options.table.read_text()))))
        return 0
    if options.pictures is None or options.pairs is None:
        parser.error("expected --pictures and --pairs")
    contents = run(options)
    if options.json is not None:
        write_json(options.json, contents)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
