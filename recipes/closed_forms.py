"""Forms of the closed-form score compared on LFW: ``python -m recipes.closed_forms --help``.

A recogniser's plain cosine and several forms of its closed-form cells are scored on the same pairs. Means and axes
come from one picture each of the people who are in no pair, so nothing that is measured was fitted to the pairs that
it is measured on. Accuracies take the threshold from the other folds. To evaluate one model, use ``xcos evaluate
verification``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from recipes.common import say, write_json
from xcos_ext.backbones import Recogniser
from xcos_ext.evaluation.datasets import LFW
from xcos_ext.evaluation.scoring import Score, Track, score_pairs
from xcos_ext.evaluation.verification import VerificationReport, verification
from xcos_ext.faces import PersonFolder
from xcos_ext.io.errors import PictureError
from xcos_ext.model import DEFAULT_SPREAD, PlugStatistics, load_recogniser, plug, plug_statistics
from xcos_ext.ops import xcos_score

__all__ = ["FORMS", "compare_forms", "iterate_pictures", "lfw_statistics"]

#: Score forms in the order of the table: key -> description.
FORMS = {
    "plain": "plain cosine of the embedding",
    "raw-uniform": "raw 512-channel map, uniform W",
    "uniform": "own cells, not centred, uniform W",
    "norm": "own cells, not centred, norm W",
    "norm-centred": "own cells, centred, norm W",
    "norm-centred-pca": "own cells, centred, PCA to 32 per cell, norm W",
    "spread": f"cells shared (spread {DEFAULT_SPREAD:g}), not centred, norm W",
    "spread-centred": f"cells shared (spread {DEFAULT_SPREAD:g}), centred, norm W (default)",
    "spread-centred-pca": f"cells shared (spread {DEFAULT_SPREAD:g}), centred, PCA to 32 per cell, norm W",
}

# form -> (how the cells are plugged, score mode); the two forms without cells are scored apart.
_CELLS: dict[str, tuple[dict[str, Any], str | None]] = {
    "uniform": ({"centre": False, "spread": 0.0}, None),
    "norm": ({"centre": False, "spread": 0.0}, "norm"),
    "norm-centred": ({"spread": 0.0}, "norm"),
    "norm-centred-pca": ({"spread": 0.0, "project": 32}, "norm"),
    "spread": ({"centre": False}, "norm"),
    "spread-centred": ({}, "norm"),
    "spread-centred-pca": ({"project": 32}, "norm"),
}


def iterate_pictures(pictures: PersonFolder, keys: Sequence[str], batch_size: int = 32) -> Iterator[NDArray[np.uint8]]:
    """Decoded pictures in batches, uint8 RGB [n, H, W, 3]; all must have the same size."""
    for first in range(0, len(keys), batch_size):
        yield np.stack([pictures.read(key) for key in keys[first : first + batch_size]])


def lfw_statistics(
    recogniser: Recogniser,
    lfw: LFW,
    *,
    project: int | None = None,
    spread: float = DEFAULT_SPREAD,
    limit: int | None = None,
) -> PlugStatistics:
    """Statistics from one picture of each person who is in no pair.

    Args:
        recogniser: the network.
        lfw: the protocol; its pairs decide who is left.
        project: principal axes per cell, or None.
        spread: sharing between cells that the axes are for.
        limit: use at most this many people, evenly spread over the sorted names.
    """
    people = lfw.people_in_no_pair()
    if limit is not None and limit < len(people):
        people = tuple(people[int(i)] for i in np.linspace(0, len(people) - 1, limit))
    keys = [lfw.pictures.of(person)[0] for person in people]
    return plug_statistics(
        recogniser,
        iterate_pictures(lfw.pictures, keys),
        project=project,
        spread=spread,
        note=f"one picture each of {len(keys)} people who are in no pair",
    )


def _plain(score: Callable[..., Any], **options: Any) -> Score:
    """A scorer that returns only the tensor of scores."""

    def call(a: Tensor, b: Tensor) -> Tensor:
        result = score(a, b, **options)
        assert isinstance(result, Tensor)
        return result

    return call


@torch.no_grad()
def compare_forms(
    recogniser: Recogniser,
    lfw: LFW,
    statistics: Mapping[float, PlugStatistics],
    *,
    forms: Sequence[str] = tuple(FORMS),
    spreads: Sequence[float] = (),
    batch_size: int = 32,
    track: Track | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Scores of all pairs of the protocol in several forms of one recogniser's similarity.

    Args:
        recogniser: the network, on the CPU.
        lfw: the protocol.
        statistics: spread -> statistics, with 32 axes where a form is projected.
        forms: keys of :data:`FORMS`.
        spreads: further spreads of centred cells; their forms are called ``"spread=0.5"`` and so on.
        batch_size: pictures per forward pass.
        track: as in :func:`~xcos_ext.evaluation.score_pairs`.

    Returns:
        form -> scores [N] in the order of ``lfw.pairs``.

    Raises:
        PictureError: a picture cannot be used.
        ValueError: an unknown form.
    """
    unknown = set(forms) - set(FORMS)
    if unknown:
        raise ValueError(f"forms: expected some of {', '.join(FORMS)}, got {', '.join(sorted(unknown))}")
    scores: dict[str, Score] = {}
    features: dict[str, Callable[[Tensor], Tensor]] = {}
    for form in forms:
        if form == "plain":
            features[form], scores[form] = recogniser.embed, _plain(F.cosine_similarity)
        elif form == "raw-uniform":
            features[form], scores[form] = (lambda grid: grid), _plain(xcos_score)
        else:
            options, mode = _CELLS[form]
            if options.get("centre", True):
                options = {**options, "statistics": statistics[options.get("spread", DEFAULT_SPREAD)]}
            features[form] = plug(recogniser, **options).head.features
            scores[form] = _plain(xcos_score, attention=mode)
    for spread in spreads:
        # The mean serves every spread, so any statistics will do.
        any_statistics = next(iter(statistics.values()))
        features[f"spread={spread:g}"] = plug(recogniser, statistics=any_statistics, spread=spread).head.features
        scores[f"spread={spread:g}"] = _plain(xcos_score, attention="norm")
    recogniser.eval()

    def extract(pictures: Sequence[NDArray[np.uint8]]) -> dict[str, Tensor]:
        grid = recogniser.grid(recogniser.preprocessing(pictures))
        return {form: compute(grid) for form, compute in features.items()}

    scorers = {form: (form, score) for form, score in scores.items()}
    scored = score_pairs(lfw, extract, scorers, batch_size=batch_size, track=track)
    if scored.failures:
        raise PictureError(next(iter(scored.failures.values())))
    return scored.values


