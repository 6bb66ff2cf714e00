"""Deletion and insertion: the score is asked again while the pixels of a face go, or come, in the order of a map.

For verification (facts of arXiv 2305.08546 and 2403.04549): the threshold is that of the equal error rate on the
untouched pairs; at 0, 10, ..., 100 % the top of the map is taken from the probe (deletion) or only it is left
(insertion); the gallery picture is untouched; what counts is the verification accuracy over all pairs at the fixed
threshold, and 100 times the area under it. For identification (the idea of arXiv 2407.05983): a probe is explained
against its best gallery entries, and what counts is the rank-1 identification rate.

Deletion is better the lower, insertion the higher. With a black fill deletion rewards scattered pixels, because the
picture leaves what the network knows, and insertion rewards the middle of the face: read no figure without those of
``random`` and ``centre``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.evaluation.verification import eer
from xcos_ext.explain.explainers.interface import Explainer, Saliency
from xcos_ext.io.several import several

from .faces import Drawn, TooFewError
from .maps import LEVELS, Curve, explained, kept_pixels, mean_curve, ranks, to_pixels
from .study import Results, Study, mate_scorer

__all__ = ["MODES", "Deletion", "DeletionRow", "deletion_identification", "deletion_verification"]

MODES = ("deletion", "insertion")

Verdicts = NDArray[np.bool_]


@dataclass(frozen=True)
class DeletionRow:
    """One curve.

    Attributes:
        explainer: its name.
        kind: ``"similar"`` or ``"dissimilar"``, the map that gave the order.
        mode: ``"deletion"`` or ``"insertion"``.
        fill: what took the place of deleted pixels.
        curve: accuracy, or rank-1 identification rate, at every share of the pixels; its area times 100.
    """

    explainer: str
    kind: str
    mode: str
    fill: str
    curve: Curve


@dataclass(frozen=True)
class Deletion(Results[DeletionRow]):
    """All curves of one protocol: a row per explainer, fill, kind of map and mode.

    Attributes:
        protocol: ``"deletion"`` (verification) or ``"identification"``.
        pairs: compared: genuine and impostor pairs, or probes.
        clean: accuracy, or rank-1 rate, on untouched pictures.
        passed_over: pairs or people left out for want of a picture.
        threshold: of verification: of the equal error rate on untouched pairs.
        gallery, top: of identification: persons enrolled, and entries that a probe is explained against.
    """

    protocol: str
    pairs: int
    clean: float
    passed_over: int
    threshold: float | None = None
    gallery: int = 0
    top: int = 0


class _Batch(NamedTuple):
    """Attributes: images [N, 3, H, W] to change; the faces they are explained against; a function that tells which of
    N changed images are judged rightly, and whether the untouched ones are."""

    images: Tensor
    entries: Sequence[Tensor]
    judge: Callable[[Tensor], Verdicts]
    clean: Verdicts


def _curves(
    study: Study,
    explainers: Sequence[Explainer],
    pairs: Sequence[Drawn],
    keys: Sequence[str],
    prepare: Callable[[slice], _Batch],
) -> tuple[tuple[DeletionRow, ...], str]:
    """The rows, and the unit of their intervals."""
    several(explainers, "explainers", "explainers")
    right = {
        (explainer.name, fill, kind, mode): np.full((len(pairs), len(LEVELS)), np.nan)
        for explainer in explainers
        for fill in study.settings.fills
        for kind in Saliency._fields
        for mode in MODES
    }
    fill_in = study.filler(keys)
    study.begin(len(pairs) * len(right) * (len(LEVELS) - 2))  # both ends are the same for all maps
    for block in study.blocks(len(pairs)):
        images, entries, judge, clean = prepare(block)
        count, _, height, width = images.shape
        maps = {explainer.name: _against(explainer, study, images, entries) for explainer in explainers}
        fills = fill_in(images)
        empty = {fill: judge(pixels) for fill, pixels in fills.items()}
        orders = (
            (name, kind, ranks(to_pixels(made, (height, width)), study.generator))
            for name, saliency in maps.items()
            for kind, made in zip(Saliency._fields, saliency, strict=True)
        )
        for name, kind, places in orders:
            for fill, pixels in fills.items():
                for mode in MODES:
                    curve = right[name, fill, kind, mode][block]
                    curve[:, 0], curve[:, -1] = (clean, empty[fill]) if mode == "deletion" else (empty[fill], clean)
                    for place, level in list(enumerate(LEVELS))[1:-1]:
                        kept = kept_pixels(places, level, mode).view(count, 1, height, width)
                        curve[:, place] = judge(torch.where(kept, images, pixels))
                        study.advance(count)
    estimator = study.estimator(pairs)
    rows = tuple(
        DeletionRow(name, kind, mode, fill, mean_curve(LEVELS, values, estimator))
        for (name, fill, kind, mode), values in right.items()
    )
    return rows, estimator.unit


def _against(explainer: Explainer, study: Study, a: Tensor, entries: Sequence[Tensor]) -> Saliency:
    """Maps against several faces as one: by the mean place of every pixel."""
    every = [explained(explainer, study.model, a, entry) for entry in entries]
    if len(every) == 1:
        return every[0]

    def joined(maps: Sequence[Tensor]) -> Tensor:
        places = torch.stack([ranks(made, study.generator) for made in maps])
        return -places.float().mean(0).view(maps[0].shape)

    return Saliency(*map(joined, zip(*every, strict=True)))


@torch.no_grad()
def deletion_verification(study: Study, explainers: Sequence[Explainer]) -> Deletion:
    """Deletion and insertion for verification.

    Args:
        study: of the settings, count, fills, seed, replicates and batch_size are used.

    Raises:
        TooFewError: fewer pairs of a kind than asked for.
        ValueError: an unknown fill, or a map that is not finite.
    """
    found, genuine, passed = study.faces.draw_both(study.count(), study.settings.seed)
    scores = study.pair_scores(found)
    threshold = eer(scores, genuine).threshold

    def prepare(block: slice) -> _Batch:
        a, b = study.sides(found[block])
        enrolled, labels = study.model.features(b), genuine[block]
        return _Batch(
            a,
            [b],
            lambda images: (study.scores(images, enrolled) >= threshold) == labels,
            (scores[block] >= threshold) == labels,
        )

    keys = [key for pair in found for key in (pair.a, pair.b)]
    return Deletion(
        *_curves(study, explainers, found, keys, prepare),
        protocol="deletion",
        pairs=len(found),
        clean=float(((scores >= threshold) == genuine).mean()),
        passed_over=passed,
        threshold=threshold,
    )


@torch.no_grad()
def deletion_identification(study: Study, explainers: Sequence[Explainer]) -> Deletion:
    """Deletion and insertion for closed-set identification.

    One picture of everybody is enrolled; a probe is another picture of somebody enrolled, and is explained against its
    ``top`` best entries (with several, each map's values give way to their places, and the places are averaged). The
    rate counts all probes, also those whose best entry was wrong to begin with.

    Args:
        study: of the settings, count (of probes, one a person), gallery, top, fills, seed, replicates and batch_size
            are used.

    Raises:
        TooFewError: fewer people with two pictures than probes, or people unknown.
        ValueError: ``top`` beyond the gallery, an unknown fill, or a map that is not finite.
    """
    study.faces.need_people("identification")
    found, enrolled, passed = _gallery(study)
    top = study.settings.top
    if not 1 <= top <= len(enrolled):
        raise ValueError(f"top: expected 1..{len(enrolled)}, the gallery's size, got {top}")
    parts = [study.model.features(study.pictures(enrolled[block])) for block in study.blocks(len(enrolled))]
    against_all = mate_scorer(study.model, torch.cat(parts))
    right_at_first = np.empty(len(found), bool)

    def prepare(block: slice) -> _Batch:
        a = study.pictures([pair.a for pair in found[block]])
        mates = torch.arange(block.start, block.stop, device=study.device)
        best = against_all(study.model.features(a)).topk(top, dim=1).indices
        right_at_first[block] = (best[:, 0] == mates).cpu().numpy()
        return _Batch(
            a,
            [study.pictures([enrolled[i] for i in column]) for column in best.T.tolist()],
            lambda images: (against_all(study.model.features(images)).argmax(1) == mates).cpu().numpy(),
            right_at_first[block],
        )

    return Deletion(
        *_curves(study, explainers, found, [*enrolled, *(pair.a for pair in found)], prepare),
        protocol="identification",
        pairs=len(found),
        clean=float(right_at_first.mean()),
        passed_over=passed,
        gallery=len(enrolled),
        top=top,
    )


def _gallery(study: Study) -> tuple[list[Drawn], list[str], int]:
    """Probes with their mates; everybody enrolled, the mates first; people with two pictures who were passed over."""
    faces, rng = study.faces, np.random.default_rng(study.settings.seed)
    several = [person for person in faces.people if len(faces.of(person)) > 1]
    probes = study.count(len(several))
    if not 1 <= probes <= len(several):
        raise TooFewError(f"count: expected 1..{len(several)}, the people with two pictures, got {probes}")
    found: list[Drawn] = []
    passed = 0
    for place in rng.permutation(len(several)).tolist():
        if len(found) == probes:
            break
        mate = faces.another(several[place], rng)
        probe = None if mate is None else faces.another(several[place], rng, (mate,))
        if mate is None or probe is None:
            passed += 1
        else:
            found.append(Drawn(probe, mate))
    if not found:
        raise TooFewError(f"pairs: none of the {len(several)} people has two pictures that can be used")
    mated = {faces.person(pair.a) for pair in found}
    rest = [person for person in faces.people if person not in mated]
    others = (faces.another(rest[place], rng) for place in rng.permutation(len(rest)).tolist())
    free = max(0, study.settings.gallery - len(found))
    return found, [*(pair.b for pair in found), *islice(filter(None, others), free)], passed
