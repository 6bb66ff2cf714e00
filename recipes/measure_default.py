"""What a model is worth on people whom nobody here trained on: LFW and CFP, as they are and altered, and its maps.

    python -m recipes.measure_default model.safetensors --lfw lfw112.zip --pairs pairs.txt --cfp cfp_dev.zip \\
        --detector yunet.onnx --json benchmarks/results/models/slim.json

LFW's folds 7 and 8 and CFP's folds 3 and 4, whose people ``recipes.gather`` keeps out of training. Each fold's
threshold comes from the other fold; intervals are over people. Several models may be named: all are measured in the
same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.altered import LENSES, MASK
from recipes.common import Padded, cfp_lists, say, write_json
from recipes.gather import CFP_TESTED, LFW_TESTED
from xcos_ext.evaluation import Evaluation, all_pair_scores, calibrate, evaluate
from xcos_ext.evaluation.datasets import LFW, PairList
from xcos_ext.evaluation.faithfulness import Faces, Settings, Study, region_swap
from xcos_ext.explain.explainers import XCosPairs, create
from xcos_ext.faces import create_detector, extract_face
from xcos_ext.io.errors import PictureError, XCosError
from xcos_ext.model import XCosModel, load_model
from xcos_ext.training.augment import AugmentConfig, augmented
from xcos_ext.training.task import derived_seed

__all__ = ["ALTERATIONS", "Altered", "measure", "tested"]

_FMR = 5e-3  # that the decision threshold claims
_ATTENTIONS = ("own", "norm")
_STILL = AugmentConfig(
    flip=0, rotate=0, scale=0, stretch=0, shift=0, brightness=0, contrast=0, saturation=0, gamma=0, tint=0, grey=0,
    blur=0, noise=0, patch=0,
)  # fmt: skip

Crop = NDArray[np.uint8]
Alter = Callable[[Crop, int], Crop]


def _moved(**limits: float) -> Alter:
    config = replace(_STILL, **limits)  # type: ignore[arg-type]

    def alter(crop: Crop, seed: int) -> Crop:
        image = torch.from_numpy(crop).permute(2, 0, 1)[None].contiguous()
        made: Crop = augmented(image, config, torch.Generator().manual_seed(seed))[0].permute(1, 2, 0).numpy()
        return made

    return alter


def _drawn(*shapes: Sequence[tuple[int, int]], colour: tuple[int, int, int]) -> Alter:
    def alter(crop: Crop, seed: int) -> Crop:
        made = crop.copy()
        for shape in shapes:
            cv2.fillPoly(made, [np.array(shape, np.int32)], colour, cv2.LINE_AA)
        return made

    return alter


def _small(crop: Crop, seed: int) -> Crop:
    return cv2.resize(cv2.resize(crop, (40, 40), interpolation=cv2.INTER_AREA), crop.shape[1::-1])  # type: ignore[return-value]


def _jpeg(crop: Crop, seed: int) -> Crop:
    coded = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 20])[1]
    decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    assert decoded is not None
    return np.ascontiguousarray(decoded[..., ::-1])  # type: ignore[return-value]


def _dark(crop: Crop, seed: int) -> Crop:
    side = np.linspace(0.15, 1.0, crop.shape[1])
    return (crop * (side if seed % 2 else side[::-1])[None, :, None]).astype(np.uint8)


#: What is done to LFW's crops, each face its own way: name -> crop and a seed to the altered crop.
ALTERATIONS: dict[str, Alter] = {
    "moved by up to 8 px": _moved(shift=8 / 112),
    "moved by up to 4 px, turned by up to 5 degrees": _moved(shift=4 / 112, rotate=5),
    "scaled by 0.9 to 1.1": _moved(scale=0.1),
    "40 pixels wide": _small,
    "JPEG quality 20": _jpeg,
    "one side dark": _dark,
    "with a drawn mask": _drawn(MASK, colour=(120, 160, 190)),
    "with drawn sunglasses": _drawn(*LENSES, colour=(25, 25, 30)),
}
_ONE_SIDE = ("with a drawn mask", "with drawn sunglasses")  # the other picture of a pair stays as it is


class Altered:
    """Pictures of a list, altered when they are read; keys with ``as it is:`` before them are left alone."""

    def __init__(self, pictures: Any, alter: Alter) -> None:
        self.pictures, self.alter = pictures, alter

    def read(self, key: str) -> Crop:
        """uint8 RGB [112, 112, 3]."""
        side, _, own = key.partition(":")
        crop: Crop = self.pictures.read(own)
        return crop if side == "plain" else self.alter(crop, derived_seed(*f"{side}:{own}".encode()))


def altered_pairs(lfw: LFW, name: str) -> PairList:
    """A list with altered crops: the first face's, and the second one's its own way where both are."""
    other = "plain" if name in _ONE_SIDE else "second"
    named = [(f"first:{lfw.keys[a]}", f"{other}:{lfw.keys[b]}") for a, b in zip(lfw.first, lfw.second, strict=True)]
    person = lambda key: key.partition(":")[2].split("/", 1)[0]  # noqa: E731
    genuine, folds = lfw.genuine.tolist(), lfw.folds
    return PairList(named, genuine, folds, person, pictures=Altered(lfw.pictures, ALTERATIONS[name]))


def figures(result: Evaluation, pairs: PairList) -> dict[str, Any]:
    """Of each attention that was asked for, and of how many pairs and people."""
    assert result.resampling is not None
    found: dict[str, Any] = {name: variant.as_dict() for name, variant in result.variants.items()}
    return found | {"pairs": len(pairs), "people": result.resampling.units, "failed_pictures": len(result.failures)}


@torch.no_grad()
def largest_share(model: XCosModel, pairs: PairList) -> float:
    """Mean over pairs of the largest W."""
    features = model.features_of([pairs.read(key) for key in pairs.keys], 64)
    shares = [
        model.score(features[a], features[b], return_maps=True).attention.flatten(1).amax(1)
        for a, b in zip(
            torch.from_numpy(pairs.first).split(256), torch.from_numpy(pairs.second).split(256), strict=True
        )
    ]
    return float(torch.cat(shares).mean())


@torch.no_grad()
def frontal(model: XCosModel, crops: dict[str, list[Crop]]) -> tuple[Tensor, list[str]]:
    """Grid features and people of all crops."""
    names = [person for person, own in crops.items() for _ in own]
    return model.features_of([crop for own in crops.values() for crop in own], 64), names


def claims(model: XCosModel, sets: dict[str, dict[str, list[Crop]]]) -> dict[str, Any]:
    """For each set of frontal faces: the false match rate at the threshold that another set gives for 0.5 %."""
    made = {name: frontal(model, crops) for name, crops in sets.items()}
    found: dict[str, Any] = {}
    for name, (features, people) in made.items():
        threshold = calibrate(model, features, people, decision_fmr=_FMR, fmrs=(1e-1, 1e-2)).threshold
        for other, (wanted, whose) in made.items():
            if other == name:
                continue
            scores, same = all_pair_scores(model, wanted, whose)[:2]
            impostors = np.asarray(scores)[~np.asarray(same)]
            found[f"{name} to {other}"] = {
                "threshold": threshold,
                "pairs": int(impostors.size),
                "fmr": float((impostors >= threshold).mean()),
            }
    return found


def measure(
    model: XCosModel, lfw: LFW, cfp: dict[str, PairList], detector: Padded, swaps: int = 150, replicates: int = 1000
) -> dict[str, Any]:
    """All figures of one model."""
    plain = evaluate(model, lfw, attentions=_ATTENTIONS)
    found: dict[str, Any] = {"LFW": figures(plain, lfw), "largest_share": {"LFW": largest_share(model, lfw)}}
    for name, pairs in cfp.items():
        say(name)
        found[f"CFP {name}"] = figures(evaluate(model, pairs, attentions=_ATTENTIONS, detector=detector), pairs)
    found["altered"] = {}
    for name in ALTERATIONS:
        say(name)
        pairs = altered_pairs(lfw, name)
        found["altered"][name] = figures(evaluate(model, pairs, attentions=_ATTENTIONS), pairs)
    say("region swaps")
    faces = Faces(lfw)
    study = Study(XCosPairs(model), faces, Settings(count=swaps, replicates=replicates))
    explainers = [create("xcos-similarity"), create("xcos")]
    swapped = region_swap(study, explainers)
    found["swaps"] = {
        explainer.name: {
            "absolute": swapped.find(explainer.name).absolute._asdict(),
            "same_person_centred": swapped.find(explainer.name, paste="same-person").centred._asdict(),
        }
        for explainer in explainers
    }
    crops: dict[str, dict[str, list[Crop]]] = {"LFW": {}, "CFP": {}}
    for key, person in zip(lfw.keys, lfw.people or (), strict=True):
        crops["LFW"].setdefault(person, []).append(lfw.read(key))
    ff = cfp["FF"]
    for key, person in zip(ff.keys, ff.people or (), strict=True):
        try:
            crop = extract_face(ff.read(key), detector, name=key).rgb
        except PictureError:
            continue
        crops["CFP"].setdefault(person, []).append(crop)
    found["claims"] = claims(model, crops)
    worse = max(claim["threshold"] for claim in found["claims"].values())
    right = (plain.variants["own"].scores >= worse) == lfw.genuine
    found["right_at_worse_threshold"] = {"LFW": float(right.mean())}
    return found


def tested(lfw: Path, pairs: Path, cfp: Path, detector: Path) -> tuple[LFW, dict[str, PairList], Padded]:
    """The lists of people whom nobody here trained on, and who finds faces in CFP's photographs."""
    folds = sorted({(number - 1) // 50 + 1 for number in CFP_TESTED})
    own = LFW(lfw, pairs, folds=[fold - 1 for fold in LFW_TESTED])
    return own, cfp_lists(cfp, folds), Padded(create_detector(detector))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model files, or names of shipped ones")
    for name in ("lfw", "pairs", "cfp", "detector", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--swaps", type=int, default=150, help="pairs of each kind in region swaps")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {}
    try:
        lfw, cfp, detector = tested(options.lfw, options.pairs, options.cfp, options.detector)
        for name in options.models:
            say(name)
            model = load_model(name).requires_grad_(False)
            result[Path(name).stem] = {"fingerprint": model.fingerprint()} | measure(
                model, lfw, cfp, detector, options.swaps
            )
            write_json(options.json, result)
    except (XCosError, OSError, ValueError) as error:
        say(f"measure_default: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
