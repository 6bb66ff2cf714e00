"""Closed- and open-set identification on LFW: learned attention, uniform, norm attention, and plain cosine.

    python -m recipes.identify_lfw recipes/head_closed_form.toml --teacher mobilefacenet_apache2.pt \\
        --set data.pictures=lfw112.zip --set data.pairs=pairs.txt --set model.recogniser=mobilefacenet_arcface.pt \\
        --json benchmarks/results/identification/lfw.json

Protocol. Of everybody with two pictures or more the first ones are enrolled, at most three and always one less than
there are; all their other pictures are mated probes. People with one picture are not enrolled: their pictures are
non-mated probes. A person's score is the best of the person's templates. Figures are those of
``xcos_ext.evaluation.identification``, intervals are over people on the probes.

Nobody is scored by a model that has seen them in training:

* the model that comes with the package is tested on the people of folds 7 and 8 of View 2, who were kept from it;
* a head with learned attention on the recogniser of the experiment's file, from its closed form, is trained with the
  people of one half of LFW (mean and statistics included) and tested on those of the other, both ways. The halves are
  the first and the second half of the pairs file's folds, which share no person, each with half of the people who are
  in no pair. Beside it, on the same probes: the closed form before training, and the recogniser's plain cosine.

The two halves have different models, so no threshold is put on both: each has its own figures, and these are averaged.
Recogniser and teacher were trained by others on other data; whether some of these people are in it is not known.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.common import say, write_json
from xcos_ext.backbones import Recogniser
from xcos_ext.evaluation import (
    Candidates,
    Estimate,
    IdentificationReport,
    average_identification,
    identification,
    ranked_persons,
)
from xcos_ext.evaluation.datasets import read_pairs
from xcos_ext.faces import PersonFolder
from xcos_ext.gallery import Gallery
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosModel, load_model, load_recogniser
from xcos_ext.training import train
from xcos_ext.training.data import Pictures, normalised, people_of_folds, people_of_share
from xcos_ext.training.tasks import load_experiment
from xcos_ext.training.tasks.config import HeadExperiment
from xcos_ext.training.tasks.head import HeadTask
from xcos_ext.training.tasks.sources import Sources, load_sources

SCHEMA = 1
ENROLLED = 3  # pictures of a person at most
CANDIDATES = 20  # persons that a search lists
RANKS = (1, 5, 10, 20)
FPIRS = (1e-1, 1e-2)
SHIPPED_UNSEEN = (7, 8)  # folds whose people the shipped model has never seen: docs/models.md
BATCH = 64
# --quick: what is left of each part, and of the training.
QUICK_SEVERAL, QUICK_SINGLE, QUICK_PICTURES = 20, 30, 4
QUICK_TRAINING: Mapping[str, Any] = {"steps": 4, "batch": 16, "warmup": 1}
QUICK_REPLICATES = 40

Features = Callable[[Tensor], Tensor]


# --- the protocol


class Part(NamedTuple):
    """Some people's pictures, enrolled and searched.

    Attributes:
        name: who they are.
        gallery, probes: indices of pictures, int64.
        people: of each picture of the data set, by index.
        seed: of the draws of people, another for every part.
    """

    name: str
    gallery: Tensor
    probes: Tensor
    people: list[str]
    seed: int

    def of(self, chosen: Tensor) -> list[str]:
        """Whose some pictures are."""
        return [self.people[int(index)] for index in chosen]

    @property
    def counts(self) -> dict[str, int]:
        """What stands behind the figures."""
        persons = self.of(self.gallery)
        of_probes = Counter(self.of(self.probes))
        enrolled = set(persons)
        mated = [count for person, count in of_probes.items() if person in enrolled]
        return {
            "people": len(enrolled | set(of_probes)),
            "enrolled_people": len(enrolled),
            "enrolled_pictures": len(persons),
            "mated_probes": sum(mated),
            "most_mated_probes_of_a_person": max(mated, default=0),
            "non_mated_probes": sum(of_probes.values()) - sum(mated),
        }


def make_part(name: str, pictures: Pictures, chosen: set[str], seed: int) -> Part:
    """Who is enrolled and who is searched; see the module."""
    people = [pictures.names[int(person)] for person in pictures.people]
    own: dict[str, list[int]] = {}
    for index, person in enumerate(people):
        if person in chosen:
            own.setdefault(person, []).append(index)
    gallery = [index for indices in own.values() for index in indices[: min(ENROLLED, len(indices) - 1)]]
    probes = sorted(set().union(*own.values()) - set(gallery))
    return Part(name, torch.tensor(gallery), torch.tensor(probes), people, seed)


def halves(pairs: str, names: Sequence[str]) -> dict[str, set[str]]:
    """Everybody of a data set in two halves that share no fold of the pairs file."""
    folds = sorted({pair.fold + 1 for pair in read_pairs(pairs)})
    sides = folds[: len(folds) // 2], folds[len(folds) // 2 :]
    rest = set(names) - people_of_folds(pairs, folds)
    first = people_of_share(sorted(rest), 0.5)
    return {
        f"folds {side[0]} to {side[-1]} and half of the people in no pair": set(names)
        & (people_of_folds(pairs, side) | others)
        for side, others in zip(sides, (first, rest - first), strict=True)
    }


def quick_people(folder: PersonFolder, wanted: Sequence[set[str]]) -> set[str]:
    """A few people of each set: with few pictures, and with one."""
    found: set[str] = set()
    for names in wanted:
        sizes = {name: len(folder.of(name)) for name in sorted(names)}
        found |= set([name for name, size in sizes.items() if 1 < size <= QUICK_PICTURES][:QUICK_SEVERAL])
        found |= set([name for name, size in sizes.items() if size == 1][:QUICK_SINGLE])
    return found


# --- searches


@torch.no_grad()
def search(
    part: Part, pictures: Pictures, model: XCosModel, features: Features, attentions: Sequence[str]
) -> dict[str, Candidates]:
    """Candidates of all probes with some attentions, through a gallery of fp16 templates on disk."""
    with tempfile.TemporaryDirectory(prefix="identify-") as folder:
        found = {}
        with Gallery.create(Path(folder) / "gallery", model, dtype=torch.float16) as gallery:
            gallery.add(
                [pictures.keys[int(index)] for index in part.gallery],
                model.templates(features(part.gallery), "gallery", torch.float16),
                persons=part.of(part.gallery),
            )
            probes = model.templates(features(part.probes), "probe", torch.float16)
            for attention in attentions:
                hits = gallery.search(probes, CANDIDATES, attention=attention, by="person", metadata=False)
                persons = [[str(name) for name in row] for row in hits.persons]  # nobody here is without a name
                found[attention] = Candidates(persons, hits.scores.double().numpy())
    return found


def cosine(part: Part, embed: Features) -> Candidates:
    """Candidates by the plain cosine of embeddings at unit length."""
    scores = embed(part.probes) @ embed(part.gallery).T
    return ranked_persons(scores.numpy(), part.of(part.gallery), CANDIDATES)


def in_batches(compute: Features) -> Features:
    """The same, some pictures at a time."""

    @torch.no_grad()
    def batched(chosen: Tensor) -> Tensor:
        return torch.cat([compute(indices) for indices in chosen.split(BATCH)])

    return batched


# --- the systems


class Tested(NamedTuple):
    """Attributes: reports of a part's rows, and how their model was trained (None: it was not)."""

    part: Part
    rows: dict[str, IdentificationReport]
    training: dict[str, Any] | None


