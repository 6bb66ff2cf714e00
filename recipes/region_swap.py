"""Where does a model see a change whose place is known? ``python -m recipes.region_swap --help``.

Into picture A of a genuine pair, one region of an impostor's picture is pasted (whole cells of the aligned
7x7 grid). Each cell map of the pair is asked where that happened: AUC over the 49 cells, averaged over pairs.
Deletion and insertion curves cannot tell a pair-specific map from a constant one; here the constant controls
are printed beside the maps, and the differences to the unchanged pair remove what was there before.

This compares closed-form models of different spread, as in docs/models.md, and judges maps that an explainer does not
give. ``xcos evaluate faithfulness`` is the protocol in full.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from xcos_ext.evaluation.datasets import LFW
from xcos_ext.evaluation.faithfulness import areas, paste, region_mask
from xcos_ext.explain.explainers import CentreMap
from xcos_ext.explain.explainers.interface import XCosPairs
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.model import XCosModel, find_statistics, load_recogniser, plug

__all__ = ["MAPS", "REGIONS", "region_swap"]

#: Of the regions of :data:`xcos_ext.evaluation.faithfulness.REGIONS`, those that are swapped here, in medium size.
REGIONS = ("left eye", "right eye", "nose", "mouth", "forehead", "left cheek", "chin")

#: Maps that are judged: name -> meaning.
MAPS: Mapping[str, str] = {
    "-S": "1 - S of the changed pair",
    "W(1-S)": "weighted dissimilarity of the changed pair",
    "drop of S": "S before minus S after",
    "drop of W*S": "contribution before minus contribution after",
    "centre": "control: a constant Gaussian at the centre",
}


@torch.no_grad()
def region_swap(
    models: Mapping[str, XCosModel], lfw: LFW, *, pairs: int = 120, seed: int = 0, batch_size: int = 32
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean AUC over the cells for every model, map and region.

    Args:
        models: name -> model with a 7x7 grid; they may share a backbone.
        lfw: genuine pairs are drawn from it, impostors from its other pictures; 112x112 crops.
        pairs: genuine pairs per region.
        seed: of the draw, which is the same for all models.
        batch_size: pictures per forward pass.

    Returns:
        model -> map (:data:`MAPS`) -> region (:data:`REGIONS`) -> mean AUC; 0.5 is chance.

    Raises:
        ValueError: fewer genuine pairs than asked for.
    """
    genuine = np.flatnonzero(lfw.genuine)
    if not 1 <= pairs <= genuine.size:
        raise ValueError(f"pairs: expected 1..{genuine.size}, got {pairs}")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(genuine, pairs, replace=False)
    first = [lfw.pictures.read(lfw.keys[i]) for i in lfw.first[chosen]]
    second = [lfw.pictures.read(lfw.keys[i]) for i in lfw.second[chosen]]
    people = [key.split("/")[0] for key in lfw.keys]
    result: dict[str, dict[str, dict[str, float]]] = {m: {name: {} for name in MAPS} for m in models}

    clean = {
        name: (model.features_of(first, batch_size), model.features_of(second, batch_size))
        for name, model in models.items()
    }
    blank = torch.zeros(pairs, 3, 7, 7)
    centre = CentreMap()(XCosPairs(next(iter(models.values()))), blank, blank).similar
    for region in REGIONS:
        donors = []
        for index in lfw.first[chosen]:
            other = int(rng.integers(len(people)))
            while people[other] == people[index]:
                other = int(rng.integers(len(people)))
            donors.append(lfw.pictures.read(lfw.keys[other]))
        mask = region_mask(region)
        images, others = (torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2) for side in (first, donors))
        changed = list(paste(images, others, mask).images.permute(0, 2, 3, 1).numpy())
        truth = mask.flatten().numpy()
        for name, model in models.items():
            a, b = clean[name]
            before = model.score(a, b, return_maps=True)
            after = model.score(model.features_of(changed, batch_size), b, return_maps=True)
            maps = {
                "-S": 1 - after.similarity,
                "W(1-S)": after.attention * (1 - after.similarity),
                "drop of S": before.similarity - after.similarity,
                "drop of W*S": before.attention * before.similarity - after.attention * after.similarity,
                "centre": centre,
            }
            for kind, values in maps.items():
                result[name][kind][region] = float(areas(values.flatten(1).cpu().numpy(), truth).mean())
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: closed-form models of one recogniser with different spreads. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.region_swap", description=__doc__.split("\n\n")[1])
    parser.add_argument("--pictures", required=True, help="aligned 112x112 crops: folder or zip archive")
    parser.add_argument("--pairs", required=True, help="pairs file in LFW's format")
    parser.add_argument("--weights", required=True, help="recogniser's state dict, with known statistics")
    parser.add_argument("--statistics", help="statistics file, if none is shipped for the weights")
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.0, 0.5, 0.7, 1.0, 2.0])
    parser.add_argument("--count", type=int, default=120, help="genuine pairs per region")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recogniser = load_recogniser(options.weights)
    statistics = options.statistics or find_statistics(fingerprint_weights(recogniser))
    models = {f"{spread:g}": plug(recogniser, statistics=statistics, spread=spread) for spread in options.spreads}
    lfw = LFW(options.pictures, options.pairs)
    result = region_swap(models, lfw, pairs=options.count)
    print(f"| spread | map | {' | '.join(REGIONS)} | mean |")
    print("|---" * (len(REGIONS) + 3) + "|")
    for name, maps in result.items():
        for kind, regions in maps.items():
            if kind == "centre" and name != next(iter(result)):
                continue
            values = [regions[region] for region in REGIONS]
            cells = " | ".join(f"{value:.2f}" for value in (*values, float(np.mean(values))))
            print(f"| {'' if kind == 'centre' else name} | {kind} | {cells} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
