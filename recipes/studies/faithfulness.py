"""Explainers of a model and of a recogniser's plain cosine, all protocols, on people not trained on.

    python recipes/studies/faithfulness.py --pictures lfw112.zip --pairs pairs.txt --folds 7 8 --model slim \\
        --json benchmarks/results/faithfulness/slim.json

Explainers that need hundreds of passes get fewer pairs in region swaps, which ask each for some 38 maps a pair: first
all that are fast on many pairs, then the slow ones, each time beside xCos's own map on the very same pairs.
``--recogniser FILE`` explains a recogniser's cosine instead of a model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from harness import machine, write_json

from xcos_ext.deploy import for_inference
from xcos_ext.evaluation.datasets import open_pairs
from xcos_ext.evaluation.faithfulness import Faces, Settings, faithfulness
from xcos_ext.explain.explainers import EmbeddingCosine, PairModel, XCosPairs
from xcos_ext.model import load_model, load_recogniser

OWN = ("xcos-similarity", "xcos", "xcos-attention")  # the first is what the others are held against
FAST = ("gradcam", "xssab")
MIDDLE = ("occlusion", "fggb")
SLOW = ("corrrise",)
DECODED = ("reconstruction",)  # its decoder belongs to the model as it is
PAIRED = ["deletion", "identification", "patch"]


class Part(NamedTuple):
    """Attributes: protocols, pairs of each kind, explainers, whether the model has batch norms folded, for speed."""

    protocols: list[str]
    pairs: int
    explainers: tuple[str, ...]
    folded: bool = True


def parts(own: tuple[str, ...], without: Collection[str], count: int) -> list[Part]:
    """What is run, one after the other."""
    fast, middle, slow, decoded = (
        tuple(name for name in names if name not in without) for names in (FAST, MIDDLE, SLOW, DECODED)
    )
    judged = own[:1]  # the similarity S stands beside the slow ones
    made = [Part(["region-swap", "locality"] if own else ["region-swap"], count, (*own, *fast))]
    made += [Part(["region-swap"], max(2, count // 10), (*judged, *middle))] if middle else []
    made += [Part(["region-swap"], max(2, count // 20), (*judged, *slow))] if slow else []
    made.append(Part(PAIRED, max(2, count // 3), (*own, *fast, *middle, *slow)))
    if decoded:
        made.append(Part(["region-swap", *PAIRED], max(2, count // 10), (*judged, *decoded), folded=False))
    return made


def rounded(value: Any) -> Any:
    """Numbers with six digits: the file is read by people too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", required=True, help="aligned crops: folder or zip archive")
    parser.add_argument("--pairs", required=True, help="LFW's pairs file")
    parser.add_argument("--folds", type=int, nargs="+", required=True, help="numbered from 1")
    parser.add_argument("--model", default="slim", help="the shipped model's name, or a file")
    parser.add_argument("--recogniser", help="explain this recogniser's plain cosine instead")
    parser.add_argument("--count", type=int, default=100, help="pairs of each kind for fast explainers")
    parser.add_argument("--without", nargs="*", default=[], help="explainers to leave out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.recogniser:
        model: PairModel = EmbeddingCosine(load_recogniser(options.recogniser).requires_grad_(False))
        folded, own = model, tuple[str, ...]()
    else:
        loaded = load_model(options.model).requires_grad_(False)
        model, folded, own = XCosPairs(loaded), XCosPairs(for_inference(loaded).requires_grad_(False)), OWN
    faces = Faces(open_pairs(options.pairs, options.pictures), folds=[fold - 1 for fold in options.folds])
    results = []
    started = time.perf_counter()
    for part in parts(own, options.without, options.count):
        settings = Settings(count=part.pairs)
        chosen = folded if part.folded else model
        found = faithfulness(chosen, faces, part.explainers, protocols=part.protocols, settings=settings)
        results.append({"count": part.pairs} | found.as_dict())
        done = f"{', '.join(part.protocols)}; {', '.join(part.explainers)}; {part.pairs} pairs"
        print(f"{done}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    data = {
        "schema": 1,
        "model": model.name,
        "fingerprint": model.model.fingerprint() if isinstance(model, XCosPairs) else None,
        "folds": options.folds,
        "parts": rounded(results),
        "machine": machine(),
    }
    write_json(options.json, data, indent=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
