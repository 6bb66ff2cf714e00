"""Time per pair of pictures, network included: xCos models beside the plain cosine of a recogniser.

    python recipes/studies/pair_time.py --recogniser net.pt "closed form=net.pt" "trained head=runs/head.safetensors" \\
        --threads 1 --json benchmarks/results/models/pair_time.json

Every model is ``LABEL=FILE``; ``LABEL=`` alone is the shipped model. Contenders take turns within one run; what is
reported is the median and the quartiles of the time per pair, of its ratio to the plain cosine's, and of the time of
the score alone, from maps that are there (the recogniser's output block and a cosine; the model's head).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import numpy as np
import torch
from harness import in_turns, machine, write_json
from torch import Tensor
from torch.nn.functional import cosine_similarity

from xcos_ext.backbones import Recogniser
from xcos_ext.model import XCosModel, load_model, load_recogniser

Step = Callable[[], Any]


def plain(recogniser: Recogniser, images: tuple[Tensor, Tensor]) -> tuple[Step, Step]:
    """The plain cosine: whole, and from maps."""
    grids = tuple(recogniser.grid(side) for side in images)

    def from_maps() -> Tensor:
        return cosine_similarity(recogniser.embed(grids[0]), recogniser.embed(grids[1]))

    def whole() -> Tensor:
        return cosine_similarity(recogniser(images[0]), recogniser(images[1]))

    return whole, from_maps


def xcos(model: XCosModel, images: tuple[Tensor, Tensor]) -> tuple[Step, Step]:
    """Score, S and W: whole, and from maps."""
    backbone = model.backbone
    assert isinstance(backbone, Recogniser)
    grids = tuple(backbone.grid(side) for side in images)

    def from_maps() -> Any:
        return model.score(*(model.head.features(grid) for grid in grids), return_maps=True)

    return lambda: model(*images), from_maps


def measure(recogniser: Recogniser, models: dict[str, XCosModel], pairs: int, seconds: float) -> dict[str, Any]:
    """Figures of every contender; seconds per pair."""
    torch.manual_seed(0)

    def sides(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return torch.randn(pairs, 3, *size), torch.randn(pairs, 3, *size)

    steps = {"cosine": plain(recogniser, sides(recogniser.preprocessing.size))}
    steps |= {label: xcos(model, sides(model.preprocessing.size)) for label, model in models.items()}
    calls = {(label, place): step for label, both in steps.items() for place, step in enumerate(both)}
    taken = {name: np.array(samples) / pairs for name, samples in in_turns(calls, seconds).items()}

    def quartiles(values: Any) -> list[float]:
        return [float(x) for x in np.percentile(values, (25, 50, 75))]

    return {
        label: {
            "seconds": quartiles(taken[label, 0]),
            "times_cosine": quartiles(taken[label, 0] / taken["cosine", 0]),
            "seconds_from_maps": quartiles(taken[label, 1]),
        }
        for label in steps
    }


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="LABEL=FILE")
    parser.add_argument("--recogniser", required=True, help="whose plain cosine is the peer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=16, help="pairs at a time")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing")
    parser.add_argument("--json", type=Path, help="add the figures to this file, under the recogniser's name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {}
    for given in options.models:
        label, equals, file = given.partition("=")
        if not equals:
            parser.error(f"models: expected LABEL=FILE, got {given!r}")
        models[label] = load_model(file or None)
    with torch.inference_mode():
        found = measure(load_recogniser(options.recogniser), models, options.pairs, options.seconds)
    print("| score | ms a pair | times the plain cosine | µs from maps |\n|---|---|---|---|")
    for label, row in found.items():
        (a, b, c), (d, e, f), (g, h, i) = row["seconds"], row["times_cosine"], row["seconds_from_maps"]
        print(
            f"| {label} | {1e3 * b:.2f} ({1e3 * a:.2f} – {1e3 * c:.2f}) | {e:.2f} ({d:.2f} – {f:.2f}) | "
            f"{1e6 * h:.0f} ({1e6 * g:.0f} – {1e6 * i:.0f}) |"
        )
    if options.json is not None:
        known = json.loads(options.json.read_text()) if options.json.is_file() else {}
        known[Path(options.recogniser).stem] = {
            "machine": machine(),
            "pairs_at_a_time": options.pairs,
            "scores": found,
        }
        write_json(options.json, known)
    return 0


if __name__ == "__main__":
    sys.exit(main())
