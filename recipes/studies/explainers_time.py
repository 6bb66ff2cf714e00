"""Time per pair of every explainer, networks included, beside the score alone.

    python recipes/studies/explainers_time.py --recogniser net.pt --lfw lfw112.zip --pairs pairs.txt --count 10 \\
        --threads 1 --json benchmarks/results/explainers/time.json

Explained are the xCos score of a model (the shipped one, or ``--model``) and, with ``--recogniser``, the plain cosine
of a network. Explainers take turns, pair by pair, after one call each that is not timed. Reported are the median and
the quartiles over the pairs, of seconds, of the processor's seconds (which other programs on the machine hardly change)
and of the ratio of these to the score's alone (both pictures through the network). Without ``--lfw`` the pictures are
noise, on which networks take as long.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from harness import duration, machine, spread, write_json
from torch import Tensor

from xcos_ext.evaluation.datasets import LFW
from xcos_ext.explain.explainers import EmbeddingCosine, Explainer, PairModel, XCosPairs, available, create
from xcos_ext.io.errors import XCosError
from xcos_ext.model import load_model, load_recogniser

#: The threshold where a model has none: time does not depend on it.
_THRESHOLD = 0.3

Call = Callable[[Tensor, Tensor], Any]


def pictures(model: PairModel, count: int, lfw: tuple[str, str] | None) -> tuple[Tensor, Tensor]:
    """Normalised pairs [count, 3, H, W]: noise, or the first of LFW, genuine and impostor in turn."""
    if lfw is None:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(count, 3, *model.preprocessing.size, generator=generator) for _ in range(2))
        return a, b
    data = LFW(*lfw)
    kinds = [[pair for pair, same in zip(data.pairs, data.genuine, strict=True) if same == kind] for kind in (1, 0)]
    chosen = [pair for both in zip(*kinds, strict=False) for pair in both][:count]
    sides = (
        [data.pictures.numbered(pair.person_a, pair.number_a) for pair in chosen],
        [data.pictures.numbered(pair.person_b, pair.number_b) for pair in chosen],
    )
    a, b = (model.preprocessing([data.read(key) for key in side if key is not None]) for side in sides)
    return a, b


def contenders(model: PairModel, names: Sequence[str], a: Tensor, b: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls to time, the score alone first; and why an explainer is not among them. Each was called once."""

    @torch.no_grad()
    def score(a: Tensor, b: Tensor) -> Tensor:
        return model.score(model.features(a), model.features(b))

    def call(explainer: Explainer) -> Call:
        return lambda a, b: explainer(model, a, b)

    calls: dict[str, Call] = {"score": score}
    left_out: dict[str, str] = {}
    score(a, b)
    for name in names:
        label, _, rest = name.partition(":")
        options = dict(part.split("=", 1) for part in rest.split(",") if part)
        try:
            made = call(create(label, **options))
            made(a, b)
        except (XCosError, ValueError) as error:
            left_out[name] = str(error)
        else:
            calls[name] = made
    return calls, left_out


def measure(calls: dict[str, Call], a: Tensor, b: Tensor, at_once: int) -> dict[str, Any]:
    """Seconds per pair of every call, by the clock and of the processor, and how many times the score's that is."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    busy: dict[str, list[float]] = {name: [] for name in calls}
    for part_a, part_b in zip(a.split(at_once), b.split(at_once), strict=True):
        for name, call in calls.items():
            started, working = time.perf_counter(), time.process_time()
            call(part_a, part_b)
            busy[name].append((time.process_time() - working) / len(part_a))
            seconds[name].append((time.perf_counter() - started) / len(part_a))
    return {
        name: {
            "seconds": spread(seconds[name]),
            "processor_seconds": spread(busy[name]),
            "times_score": spread([x / y for x, y in zip(busy[name], busy["score"], strict=True)]),
        }
        for name in calls
    }


def table(label: str, rows: dict[str, Any], left_out: dict[str, str]) -> str:
    """Markdown."""
    lines = [
        f"\n{label}\n",
        "| explainer | a pair | of the processor | quartiles | times the score |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        own, ratio = row["processor_seconds"], row["times_score"]
        lines.append(
            f"| {name} | {duration(row['seconds']['median'])} | {duration(own['median'])} | "
            f"{duration(own['low'])} – {duration(own['high'])} | "
            f"{ratio['median']:.1f} ({ratio['low']:.1f} – {ratio['high']:.1f}) |"
        )
    return "\n".join([*lines, *(f"\n{name}: left out: {why}" for name, why in left_out.items())])


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an xCos model instead of the shipped one")
    parser.add_argument("--recogniser", help="weights of a network whose plain cosine is explained, too")
    parser.add_argument("--lfw", metavar="DIR|ZIP", help="pictures of LFW, aligned")
    parser.add_argument("--pairs", metavar="FILE", help="LFW's pairs file")
    parser.add_argument("--count", type=int, default=10, help="pairs")
    parser.add_argument("--at-once", type=int, default=1, help="pairs per call")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--explainer",
        action="append",
        metavar="NAME[:OPTION=VALUE,...]",
        help="only these, with textual options, e.g. fggb:units=channels; by default all",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if (options.lfw is None) != (options.pairs is None):
        parser.error("--lfw and --pairs: expected both or none")
    if min(options.count, options.at_once, options.threads) < 1:
        parser.error("--count, --at-once, --threads: expected at least 1")
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    if model.threshold is None:
        model.threshold = _THRESHOLD
    models: list[PairModel] = [XCosPairs(model)]
    if options.recogniser is not None:
        models.append(EmbeddingCosine(load_recogniser(options.recogniser).eval(), threshold=_THRESHOLD))
    lfw = None if options.lfw is None else (options.lfw, options.pairs)
    results: dict[str, Any] = {}
    for pairs in models:
        a, b = pictures(pairs, options.count, lfw)
        first = slice(0, options.at_once)
        calls, left_out = contenders(pairs, options.explainer or available(), a[first], b[first])
        rows = measure(calls, a, b, options.at_once)
        results[pairs.name] = {"explainers": rows, "left_out": left_out}
        print(table(pairs.name, rows, left_out), flush=True)
    if options.json is not None:
        found = {
            "machine": machine(),
            "pictures": "noise" if lfw is None else "LFW",
            "pairs": options.count,
            "pairs_at_once": options.at_once,
            "models": results,
        }
        write_json(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