def _table(
    reports: Mapping[str, VerificationReport],
    scores: Mapping[str, NDArray[np.float64]],
    titles: Mapping[str, str],
) -> str:
    """The reports as a Markdown table."""
    plain = scores.get("plain")
    lines = [
        "| score | accuracy % | AUC | EER % | TAR % at FMR 1e-2 | correlation with the plain cosine |",
        "|---|---|---|---|---|---|",
    ]
    for form, report in reports.items():
        accuracy = (
            "" if report.accuracy is None else f"{100 * report.accuracy.mean:.2f} ± {100 * report.accuracy.std:.2f}"
        )
        tar = next(point for point in report.operating_points if point.requested == 1e-2).tar
        correlation = "" if plain is None else f"{np.corrcoef(plain, scores[form])[0, 1]:.3f}"
        lines.append(
            f"| {titles[form]} | {accuracy} | {report.auc:.5f} | {100 * report.eer:.2f} | {100 * tar:.2f} | "
            f"{correlation} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.closed_forms", description=__doc__)
    parser.add_argument("--pictures", required=True, help="aligned 112x112 crops: folder or zip archive")
    parser.add_argument("--pairs", required=True, help="pairs file in LFW's format")
    parser.add_argument("--weights", required=True, help="recogniser whose forms are compared")
    parser.add_argument("--folds", type=int, nargs="+", help="folds to use, numbered from 1 (default: all)")
    parser.add_argument("--forms", nargs="*", choices=tuple(FORMS), default=list(FORMS))
    parser.add_argument("--spreads", type=float, nargs="*", default=[], help="further spreads to compare")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write all figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    folds = None if options.folds is None else [fold - 1 for fold in options.folds]
    lfw = LFW(options.pictures, options.pairs, folds=folds)
    count = np.unique(lfw.folds).size
    say(f"{len(lfw.pairs)} pairs in {count} folds, {len(lfw.keys)} pictures")
    result: dict[str, Any] = {"pairs": len(lfw.pairs), "folds": int(count)}
    recogniser = load_recogniser(options.weights)
    # spread -> axes wanted; the mean is the same for all of them.
    wanted: dict[float, int | None] = {}
    for form in options.forms:
        if form in _CELLS:
            cells = _CELLS[form][0]
            spread = cells.get("spread", DEFAULT_SPREAD)
            wanted[spread] = cells.get("project") or wanted.get(spread)
    wanted = wanted or {DEFAULT_SPREAD: None}
    statistics = {s: lfw_statistics(recogniser, lfw, project=axes, spread=s) for s, axes in wanted.items()}
    note = next((s.note for s in statistics.values()), "")
    say(f"statistics: {note}")
    scores = compare_forms(recogniser, lfw, statistics, forms=options.forms, spreads=options.spreads)
    titles = {**FORMS, **{f"spread={s:g}": f"cells centred, norm W, spread {s:g}" for s in options.spreads}}
    result |= {"weights": Path(options.weights).name, "statistics": note}
    reports = {
        form: verification(values, lfw.genuine, lfw.folds if count > 1 else None) for form, values in scores.items()
    }
    print(_table(reports, scores, titles))
    result["forms"] = {form: report.as_dict() for form, report in reports.items()}
    if options.json is not None:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
