"""Every plug-in on the same lists: plain cosine, closed form and trained head, with and without matching, LFW and CFP.

    python -m recipes.studies.plugged sface_2021dec_int8bq.onnx --heads head.safetensors --faces celeb112.zip \\
        --lfw lfw112.zip --pairs pairs.txt --cfp cfp_dev.zip --detector yunet.onnx \\
        --json benchmarks/results/models/plugged_sface.json

Means and thresholds come from one picture each of the people of ``--faces``, none of whom may be in LFW or CFP.
Pictures go through the network once, and all scores of a list are of the same maps. CFP's pictures are tight crops, so
they are padded by a quarter of the longer side before the face is looked for; a picture without a face counts as
rejected. Accuracies take each fold's threshold from the other folds; intervals are over people.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.common import Padded, cfp_lists, say, write_json
from xcos_ext.backbones import OnnxRecogniser, Recogniser
from xcos_ext.evaluation import Resampling, bootstrap, calibrate, score_pairs, verification
from xcos_ext.evaluation.datasets import LFW, PairList
from xcos_ext.evaluation.scoring import crops
from xcos_ext.faces import PersonFolder, create_detector
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosModel, load_model, load_recogniser, plug

__all__ = ["MATCHINGS", "measured", "plugged"]

#: How cells find their partners: name -> arguments of ``head.set_matching``; without a name: in their places.
MATCHINGS: dict[str, dict[str, Any]] = {
    "": {"radius": 0},
    "best of radius 1": {"radius": 1, "match": "best"},
    "soft, radius 1": {"radius": 1, "match": "soft", "temperature": 0.1},
}

Score = Callable[[Tensor, Tensor], Tensor]


def plugged(recogniser: Recogniser, faces: Path) -> XCosModel:
    """As ``xcos plug`` makes it: one picture of each person."""
    folder = PersonFolder(faces)
    pictures = [folder.read(folder.of(person)[0]) for person in folder.people]
    model = plug(recogniser, pictures)
    features = model.features_of(pictures, 32)
    model.set_calibration(calibrate(model, features, list(folder.people), decision_fmr=5e-3, fmrs=(1e-1, 1e-2, 1e-3)))
    return model


def _matched(model: XCosModel, matching: dict[str, Any]) -> Score:
    head = copy.copy(model.head)  # the same weights, a matching of its own
    head.set_matching(**matching)
    return head.score


@torch.no_grad()
def measured(
    network: Recogniser,
    models: Mapping[str, XCosModel],
    pairs: PairList,
    detector: Padded | None = None,
    replicates: int = 1000,
) -> dict[str, Any]:
    """Figures of a list by the plain cosine and by every model with every matching.

    Args:
        network: whose maps all models take.
        models: name -> model.
        pairs: the list.
        detector: finds the faces; None: aligned crops.
        replicates: of the bootstrap.
    """

    def extract(pictures: Any) -> dict[str, Tensor]:
        grid = network.grid(network.preprocessing(pictures)).float()
        features = {name: model.head.features(grid) for name, model in models.items()}
        return {"plain cosine": F.normalize(network.embed(grid).float()), **features}

    scorers: dict[str, tuple[str, Score]] = {"plain cosine": ("plain cosine", lambda a, b: (a * b).sum(1))}
    for name, model in models.items():
        for how, matching in MATCHINGS.items():
            scorers[f"{name}, {how}" if how else name] = name, _matched(model, matching)
    found = score_pairs(pairs, extract, scorers, read=crops(pairs, detector, network.preprocessing.size, {}))
    people = np.unique(pairs.people, return_inverse=True)[1] if pairs.people else None
    resampling = Resampling(len(pairs), None if people is None else (people[pairs.first], people[pairs.second]))
    rows = {}
    for name, values in found.values.items():
        scores = np.where(found.failed, -2.0, values)  # below every score: rejected at any threshold
        rows[name] = verification(scores, pairs.genuine, pairs.folds).as_dict() | {
            "intervals": bootstrap(scores, pairs.genuine, resampling, pairs.folds, replicates=replicates)
        }
        threshold = models[name].threshold if name in models else None
        if threshold is not None:
            accepted = scores >= threshold
            rows[name]["at_the_threshold"] = {
                "threshold": threshold,
                "fmr": float(accepted[~pairs.genuine].mean()),
                "fnmr": float((~accepted[pairs.genuine]).mean()),
            }
    return {
        "pairs": len(pairs),
        "folds": int(np.unique(pairs.folds).size),
        "failed_pictures": len(found.failures),
        "variants": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="weights or an ONNX file")
    parser.add_argument("--heads", nargs="*", default=[], help="models of this network with a trained head")
    for name in ("faces", "lfw", "pairs", "cfp", "detector", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--lfw-folds", type=int, nargs="*", help="numbered from 1 (default: all)")
    parser.add_argument("--cfp-folds", type=int, nargs="*", help="numbered from 1 (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        given: str = options.network
        network = OnnxRecogniser(given, threads=options.threads) if given.endswith(".onnx") else load_recogniser(given)
        models = {"closed form": plugged(network.requires_grad_(False), options.faces)}
        models |= {Path(file).stem: load_model(file).requires_grad_(False) for file in options.heads}
        folds = None if options.lfw_folds is None else [fold - 1 for fold in options.lfw_folds]
        lists: dict[str, PairList] = {"LFW": LFW(options.lfw, options.pairs, folds=folds)}
        lists |= {f"CFP-{kind}": pairs for kind, pairs in cfp_lists(options.cfp, options.cfp_folds).items()}
        detector = Padded(create_detector(options.detector))
        result: dict[str, Any] = {"network": Path(given).name, "lists": {}}
        for name, pairs in lists.items():
            say(f"{name}: {len(pairs):,} pairs")
            result["lists"][name] = measured(network, models, pairs, None if name == "LFW" else detector)
            write_json(options.json, result)
    except (XCosError, OSError, ValueError) as error:
        say(f"plugged: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
