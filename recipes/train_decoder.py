"""Train a decoder of what a model keeps of a face, or train the one there is further; measure it on held-out people.

    python -m recipes.train_decoder recipes/decoder.toml --out runs/decoder --json decoder.json \\
        --set data.pictures=lfw112.zip --set data.pairs=pairs.txt --ship xcos_ext/data/decoder_xcos_slim.safetensors

For another xCos model, from the decoder of the shipped one (the shapes have to agree):

    python -m recipes.train_decoder recipes/decoder.toml --out runs/other --model other.safetensors \\
        --from xcos_ext/data/decoder_xcos_slim.safetensors --set train.steps=600 \\
        --set data.pictures=lfw112.zip --set data.pairs=pairs.txt

For the embeddings of a recogniser: ``--features embedding --model mobilefacenet_apache2.pt --set loss.judged=0.25``.

An interrupted training is taken up again by the same command. ``--measure FILE`` measures a decoder without training.

The table says how far the drawings are from the pictures, how near they are for the model itself, for how many pairs of
different photographs of a held-out person the verdict stays when the first one is replaced by its drawing, and, with
``--judge``, what a recogniser says that had no part in the training. The mean face stands beside it as a control.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from recipes.common import say, write_json
from recipes.decode import DecodeTask, Experiment, Judge, measure
from xcos_ext.explain.explainers import EmbeddingCosine
from xcos_ext.explain.reconstruction import FeatureDecoder, fingerprint_of, load_decoder
from xcos_ext.io.atomic import write_atomically
from xcos_ext.io.errors import XCosError
from xcos_ext.model import load_recogniser
from xcos_ext.training import train
from xcos_ext.training.tasks import create_task, load_experiment

BATCH = 64


def genuine_pairs(people: Tensor) -> Tensor:
    """The first two pictures of everyone with two: places [P, 2]."""
    places: dict[int, list[int]] = {}
    for place, person in enumerate(people.tolist()):
        places.setdefault(person, []).append(place)
    return torch.tensor([own[:2] for own in places.values() if len(own) > 1]).view(-1, 2)


@torch.no_grad()
def drawings(decoder: FeatureDecoder, judge: Judge, images: Tensor) -> Tensor:
    """Pictures drawn of what the model keeps of pictures, RGB in 0..1."""
    parts = [part.float() / 255 for part in images.split(BATCH)]
    return torch.cat([decoder(judge(part)[0]).clamp(0, 1) for part in parts])


@torch.no_grad()
def features(judge: Judge, pictures: Tensor) -> Tensor:
    """Of pictures, RGB in 0..1."""
    return torch.cat([judge(part)[0] for part in pictures.split(BATCH)])


def impostor_threshold(judge: Judge, images: Tensor, people: Tensor, fmr: float) -> float:
    """The cosine that a share ``fmr`` of the pairs of different people reach."""
    made = features(judge, images.float() / 255)
    scores = made @ made.T
    return float(torch.quantile(scores[people[:, None] != people].float()[:: max(1, scores.numel() // 10**7)], 1 - fmr))


def measured(
    decoder: FeatureDecoder, task: DecodeTask, pictures: int, judge_file: str | None, fmr: float
) -> dict[str, float]:
    """Figures on the people held out."""
    chosen = task.held_out[:: max(1, -(-len(task.held_out) // pictures))]
    images, whose = task.pictures.images, task.pictures.people
    threshold = task.judge.model.threshold
    if threshold is None:
        threshold = impostor_threshold(task.judge, images[chosen], whose[chosen], fmr)
    figures = {"pictures": float(len(chosen)), "threshold": threshold}
    figures |= measure(decoder, task.judge, images[chosen], threshold=threshold)

    pairs = task.held_out[genuine_pairs(whose[task.held_out])]
    pairs = pairs[:: max(1, -(-len(pairs) // pictures))]
    if len(pairs):
        first, second = images[pairs[:, 0]], images[pairs[:, 1]]
        drawn = drawings(decoder, task.judge, first)
        mean = decoder.mean_face.expand_as(drawn)
        figures["pairs"] = float(len(pairs))
        judges = {"": (task.judge, threshold)}
        if judge_file is not None:
            other = Judge(EmbeddingCosine(load_recogniser(judge_file)))
            judges["judge "] = other, impostor_threshold(other, images[chosen], whose[chosen], fmr)
        for name, (judge, limit) in judges.items():
            told = features(judge, second.float() / 255)
            for what, shown in (("picture", first.float() / 255), ("drawing", drawn), ("mean face", mean)):
                scores = judge.model.score(features(judge, shown), told)
                figures[f"{name}{what} TAR"] = float((scores >= limit).float().mean())
                figures[f"{name}{what} score"] = float(scores.mean())
    return figures


def table(figures: dict[str, float]) -> str:
    """As Markdown."""
    rows = [("L1 (RGB in 0..1)", "l1", "{:.4f}"), ("PSNR, dB", "psnr", "{:.2f}")]
    rows += [("cosine of the features", "identity", "{:.3f}"), ("the model's score", "score", "{:.3f}")]
    rows += [("verified with the picture itself, %", "verified", "%")]
    lines = [
        f"| {figures['pictures']:.0f} pictures of held-out people, threshold {figures['threshold']:.3f} "
        "| picture | drawing | mean face |",
        "|---|---|---|---|",
    ]

    def shown(key: str, form: str) -> str:
        value = figures.get(key)
        return "" if value is None else f"{100 * value:.1f}" if form == "%" else form.format(value)

    for title, key, form in rows:
        lines.append(f"| {title} | | {shown(key, form)} | {shown(f'mean face {key}', form)} |")
    for name, whom in (("", "the model"), ("judge ", "another recogniser")):
        if f"{name}drawing TAR" in figures:
            for title, key, form in (("verified", "TAR", "%"), ("mean score", "score", "{:.3f}")):
                values = (shown(f"{name}{what} {key}", form) for what in ("picture", "drawing", "mean face"))
                unit = ", %" if form == "%" else ""
                lines.append(f"| {title} with another photograph by {whom}{unit} | {' | '.join(values)} |")
    return "\n".join(lines)


def prepared(options: argparse.Namespace) -> Experiment:
    experiment = load_experiment(options.experiment, options.set)
    if not isinstance(experiment, Experiment):
        raise XCosError(f"{options.experiment}: expected an experiment with task = 'recipes.decode'")
    given = {"model": options.model, "start": options.start, "features": options.features}
    changed = {name: value for name, value in given.items() if value is not None}
    name = experiment.name if options.model is None else f"decoder-{Path(options.model).stem}"
    return dataclasses.replace(
        experiment, decoder=dataclasses.replace(experiment.decoder, **changed), name=options.name or name
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="TOML file with task = 'recipes.decode'")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="change a setting")
    parser.add_argument("--model", help="weights whose features are decoded (default: the shipped model)")
    parser.add_argument("--features", choices=("grid", "embedding"))
    parser.add_argument("--from", dest="start", metavar="FILE", help="decoder to start from (default: random weights)")
    parser.add_argument("--name", help="of the decoder (default: after the model's file)")
    parser.add_argument("--out", type=Path, help="folder of the training")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure this decoder instead of training one")
    parser.add_argument("--pictures", type=int, default=1000, help="held-out pictures to measure on (default: 1000)")
    parser.add_argument("--judge", help="weights of a recogniser that had no part in the training")
    parser.add_argument("--fmr", type=float, default=5e-3, help="of thresholds that are not known (default: 0.005)")
    parser.add_argument("--ship", type=Path, help="copy the decoder here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if (options.out is None) == (options.measure is None):
        parser.error("expected either --out, to train, or --measure")
    try:
        experiment = prepared(options)
        task = cast(DecodeTask, create_task(experiment))
        for line in task.report():
            say(line)
        file, result = options.measure, None
        if file is None:
            began = time.process_time()
            result = train(task, experiment.train, options.out, resume=True)
            say(f"{result.steps} steps, {result.seconds:.0f} s, {time.process_time() - began:.0f} s of processor time")
            file = result.files[0]
        decoder = load_decoder(file)
        if decoder.fingerprint != fingerprint_of(task.judge.model):
            raise XCosError(f"{file}: expected a decoder of {task.judge.model.name}, got one of another model")
        figures: dict[str, Any] = {}
        if len(task.held_out):
            figures = measured(decoder, task, options.pictures, options.judge, options.fmr)
            print(table(figures))
        if options.ship is not None:
            write_atomically(options.ship, lambda out: shutil.copyfileobj(file.open("rb"), out))
        if options.json is not None:
            write_json(options.json, figures | {"bytes": file.stat().st_size})
    except (XCosError, OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
