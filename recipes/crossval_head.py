"""Cross-validate training on LFW: for each fold, train on people who are not in it, then score its pairs.

    python -m recipes.crossval_head recipes/head_closed_form.toml --json result.json --models runs \\
        --set data.pictures=lfw112.zip --set data.pairs=pairs.txt --set model.recogniser=net.pt

For every fold of the pairs file the experiment is run anew with all people of that fold held out: the closed form's
mean, batch norm's statistics and the training see the other folds' people and the people in no fold. The fold's pairs
are scored by that model, so every score comes from a model that never saw its people; accuracy takes the threshold from
the other folds' scores. Beside it, on the same pairs: the model as it started, and the recogniser's own cosine. Slow
trainings may hold out several folds at a time (``--together 2``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.common import say, write_json
from xcos_ext.evaluation import evaluate
from xcos_ext.evaluation.datasets import LFW, PairList, read_pairs
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosModel, load_model
from xcos_ext.training import train
from xcos_ext.training.tasks import load_experiment
from xcos_ext.training.tasks.config import HeadExperiment
from xcos_ext.training.tasks.head import HeadTask, make_task
from xcos_ext.training.tasks.sources import Sources, held_out_people, load_sources

FMRS = (1e-1, 1e-2, 1e-3)
ATTENTIONS = ("own", "norm", "uniform", "corr", "symmetric")


class Parts:
    """Trains without the people of some folds at a time.

    Attributes:
        starts: models as they started, with the pairs that they are judged by; of the parts that are trained.
        seconds: that these trainings took.
    """

    def __init__(self, experiment: HeadExperiment, sources: Sources, parts: Sequence[tuple[int, ...]]) -> None:
        self.experiment, self.sources, self.parts = experiment, sources, parts
        self.starts: list[tuple[XCosModel, PairList]] = []
        self.seconds: list[float] = []

    def _task(self, folds: tuple[int, ...]) -> tuple[HeadTask, PairList]:
        experiment, sources = self.experiment, self.sources
        data = experiment.data
        assert data.pairs is not None
        lfw = LFW(data.pictures, data.pairs, folds=[fold - 1 for fold in folds])
        held_out = held_out_people(dataclasses.replace(data, folds=folds), sources.pictures.names)
        task = make_task(sources, experiment, held_out)
        trained = {sources.pictures.keys[int(picture)] for picture in task.trained}
        assert not trained & set(lfw.keys)
        return task, lfw

    def trained(self, models: Path) -> Iterator[tuple[XCosModel, PairList]]:
        """Trained models as their files say; what is in the folder already is not trained again."""
        for folds in self.parts:
            task, lfw = self._task(folds)
            self.starts.append((task.model(task.module), lfw))
            out = models / f"folds-{'-'.join(map(str, folds))}"
            result = train(task, self.experiment.train, out, resume=True, show=False)
            self.seconds.append(result.seconds)
            say(f"{out.name}: {result.seconds:.0f} s, loss {result.loss:.5f}")
            yield load_model(result.files[0]), lfw


def cross_validate(
    experiment: HeadExperiment, sources: Sources, parts: Sequence[tuple[int, ...]], models: Path
) -> dict[str, Any]:
    """Figures of all parts together; see the module."""
    made = Parts(experiment, sources, parts)
    plain = None if sources.recogniser.embedding_size is None else sources.recogniser
    attentions = ATTENTIONS if plain is not None else tuple(name for name in ATTENTIONS if name != "corr")
    trained = evaluate(made.trained(models), attentions=attentions, teacher=plain, fmrs=FMRS)
    start = evaluate(made.starts, teacher=plain, fmrs=FMRS)
    rows = {"trained": trained.variants["own"], "start": start.variants["own"]}
    rows |= {f"trained, {name}": v for name, v in trained.variants.items() if name not in ("own", "teacher")}
    if plain is not None:
        rows["cosine"] = trained.variants["teacher"]
    assert trained.resampling is not None
    return {
        "pairs": trained.genuine.size,
        "people": trained.resampling.units,
        "held_out_together": [list(folds) for folds in parts],
        "seconds_per_part": made.seconds,
        "scores": {name: variant.as_dict() for name, variant in rows.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Figures as a Markdown table; brackets are 95 % intervals over people."""
    lines = ["| score | accuracy % | AUC | EER % | TAR % at FMR 1e-1, 1e-2, 1e-3 |", "|---|---|---|---|---|"]
    for name, values in result["scores"].items():
        intervals, found = values["intervals"], values["accuracy"]
        accuracy = ""
        if found is not None:
            low, high = (100 * end for end in intervals["accuracy"])
            accuracy = f"{100 * found['mean']:.2f} ± {100 * found['std']:.2f} [{low:.2f}, {high:.2f}]"
        area = "{:.5f} [{:.5f}, {:.5f}]".format(values["auc"], *intervals["auc"])
        tars = ", ".join(f"{100 * point['tar']:.2f}" for point in values["operating_points"])
        lines.append(f"| {name} | {accuracy} | {area} | {100 * values['eer']:.2f} | {tars} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="TOML file with task = 'head' or 'model'")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="change a setting")
    parser.add_argument("--folds", type=int, nargs="+", help="folds, numbered from 1 (default: all of the pairs file)")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="folds held out at a time (default: 1)")
    parser.add_argument("--models", type=Path, help="keep trainings and models here, and take up what is there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--label", help="what to call it in the results (default: the experiment's name)")
    parser.add_argument("--json", type=Path, help="add the result to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.together < 1:
        parser.error(f"--together: expected a number from 1, got {options.together}")
    try:
        experiment = load_experiment(options.experiment, options.set)
        if not isinstance(experiment, HeadExperiment) or experiment.data.pairs is None:
            raise XCosError(
                f"{options.experiment}: expected an experiment with task = 'head' or 'model', and data.pairs"
            )
        known_folds = sorted({pair.fold + 1 for pair in read_pairs(experiment.data.pairs)})
        folds = options.folds or known_folds
        if not set(folds) <= set(known_folds):
            raise XCosError(f"--folds: expected some of {known_folds}, got {sorted(folds)}")
        parts = [tuple(folds[i : i + options.together]) for i in range(0, len(folds), options.together)]
        sources = load_sources(experiment.data, experiment.model, flipped=experiment.loss.flipped)
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            models = options.models
            if models is None:
                models = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crossval-")))
            result = cross_validate(experiment, sources, parts, models)
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
        write_json(options.json, known)
    return 0


if __name__ == "__main__":
    sys.exit(main())
