"""Scores of a list of pairs: features once per picture, and every way to make a score of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.backbones import Recogniser
from xcos_ext.devices import module_device
from xcos_ext.faces.detector import Detector
from xcos_ext.faces.reader import extract_face
from xcos_ext.io.errors import PictureError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.io.several import several
from xcos_ext.model import XCosModel
from xcos_ext.ops import grid_cosine, xcos_score

from .datasets import PairList

__all__ = ["ATTENTIONS", "Score", "Scores", "Track", "crops", "extractor", "score_pairs", "scorers_of"]

#: Ways to weigh the cells -> what they are.
ATTENTIONS: Mapping[str, str] = {
    "own": "the model's own",
    "uniform": "every cell alike",
    "norm": "proportional to the product of the two cells' norms",
    "corr": "each cell's correlation with the target cosine, estimated on the other folds",
    "symmetric": "the model's own, mean of both orders of the faces",
}

_PAIRS_AT_ONCE = 64

Pictures = list[NDArray[np.uint8]]
Read = Callable[[str], NDArray[np.uint8]]
Extract = Callable[[Pictures], Mapping[str, Tensor]]
Score = Callable[[Tensor, Tensor], Tensor]
Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Scores:
    """What scoring a list of pairs gives.

    Attributes:
        values: name -> fp64 [N], or [N, ...] for scorers that give several numbers a pair; NaN for pairs that failed.
        failures: pictures that could not be enrolled (unreadable, no face, of another size) -> why.
        failed: bool [N], pairs with such a picture.
    """

    values: dict[str, NDArray[np.float64]]
    failures: dict[str, str]
    failed: NDArray[np.bool_]


@torch.no_grad()
def score_pairs(
    pairs: PairList,
    extract: Extract,
    scorers: Mapping[str, tuple[str, Score]],
    *,
    read: Read | None = None,
    batch_size: int = 32,
    track: Track | None = None,
) -> Scores:
    """Extract named features of every picture once, and score pairs with them.

    Features are kept from a picture's first pair to its last, so memory holds the pictures that are open at one time:
    a fold of LFW, not the list.

    >>> from types import SimpleNamespace
    >>> crops = {key: np.random.default_rng(ord(key)).integers(0, 256, (112, 112, 3), np.uint8) for key in "abcd"}
    >>> pairs = PairList([("a", "b"), ("c", "d")], [True, False], pictures=SimpleNamespace(read=crops.get))
    >>> def extract(pictures):
    ...     return {"mean": torch.from_numpy(np.stack(pictures).mean((1, 2)))}
    >>> scored = score_pairs(pairs, extract, {"cosine": ("mean", torch.cosine_similarity)})
    >>> scored.values["cosine"].round(2).tolist(), scored.failures
    ([1.0, 1.0], {})

    Args:
        pairs: the list.
        extract: uint8 RGB pictures -> name -> features [n, ...].
        scorers: name -> (name of the features, function of two batches of them that gives [n] or [n, ...]).
        read: gives a picture by its key, by default ``pairs.read``; a ``PictureError`` is a failure to enrol.
        batch_size: pictures per forward pass.
        track: wraps the blocks of pairs that are iterated over, for a progress bar.
    """
    read = read or pairs.read
    count = len(pairs)
    last = np.zeros(len(pairs.keys), dtype=np.int64)
    for side in (pairs.first, pairs.second):
        np.maximum.at(last, side, np.arange(count))
    values: dict[str, NDArray[np.float64]] = {}
    failures: dict[str, str] = {}
    failed = np.zeros(count, dtype=bool)
    kept: dict[int, dict[str, Tensor]] = {}

    def enrol(wanted: Sequence[int]) -> None:
        pictures: Pictures = []
        found: list[int] = []
        for index in wanted:
            try:
                pictures.append(read(pairs.keys[index]))
                found.append(index)
            except PictureError as error:
                failures[pairs.keys[index]] = str(error)
        if found:
            for name, features in extract(pictures).items():
                for index, row in zip(found, features, strict=True):
                    kept.setdefault(index, {})[name] = row.clone()  # a view would keep the whole batch

    blocks = [range(start, min(start + _PAIRS_AT_ONCE, count)) for start in range(0, count, _PAIRS_AT_ONCE)]
    for block in blocks if track is None else track(blocks):
        used = dict.fromkeys(np.stack((pairs.first[block], pairs.second[block]), 1).ravel().tolist())
        new = [i for i in used if i not in kept and pairs.keys[i] not in failures]
        for start in range(0, len(new), batch_size):
            enrol(new[start : start + batch_size])
        good = np.array([p for p in block if pairs.first[p] in kept and pairs.second[p] in kept], dtype=np.int64)
        failed[list(set(block) - set(good.tolist()))] = True
        for name, (features_of, score) in scorers.items():
            if good.size:
                a, b = (torch.stack([kept[i][features_of] for i in side[good]]) for side in (pairs.first, pairs.second))
                part = score(a, b).double().cpu().numpy()
                values.setdefault(name, np.full((count, *part.shape[1:]), np.nan))[good] = part
        for index in [i for i in kept if last[i] < block.stop]:
            del kept[index]
    return Scores({name: values.get(name, np.full(count, np.nan)) for name in scorers}, failures, failed)


def crops(pairs: PairList, detector: Detector | None, size: tuple[int, int], noted: dict[str, int]) -> Read:
    """A reader of aligned crops, which says in ``noted`` how many faces a picture shows of which it took one."""
    finder = None if pairs.aligned else detector

    def read(key: str) -> NDArray[np.uint8]:
        face = extract_face(pairs.read(key), finder, name=key, size=size, strict=None)
        if face.found > 1:
            noted[key] = face.found
        return face.rgb

    return read


def extractor(model: XCosModel, recogniser: Recogniser | None, flip: bool) -> Extract:
    """Grid features and, with a recogniser, its embedding."""
    device = module_device(model)
    shared = (
        recogniser is not None
        and isinstance(model.backbone, Recogniser)
        and recogniser.preprocessing == model.preprocessing
        and (recogniser is model.backbone or fingerprint_weights(recogniser) == fingerprint_weights(model.backbone))
    )

    def once(images: Tensor, others: Tensor | None) -> dict[str, Tensor]:
        if shared:
            assert isinstance(model.backbone, Recogniser)
            grid = model.backbone.grid(images)
            return {"features": model.head.features(grid), "embedding": model.backbone.embed(grid)}
        found = {"features": model.features(images)}
        if recogniser is not None and others is not None:
            found["embedding"] = recogniser(others)
        return found

    def extract(pictures: Pictures) -> dict[str, Tensor]:
        images = model.preprocessing(pictures).to(device)
        others = None if recogniser is None or shared else recogniser.preprocessing(pictures).to(device)
        found = once(images, others)
        if flip:
            mirrored = once(images.flip(3), None if others is None else others.flip(3))
            # Flipped back in width, so that every cell meets the same part of the face.
            found["features"] = (found["features"] + mirrored["features"].flip(3)) / 2
            if "embedding" in found:
                found["embedding"] = found["embedding"] + mirrored["embedding"]
        return found

    return extract


def scorers_of(model: XCosModel, attentions: Sequence[str], embedding: bool) -> dict[str, tuple[str, Score]]:
    """For :func:`score_pairs`: attentions, ``corr`` as S [n, H, W], and the embedding's cosine as ``teacher``."""
    known: dict[str, Score] = {
        "own": lambda a, b: model.score(a, b),
        "uniform": lambda a, b: xcos_score(a, b),
        "norm": lambda a, b: xcos_score(a, b, "norm"),
        # S is the same in both orders, so this is the mean of both W.
        "symmetric": lambda a, b: (model.score(a, b) + model.score(b, a)) / 2,
        "corr": lambda a, b: grid_cosine(a, b),
    }
    scorers = {name: ("features", known[name]) for name in several(attentions, "attentions")}
    if embedding:
        scorers["teacher"] = "embedding", F.cosine_similarity
    return scorers