def judge(
    part: Part, answers: Mapping[str, Candidates], replicates: int, thresholds: Mapping[str, Sequence[float]]
) -> dict[str, IdentificationReport]:
    """Figures of every row; some at thresholds of their own as well."""
    persons, enrolled = part.of(part.probes), set(part.of(part.gallery))
    options: dict[str, Any] = {"ranks": RANKS, "fpirs": FPIRS, "replicates": replicates, "seed": part.seed}
    return {
        name: identification(*candidates, persons, enrolled, thresholds=thresholds.get(name, ()), **options)
        for name, candidates in answers.items()
    }


def shipped(part: Part, pictures: Pictures, teacher: Recogniser | None, replicates: int) -> Tested:
    """The model that comes with the package."""
    model = load_model()
    assert isinstance(model.backbone, Recogniser)
    body = model.backbone
    features = in_batches(lambda chosen: model.features(normalised(body, pictures.images[chosen])))
    answers = search(part, pictures, model, features, ("own", "uniform"))
    # It has no embedding but its flattened grid feature.
    answers["cosine of the flattened grid feature"] = cosine(
        part, lambda chosen: F.normalize(features(chosen).flatten(1), dim=1)
    )
    if teacher is not None:
        embed = in_batches(lambda chosen: F.normalize(teacher(normalised(teacher, pictures.images[chosen]))))
        answers["teacher's plain cosine"] = cosine(part, embed)
    # Its thresholds for pairs, from these very people: how many false candidates they let through in a search.
    assert model.threshold is not None
    thresholds = {"own": [model.threshold, *model.fmr_thresholds.values()]}
    return Tested(part, judge(part, answers, replicates, thresholds), None)


