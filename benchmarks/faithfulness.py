"""Explainers of the shipped models and of a recogniser's plain cosine, all protocols, on people not trained on.

    python benchmarks/faithfulness.py --pictures lfw112.zip --pairs pairs.txt --folds 7 8 --model compact \\
        --json benchmarks/results/faithfulness/compact.json

Explainers that need hundreds of passes get fewer pairs in region swaps, which ask each for some 38 maps a pair: first
all that are fast on many pairs, then the slow ones, each time beside xCos's own map on the very same pairs.
``--recogniser FILE`` explains a recogniser's cosine instead of a model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import machine

from xcos_ext.datasets import open_pairs
from xcos_ext.evaluation.faithfulness import Faces, Settings, faithfulness
from xcos_ext.explain.explainers import EmbeddingCosine, XCosPairs, as_pair_model
from xcos_ext.explain.files import write_atomically
from xcos_ext.nn import load_model, load_recogniser

OWN = ("xcos", "xcos-similarity", "xcos-attention")
FAST = ("gradcam", "xssab")
MIDDLE = ("occlusion", "fggb", "reconstruction")
SLOW = ("corrrise",)


def parts(
    own: tuple[str, ...], middle: tuple[str, ...], slow: tuple[str, ...], count: int
) -> list[tuple[list[str], int, tuple[str, ...]]]:
    """(protocols, pairs of each kind, explainers) of every run."""
    judged = own[1:2]  # the similarity S stands beside the slow ones
    made = [(["region-swap", "locality"] if own else ["region-swap"], count, (*own, *FAST))]
    if middle:
        made.append((["region-swap"], max(2, count // 5), (*judged, *middle)))
    if slow:
        made.append((["region-swap"], max(2, count // 12), (*judged, *slow)))
    return [*made, (["deletion", "identification", "patch"], max(2, count // 2), (*own, *FAST, *middle, *slow))]


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
    parser.add_argument("--model", default="compact", help="a shipped model or a file")
    parser.add_argument("--recogniser", help="explain this recogniser's plain cosine instead")
    parser.add_argument("--count", type=int, default=100, help="pairs of each kind for fast explainers")
    parser.add_argument("--without", nargs="*", default=[], help="explainers to leave out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.recogniser:
        model = EmbeddingCosine(load_recogniser(options.recogniser).requires_grad_(False))
        own: tuple[str, ...] = ()
    else:
        model = as_pair_model(load_model(options.model).requires_grad_(False))
        own = OWN
    middle, slow = (tuple(name for name in names if name not in options.without) for names in (MIDDLE, SLOW))
    faces = Faces(open_pairs(options.pairs, options.pictures), folds=[fold - 1 for fold in options.folds])
    results = []
    started = time.perf_counter()
    for protocols, count, explainers in parts(own, middle, slow, options.count):
        settings = Settings(count=count)
        found = faithfulness(model, faces, explainers, protocols=protocols, settings=settings)
        results.append({"count": count} | found.as_dict())
        print(f"{', '.join(protocols)}, {count} pairs: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    data = {
        "schema": 1,
        "model": model.name,
        "fingerprint": model.model.fingerprint() if isinstance(model, XCosPairs) else None,
        "folds": options.folds,
        "parts": rounded(results),
        "machine": machine(),
    }
    write_atomically(options.json, lambda file: file.write(f"{json.dumps(data, separators=(',', ':'))}\n".encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
