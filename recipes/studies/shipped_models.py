"""Verification with the shipped model on people whom it was not trained on, and what locality could give it.

    python recipes/studies/shipped_models.py --pictures lfw112.zip --pairs pairs.txt --folds 7 8 \\
        --json benchmarks/results/faithfulness/verification.json

Thresholds are each fold's from the other folds; 95 % intervals from a bootstrap over people. What the file says of
models that are not shipped any more stays in it, as long as the folds are the same; ``machine`` is the last run's.

``composed`` is the region swap's absolute AUC of a model with these similarities and perfectly local cells: S of the
impostor's whole picture in the region, of the pair elsewhere. What is missing to 1 is not owed to locality.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import numpy as np
import torch
from harness import machine, write_json

from xcos_ext.evaluation import evaluate
from xcos_ext.evaluation.datasets import LFW
from xcos_ext.evaluation.faithfulness import REGIONS, areas, region_mask
from xcos_ext.io.models import REGISTRY
from xcos_ext.model import XCosModel, load_model


@torch.no_grad()
def composed(model: XCosModel, lfw: LFW, pairs: int = 200, seed: int = 0) -> dict[str, float]:
    """Region -> mean AUC over the cells, and their mean."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(np.flatnonzero(lfw.genuine), pairs, replace=False)
    people = [key.split("/")[0] for key in lfw.keys]
    donors = []
    for index in lfw.first[chosen]:
        others = [i for i, person in enumerate(people) if person != people[index]]
        donors.append(others[int(rng.integers(len(others)))])
    a, b, donor = (
        model.features_of([lfw.pictures.read(lfw.keys[i]) for i in indices])
        for indices in (lfw.first[chosen], lfw.second[chosen], donors)
    )
    own, other = (model.score(x, b, return_maps=True).similarity for x in (a, donor))
    found = {}
    for region in REGIONS:
        mask = region_mask(region)
        found[region] = float(areas(-torch.where(mask, other, own).flatten(1).numpy(), mask.flatten().numpy()).mean())
    return found | {"mean": float(np.mean(list(found.values())))}


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
    models: dict[str, Any] = {}
    if options.json.is_file():
        recorded = json.loads(options.json.read_text(encoding="utf-8"))
        if recorded["folds"] == options.folds:
            models = recorded["models"]
    for name in (e.name for e in REGISTRY.values() if e.kind == "model"):
        model = load_model(name)
        variant = evaluate(model, lfw).variants["own"]
        models[name] = variant.as_dict() | {
            "parameters": sum(p.numel() for p in model.parameters()),
            "composed": composed(model, lfw),
        }
    data = {"folds": options.folds, "pairs": len(lfw), "models": models, "machine": machine()}
    write_json(options.json, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