def trained(part: Part, experiment: HeadExperiment, sources: Sources, folder: Path, replicates: int) -> Tested:
    """A head trained without the people of the part, its closed form, and the recogniser's cosine."""
    pictures, maps = sources.pictures, sources.maps
    held_out = set(part.of(part.gallery)) | set(part.of(part.probes))
    task = HeadTask(sources, experiment, held_out)
    assert not held_out & set(part.of(task.trained))
    start = task.model(task.module)
    result = train(task, experiment.train, folder, resume=True, show=False)
    say(f"{part.name}: {result.seconds:.0f} s of training, loss {result.loss:.5f}")
    model = load_model(result.files[0])

    def features_of(model: XCosModel) -> Features:
        return in_batches(lambda chosen: model.head.features(maps.grids[0][chosen].float()))

    head = search(part, pictures, model, features_of(model), ("own", "norm", "uniform"))
    closed = search(part, pictures, start, features_of(start), ("norm", "uniform"))
    answers = {
        "head, learned": head["own"],
        "head, norm": head["norm"],
        "head, uniform": head["uniform"],
        "closed form, norm": closed["norm"],
        "closed form, uniform": closed["uniform"],
    }
    embeddings = maps.embeddings
    if embeddings is not None:
        answers["plain cosine"] = cosine(part, lambda chosen: embeddings[0][chosen])
    training = {
        "pictures": len(task.trained),
        "people": len(set(part.of(task.trained))),
        "steps": result.steps,
        "loss": result.loss,
        "seconds": result.seconds,
    }
    return Tested(part, judge(part, answers, replicates, {}), training)


# --- results


