"""Train the model that the package ships, cross-validated by people.

    python -m recipes.train_default_model recipes/default_model.toml --out runs --json default_model.json \\
        --set data.pictures=lfw112.zip --set data.pairs=pairs.txt --set student.teacher=mobilefacenet_apache2.pt \\
        --plot docs/images/default_model_roc.png --ship xcos_ext/data/xcos_compact.safetensors

Folds are held out two at a time: for each such part of the pairs file the experiment is run anew without the people of
these folds, and the part's pairs are scored by that model, so no score comes from a model that has seen either person.
Accuracy takes each fold's threshold from the other folds' scores. A training that is done already is not repeated, one
that was interrupted is taken up again. ``--only`` runs some parts, for several processes side by side.

The model shipped is that of the last part: what is measured on that part's people holds for the very file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.common import say, write_json
from recipes.distill import Experiment
from xcos_ext.evaluation import error_curves, evaluate, roc_figure
from xcos_ext.evaluation.datasets import LFW, read_pairs
from xcos_ext.explain import save_figure
from xcos_ext.io.errors import XCosError
from xcos_ext.model import load_model, load_recogniser, save_model
from xcos_ext.training import train
from xcos_ext.training.tasks import create_task, load_experiment

ATTENTIONS = ("own", "norm", "corr", "uniform")
LABELS = {
    "own": "compact model, learned attention",
    "norm": "compact model, norm attention",
    "corr": "compact model, fixed attention (corr)",
    "uniform": "compact model, every cell alike",
    "teacher": "teacher, plain cosine",
}
FOLDS_HELD_OUT = 2
FMRS = (1e-1, 1e-2, 1e-3)


def parts_of(pairs: str) -> list[tuple[int, ...]]:
    """Folds, numbered from 1, some at a time."""
    folds = sorted({pair.fold + 1 for pair in read_pairs(pairs)})
    return [tuple(folds[i : i + FOLDS_HELD_OUT]) for i in range(0, len(folds), FOLDS_HELD_OUT)]


def run_part(experiment: Experiment, folds: tuple[int, ...], out: Path) -> Path:
    """Train without the people of some folds; the file of the model."""
    file = out / "model.safetensors"
    if file.is_file():
        return file
    part = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, folds=folds))
    said: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - said.get(what, 0) > 60:
            said[what] = time.monotonic()
            say(f"{what}: {done} of {total}")

    task = create_task(part, progress)
    result = train(task, part.train, out, resume=True, on_step=lambda step, row: say(f"{step}: {json.dumps(row)}"))
    return result.files[0]


def measure(
    experiment: Experiment, parts: Sequence[tuple[int, ...]], files: Sequence[Path], plot: Path | None = None
) -> dict[str, Any]:
    """Figures of all parts together, each scored by its own model, beside the teacher's plain cosine; ROC curves."""
    data = experiment.data
    assert data.pairs is not None
    models = [load_model(file) for file in files]
    lists = [LFW(data.pictures, data.pairs, folds=[fold - 1 for fold in folds]) for folds in parts]
    teacher = load_recogniser(experiment.student.teacher)
    result = evaluate(zip(models, lists, strict=True), attentions=ATTENTIONS, teacher=teacher, fmrs=FMRS)
    single = {}
    ends = np.cumsum([len(lfw) for lfw in lists])[:-1]
    for folds, model, lfw, scores in zip(
        parts, models, lists, np.split(result.variants["own"].scores, ends), strict=True
    ):
        single["-".join(map(str, folds))] = {
            "threshold": model.threshold,
            "fmr_thresholds": {repr(rate): t for rate, t in model.fmr_thresholds.items()},
            "accuracy_at_threshold": model.threshold and float(((scores >= model.threshold) == lfw.genuine).mean()),
            "pairs": len(lfw),
        }
    if plot is not None:
        impostors = int((~result.genuine).sum())
        curves = {LABELS[name]: error_curves(v.scores, result.genuine) for name, v in result.variants.items()}
        title = f"LFW, {result.genuine.size:,} pairs, every score from a model that never saw its people"
        save_figure(roc_figure(curves, impostors, title=title), plot)
    assert result.resampling is not None
    return {
        "pairs": result.genuine.size,
        "people": result.resampling.units,
        "variants": {name: variant.as_dict() for name, variant in result.variants.items()},
        "models": single,
    }


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| score | accuracy % | AUC | EER % | TAR % at FMR 1e-2 | correlation with the teacher |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in result["variants"].items():
        interval = figures["intervals"]
        tar = next(point for point in figures["operating_points"] if point["requested"] == 1e-2)["tar"]
        cells = [
            name,
            "{:.2f} [{:.2f}, {:.2f}]".format(*(100 * x for x in (figures["accuracy"]["mean"], *interval["accuracy"]))),
            "{:.5f} [{:.5f}, {:.5f}]".format(figures["auc"], *interval["auc"]),
            f"{100 * figures['eer']:.2f}",
            f"{100 * tar:.2f}",
            f"{figures['teacher_correlation']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="experiment with task = 'recipes.distill'")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trainings, one each")
    parser.add_argument(
        "--only", type=int, nargs="+", metavar="PART", help="train these parts, numbered from 1, and stop"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, help="draw the ROC curves here")
    parser.add_argument("--ship", type=Path, help="write the last part's model here, in fp16")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        experiment = load_experiment(options.config, options.assignments)
        if not isinstance(experiment, Experiment) or experiment.data.pairs is None:
            raise XCosError(f"{options.config}: expected task = 'recipes.distill' and data.pairs")
        parts = parts_of(experiment.data.pairs)
        chosen = [parts[number - 1] for number in options.only] if options.only else parts
        files = [run_part(experiment, folds, options.out / f"folds-{'-'.join(map(str, folds))}") for folds in chosen]
        if options.only and len(chosen) < len(parts):
            return 0
        settings = dataclasses.asdict(experiment)
        for table_name, key in (("data", "pictures"), ("data", "pairs"), ("data", "cache"), ("student", "teacher")):
            settings[table_name][key] = Path(settings[table_name][key]).name  # where they lay is nobody's business
        result = {"experiment": settings, **measure(experiment, parts, files, options.plot)}
        print(table(result))
        if options.json is not None:
            write_json(options.json, result)
        if options.ship is not None:
            save_model(load_model(files[-1]), options.ship, dtype=torch.float16)
    except (XCosError, OSError, ValueError, IndexError) as error:
        say(f"train_default_model: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
