"""Verification with the shipped models on people whom none of them was trained on.

    python benchmarks/shipped_models.py --pictures lfw112.zip --pairs pairs.txt --folds 7 8 \\
        --json benchmarks/results/faithfulness/verification.json

Thresholds are each fold's from the other folds; 95 % intervals from a bootstrap over people.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import machine

from xcos_ext.datasets import LFW
from xcos_ext.evaluation import evaluate
from xcos_ext.explain.files import write_atomically
from xcos_ext.nn import load_model
from xcos_ext.shipped import SHIPPED


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", required=True, help="aligned crops: folder or zip archive")
    parser.add_argument("--pairs", required=True, help="LFW's pairs file")
    parser.add_argument("--folds", type=int, nargs="+", required=True, help="numbered from 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    lfw = LFW(options.pictures, options.pairs, folds=[fold - 1 for fold in options.folds])
    models = {}
    for name in SHIPPED:
        model = load_model(name)
        variant = evaluate(model, lfw).variants["own"]
        models[name] = variant.as_dict() | {"parameters": sum(p.numel() for p in model.parameters())}
    data = {"folds": options.folds, "pairs": len(lfw), "models": models, "machine": machine()}
    write_atomically(options.json, lambda file: file.write(f"{json.dumps(data, indent=1)}\n".encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
