"""Cross-validate training on LFW: for each fold, train on people who are not in it, then score its pairs.

    python examples/crossval_head.py configs/head_closed_form.toml --json result.json \\
        --set data.pictures=lfw112.zip --set data.pairs=pairs.txt --set model.recogniser=net.pt

For every fold of the pairs file the experiment is run anew with all people of that fold held out: the closed form's
mean, batch norm's statistics and the training see the other folds' people and the people in no fold. The fold's pairs
are scored by that head, so every score comes from a head that never saw its people; accuracy takes the threshold from
the other folds' scores. Beside it, on the same pairs: the head as it started, and the recogniser's own cosine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcos_ext.datasets import LFW
from xcos_ext.errors import XCosError
from xcos_ext.evaluation import VerificationReport, verification
from xcos_ext.training import TrainConfig, train
from xcos_ext.training.experiment import load_experiment
from xcos_ext.training.head_config import HeadExperiment
from xcos_ext.training.head_task import HeadTask, Sources, held_out_people, load_sources
from xcos_ext.training.model_task import ModelTask

FMRS = (1e-1, 1e-2, 1e-3)
_AT_ONCE = 256


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@torch.no_grad()
def score(task: HeadTask | ModelTask, first: Tensor, second: Tensor) -> np.ndarray:
    """Scores of pairs of pictures, given by their indices."""
    used, places = torch.cat((first, second)).unique(return_inverse=True)
    features = task.features(task.module, used)
    a, b = (features[side] for side in places.chunk(2))
    pairs = zip(a.split(_AT_ONCE), b.split(_AT_ONCE), strict=True)
    return torch.cat([task.module.head.score(x, y) for x, y in pairs]).double().numpy()


def cross_validate(
    experiment: HeadExperiment, sources: Sources, folds: Sequence[int], config: TrainConfig
) -> dict[str, Any]:
    """Scores and figures of all folds; see the module."""
    data = experiment.data
    assert data.pairs is not None
    lfw = LFW(data.pictures, data.pairs, folds=[fold - 1 for fold in folds])
    places = {key: place for place, key in enumerate(sources.pictures.keys)}
    where = torch.tensor([places[key] for key in lfw.keys])
    first, second = where[torch.from_numpy(lfw.first)], where[torch.from_numpy(lfw.second)]
    names = ("trained", "start", "cosine")
    scores = {name: np.full(len(lfw.genuine), np.nan) for name in names}
    seconds = []
    for fold in folds:
        held_out = held_out_people(dataclasses.replace(data, folds=(fold,)), sources.pictures.names)
        start = HeadTask(sources, experiment.model, experiment.loss, held_out, seed=config.seed)
        task = ModelTask(start, experiment.body) if experiment.task == "model" else start
        rows = torch.from_numpy(np.flatnonzero(lfw.folds == fold - 1))
        assert not set(start.trained.tolist()) & set(torch.cat((first[rows], second[rows])).tolist())
        scores["start"][rows] = score(task, first[rows], second[rows])
        result = train(task, config, show=False)
        scores["trained"][rows] = score(task, first[rows], second[rows])
        if sources.maps.embeddings is not None:
            own = sources.maps.embeddings[0]
            scores["cosine"][rows] = (own[first[rows]] * own[second[rows]]).sum(1).double().numpy()
        seconds.append(result.seconds)
        say(f"fold {fold}: {len(start.trained)} pictures trained on, {result.seconds:.0f} s, loss {result.loss:.5f}")
    reports = {
        name: verification(values, lfw.genuine, lfw.folds if len(folds) > 1 else None, fmrs=FMRS)
        for name, values in scores.items()
        if np.isfinite(values).all()
    }
    correlation = float(np.corrcoef(scores["trained"], scores["cosine"])[0, 1]) if "cosine" in reports else None
    return {
        "pairs": len(lfw.genuine),
        "folds": list(folds),
        "seconds_per_fold": seconds,
        "correlation_with_cosine": correlation,
        "scores": {name: row(report) for name, report in reports.items()},
    }


def row(report: VerificationReport) -> dict[str, Any]:
    """What is kept of a report."""
    accuracy = report.accuracy
    return {
        "accuracy": None if accuracy is None else accuracy.mean,
        "std": None if accuracy is None else accuracy.std,
        "per_fold": None if accuracy is None else list(accuracy.folds),
        "thresholds": None if accuracy is None else list(accuracy.thresholds),
        "auc": report.auc,
        "eer": report.eer,
        "tar": {f"{point.requested:g}": point.tar for point in report.operating_points},
    }


def table(result: dict[str, Any]) -> str:
    """Figures as a Markdown table."""
    lines = ["| score | accuracy % | AUC | EER % | TAR % at FMR 1e-1, 1e-2, 1e-3 |", "|---|---|---|---|---|"]
    for name, values in result["scores"].items():
        tars = ", ".join(f"{100 * values['tar'][f'{rate:g}']:.2f}" for rate in FMRS)
        accuracy = "" if values["accuracy"] is None else f"{100 * values['accuracy']:.2f} ± {100 * values['std']:.2f}"
        lines.append(f"| {name} | {accuracy} | {values['auc']:.5f} | {100 * values['eer']:.2f} | {tars} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="TOML file with task = 'head' or 'model'")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="change a setting")
    parser.add_argument("--folds", type=int, nargs="+", help="folds, numbered from 1 (default: all of the pairs file)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--label", help="what to call it in the results (default: the experiment's name)")
    parser.add_argument("--json", type=Path, help="add the result to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        experiment = load_experiment(options.experiment, options.set)
        if not isinstance(experiment, HeadExperiment) or experiment.data.pairs is None:
            raise XCosError(
                f"{options.experiment}: expected an experiment with task = 'head' or 'model', and data.pairs"
            )
        sources = load_sources(experiment.data, experiment.model, flipped=experiment.loss.flipped)
        everything = LFW(experiment.data.pictures, experiment.data.pairs)
        folds = options.folds or [int(fold) + 1 for fold in np.unique(everything.folds)]
        start = time.perf_counter()
        result = cross_validate(experiment, sources, folds, experiment.train)
    except (XCosError, OSError, ValueError) as error:
        parser.error(str(error))
    label = options.label or experiment.name
    say(f"{label}: {time.perf_counter() - start:.0f} s")
    print(table(result))
    if options.json is not None:
        settings = dataclasses.asdict(experiment)
        for path in (("data", "pictures"), ("data", "pairs"), ("data", "cache"), ("model", "recogniser")):
            settings[path[0]][path[1]] = Path(settings[path[0]][path[1]]).name
        known = json.loads(options.json.read_text()) if options.json.is_file() else {}
        known[label] = {"settings": settings, **result}
        temporary = options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