def _values(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {
        name: {"value": value, "interval": None if interval is None else list(interval)}
        for name, (value, interval) in estimates.items()
    }


def summary(tested: Sequence[Tested]) -> dict[str, Any]:
    """A system's parts, their mean, and what the first row has over each of the others."""
    rows = {name: [test.rows[name] for test in tested] for name in tested[0].rows}
    first, *others = rows
    return {
        "parts": [
            {
                "name": test.part.name,
                "counts": test.part.counts,
                "training": test.training,
                "rows": {name: report.as_dict() for name, report in test.rows.items()},
            }
            for test in tested
        ],
        "mean": {name: _values(average_identification(reports)) for name, reports in rows.items()},
        "differences": {
            f"{first} - {name}": _values(average_identification(rows[first], rows[name])) for name in others
        },
    }


def table(system: Mapping[str, Any]) -> str:
    """Means over the parts as a Markdown table; brackets are 95 % intervals over people."""
    figures = [f"rank@{rank}" for rank in RANKS] + [f"tpir@{rate:g}" for rate in FPIRS]
    lines = [f"| score | {' | '.join(f'{name} %' for name in figures)} |", "|---" * (len(figures) + 1) + "|"]
    for name, values in system["mean"].items():
        cells = []
        for figure in figures:
            found = values[figure]
            low, high = found["interval"] or (float("nan"),) * 2
            cells.append(f"{100 * found['value']:.2f} [{100 * low:.2f}, {100 * high:.2f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on, as the benchmarks say it."""
    folder = str(Path(__file__).resolve().parent.parent / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)  # before any installed module of a name that is used there
    return importlib.import_module("harness").machine()


def settings_of(experiment: HeadExperiment) -> dict[str, Any]:
    """The experiment's settings; where files lay is nobody's business."""
    settings = dataclasses.asdict(experiment)
    for table_name, key in (("data", "pictures"), ("data", "pairs"), ("data", "cache"), ("model", "recogniser")):
        settings[table_name][key] = Path(settings[table_name][key]).name
    # Who is held out is said by the protocol instead.
    for key in ("folds", "held_out_share", "held_out_list"):
        del settings["data"][key]
    return settings


def measure(experiment: HeadExperiment, teacher: Recogniser | None, folder: Path, quick: bool) -> dict[str, Any]:
    """Both systems on their people."""
    data = experiment.data
    assert data.pairs is not None
    pictures = PersonFolder(data.pictures)
    unseen = people_of_folds(data.pairs, SHIPPED_UNSEEN) & set(pictures.people)
    sides = halves(data.pairs, pictures.people)
    chosen, replicates = set(pictures.people), 1000
    if quick:
        chosen, replicates = quick_people(pictures, [unseen, *sides.values()]), QUICK_REPLICATES
        experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **QUICK_TRAINING))
    began = time.perf_counter()
    sources = load_sources(data, experiment.model, flipped=experiment.loss.flipped, chosen=chosen.__contains__)
    say(f"{time.perf_counter() - began:.0f} s for pictures and maps")
    folds = " and ".join(map(str, SHIPPED_UNSEEN))
    part = make_part(f"folds {folds}", sources.pictures, unseen, 0)
    systems = {"shipped": summary([shipped(part, sources.pictures, teacher, replicates)])}
    parts = [make_part(name, sources.pictures, names, seed) for seed, (name, names) in enumerate(sides.items(), 1)]
    tests = [
        trained(part, experiment, sources, folder / f"half-{number}", replicates)
        for number, part in enumerate(parts, 1)
    ]
    systems["recogniser"] = summary(tests)
    assert __doc__ is not None
    return {
        "quick": quick,
        "protocol": {
            "text": __doc__.split("\n\n", 2)[2].strip(),
            "pictures_enrolled_at_most": ENROLLED,
            "candidates": CANDIDATES,
            "template_dtype": "float16",
            "replicates": replicates,
            "pictures": len(sources.pictures),
            "oddities": {kind: len(found) for kind, found in sources.pictures.oddities.items()},
        },
        "settings": settings_of(experiment),
        "systems": systems,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="TOML file with task = 'head' and data.pairs; its folds do not matter")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="change a setting")
    parser.add_argument("--teacher", help="recogniser whose plain cosine stands beside the shipped model")
    parser.add_argument("--models", type=Path, help="keep trainings here, and take up what is there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few people and steps, to see that it runs")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        experiment = load_experiment(options.experiment, options.set)
        if not isinstance(experiment, HeadExperiment) or experiment.task != "head" or experiment.data.pairs is None:
            raise XCosError(f"{options.experiment}: expected an experiment with task = 'head' and data.pairs")
        teacher = None if options.teacher is None else load_recogniser(options.teacher)
        with contextlib.ExitStack() as stack:
            folder = options.models
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="identify-")))
            result = measure(experiment, teacher, folder, options.quick)
        for name, system in result["systems"].items():
            print(f"\n{name}, {', '.join(part['name'] for part in system['parts'])}\n\n{table(system)}")
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            files = {"teacher": options.teacher and Path(options.teacher).name}
            content = {"schema": SCHEMA, "machine": machine(), **files, **result}
            write_json(options.json, content)
    except (XCosError, OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
