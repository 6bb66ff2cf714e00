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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.evaluation.verification import eer
from xcos_ext.explain.explainers.interface import Explainer, PairModel, Saliency
from xcos_ext.explain.fills import filled

from .faces import Drawn, Faces, TooFewError, mean_face_of, normalised
from .models import device_of, explained, mate_scorer, remembering
from .ranking import LEVELS, kept_pixels, ranks
from .resolution import to_pixels
from .statistics import Curve, Estimator, mean_curve

__all__ = ["MODES", "Deletion", "DeletionRow", "deletion_identification", "deletion_verification"]

MODES = ("deletion", "insertion")
_KINDS = Saliency._fields

Tick = Callable[[int, int], None]
Judge = Callable[[Tensor], NDArray[np.bool_]]


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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        names = ("explainer", "kind", "mode", "fill")
        return {name: getattr(self, name) for name in names} | {"curve": self.curve.as_dict()}


@dataclass(frozen=True)
class Deletion:
    """All curves of one protocol.

    Attributes:
        protocol: ``"deletion"`` (verification) or ``"identification"``.
        rows: per explainer, fill, kind of map and mode.
        pairs: compared: genuine and impostor pairs, or probes.
        clean: accuracy, or rank-1 rate, on untouched pictures.
        threshold: of the equal error rate on untouched pairs; None for identification.
        gallery: persons enrolled; 0 for verification.
        top: gallery entries that a probe is explained against; 0 for verification.
        passed_over: pairs or people left out for want of a picture.
        unit: what the intervals' bootstrap draws.
    """

    protocol: str
    rows: tuple[DeletionRow, ...]
    pairs: int
    clean: float
    threshold: float | None
    gallery: int
    top: int
    passed_over: int
    unit: str

    def find(
        self, explainer: str, kind: str = "similar", mode: str = "deletion", fill: str | None = None
    ) -> DeletionRow:
        """One row; without ``fill`` the first.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.explainer, row.kind, row.mode) == (explainer, kind, mode) and fill in (None, row.fill):
                return row
        raise KeyError((explainer, kind, mode, fill))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        names = ("protocol", "pairs", "clean", "threshold", "gallery", "top", "passed_over", "unit")
        return {name: getattr(self, name) for name in names} | {"rows": [row.as_dict() for row in self.rows]}


class _Curves:
    """Whether each pair was right at every level, for all explainers, fills, kinds of maps and modes."""

    def __init__(self, explainers: Sequence[Explainer], fills: Sequence[str], pairs: int) -> None:
        self._names = [explainer.name for explainer in explainers]
        self.right = {
            (name, fill, kind, mode): np.full((pairs, len(LEVELS)), np.nan)
            for name in self._names
            for fill in fills
            for kind in _KINDS
            for mode in MODES
        }

    @property
    def steps(self) -> int:
        """Pictures to judge per pair: all levels but the two ends, which maps share."""
        return len(self.right) * (len(LEVELS) - 2)

    def rows(self, estimator: Estimator) -> tuple[DeletionRow, ...]:
        return tuple(
            DeletionRow(name, kind, mode, fill, mean_curve(LEVELS, right, estimator))
            for (name, fill, kind, mode), right in self.right.items()
        )


def _curves(
    curves: _Curves,
    block: slice,
    images: Tensor,
    maps: dict[str, Saliency],
    fills: dict[str, Tensor],
    judge: Judge,
    clean: NDArray[np.bool_],
    generator: torch.Generator,
) -> Iterator[int]:
    """Fill in one batch of pairs; yields how many pictures were judged."""
    count, _, height, width = images.shape
    empty = {fill: judge(pixels) for fill, pixels in fills.items()}
    for name, saliency in maps.items():
        for kind, made in zip(_KINDS, saliency, strict=True):
            places = ranks(to_pixels(made, (height, width)), generator)
            for fill, pixels in fills.items():
                for mode in MODES:
                    right = curves.right[name, fill, kind, mode]
                    ends = (clean, empty[fill])
                    right[block, 0], right[block, -1] = ends if mode == "deletion" else ends[::-1]
                    for place, level in list(enumerate(LEVELS))[1:-1]:
                        kept = kept_pixels(places, level, mode).view(count, 1, height, width)
                        right[block, place] = judge(torch.where(kept, images, pixels))
                        yield count


@torch.no_grad()
def deletion_verification(
    model: PairModel,
    explainers: Sequence[Explainer],
    faces: Faces,
    *,
    pairs: int = 60,
    fills: Sequence[str] = ("zero",),
    seed: int = 0,
    replicates: int = 1000,
    batch_size: int = 32,
    tick: Tick | None = None,
) -> Deletion:
    """Deletion and insertion for verification.

    Args:
        model: whose decisions are explained.
        explainers: with the controls.
        faces: the pictures.
        pairs: of each kind, genuine and impostor.
        fills: keys of ``FILLS``; the mean face is that of the pairs' pictures.
        seed: of the draw, and of the order of equal values.
        replicates: for the intervals; 0 for none. The threshold stays fixed in them.
        batch_size: pairs at once.
        tick: called with (pictures judged, pictures in all).

    Raises:
        TooFewError: fewer pairs of a kind than asked for.
        ValueError: an unknown fill, or a map that is not finite.
    """
    found, genuine, passed = faces.draw_both(pairs, seed)
    model, device, preprocessing = remembering(model), device_of(model), model.preprocessing
    keys = list(dict.fromkeys(key for pair in found for key in (pair.a, pair.b)))
    mean_face = mean_face_of(faces, keys, preprocessing, device) if "mean-face" in fills else None
    blocks = [slice(start, min(start + batch_size, len(found))) for start in range(0, len(found), batch_size)]

    scores = np.empty(len(found))
    for block in blocks:
        a, b = faces.sides(found[block], preprocessing, device)
        scores[block] = model.score(model.features(a), model.features(b)).double().cpu().numpy()
    threshold = eer(scores, genuine).threshold
    curves = _Curves(explainers, fills, len(found))
    generator = torch.Generator().manual_seed(seed)
    done, total = 0, len(found) * curves.steps
    for block in blocks:
        a, b = faces.sides(found[block], preprocessing, device)
        maps = {explainer.name: explained(explainer, model, a, b) for explainer in explainers}
        enrolled, labels = model.features(b), genuine[block]

        def judge(images: Tensor, enrolled: Tensor = enrolled, labels: NDArray[np.bool_] = labels) -> NDArray[np.bool_]:
            probes = model.features(images)
            return (model.score(probes, enrolled).double().cpu().numpy() >= threshold) == labels

        clean = (scores[block] >= threshold) == labels
        pixels = {fill: filled(fill, a, preprocessing, mean_face) for fill in fills}
        for judged in _curves(curves, block, a, maps, pixels, judge, clean, generator):
            done += judged
            if tick is not None:
                tick(done, total)
    estimator = Estimator(len(found), faces.ids(found), replicates=replicates, seed=seed)
    accuracy = float(((scores >= threshold) == genuine).mean())
    rows = curves.rows(estimator)
    return Deletion("deletion", rows, len(found), accuracy, threshold, 0, 0, passed, estimator.unit)


@torch.no_grad()
def deletion_identification(
    model: PairModel,
    explainers: Sequence[Explainer],
    faces: Faces,
    *,
    probes: int = 60,
    gallery: int = 1000,
    top: int = 1,
    fills: Sequence[str] = ("zero",),
    seed: int = 0,
    replicates: int = 1000,
    batch_size: int = 32,
    tick: Tick | None = None,
) -> Deletion:
    """Deletion and insertion for closed-set identification.

    One picture of everybody is enrolled; a probe is another picture of somebody enrolled, and is explained against its
    ``top`` best entries (with several, each map's values give way to their places, and the places are averaged). The
    rate counts all probes, also those whose best entry was wrong to begin with.

    Args:
        model: whose decisions are explained.
        explainers: with the controls.
        faces: with people.
        probes: one each of this many people.
        gallery: at most so many people; those of the probes first.
        top: gallery entries that are explained.
        fills, seed, replicates, batch_size, tick: as in :func:`deletion_verification`. The gallery is fixed in the
            intervals.

    Raises:
        TooFewError: fewer people with two pictures than probes, or people unknown.
        ValueError: ``top`` beyond the gallery, an unknown fill, or a map that is not finite.
    """
    faces.need_people("identification")
    rng = np.random.default_rng(seed)
    several = [person for person in faces.people if len(faces.of(person)) > 1]
    if not 1 <= probes <= len(several):
        raise TooFewError(f"count: expected 1..{len(several)}, the people with two pictures, got {probes}")
    found: list[Drawn] = []
    passed = 0
    for place in rng.permutation(len(several)).tolist():
        if len(found) == probes:
            break
        enrolled_key = faces.another(several[place], rng, ())
        probe = None if enrolled_key is None else faces.another(several[place], rng, (enrolled_key,))
        if enrolled_key is None or probe is None:
            passed += 1
        else:
            found.append(Drawn(probe, enrolled_key))
    if not found:
        raise TooFewError(f"pairs: none of the {len(several)} people has two pictures that can be used")
    mated = {faces.person(pair.a) for pair in found}
    rest = [person for person in faces.people if person not in mated]
    enrolled_keys = [pair.b for pair in found]
    for place in rng.permutation(len(rest)).tolist():
        if len(enrolled_keys) >= gallery:
            break
        key = faces.another(rest[place], rng, ())
        if key is not None:
            enrolled_keys.append(key)
    if not 1 <= top <= len(enrolled_keys):
        raise ValueError(f"top: expected 1..{len(enrolled_keys)}, the gallery's size, got {top}")

    model, device, preprocessing = remembering(model), device_of(model), model.preprocessing
    mean_face = None
    if "mean-face" in fills:
        mean_face = mean_face_of(faces, [*enrolled_keys, *(pair.a for pair in found)], preprocessing, device)

    def pictures(keys: Sequence[str]) -> Tensor:
        return normalised(preprocessing, faces.stacked(keys), device)

    starts = range(0, len(enrolled_keys), batch_size)
    features = torch.cat([model.features(pictures(enrolled_keys[i : i + batch_size])) for i in starts])
    against_all = mate_scorer(model, features)
    curves = _Curves(explainers, fills, len(found))
    generator = torch.Generator().manual_seed(seed)
    done, total = 0, len(found) * curves.steps
    right_at_first = np.empty(len(found), bool)
    for start in range(0, len(found), batch_size):
        block = slice(start, min(start + batch_size, len(found)))
        a = pictures([pair.a for pair in found[block]])
        mates = torch.arange(block.start, block.stop, device=device)

        def judge(images: Tensor, mates: Tensor = mates) -> NDArray[np.bool_]:
            return (against_all(model.features(images)).argmax(1) == mates).cpu().numpy()

        best = against_all(model.features(a)).topk(top, dim=1).indices
        right_at_first[block] = (best[:, 0] == mates).cpu().numpy()
        entries = [pictures([enrolled_keys[i] for i in column]) for column in best.T.tolist()]
        maps = {e.name: _against(e, model, a, entries, generator) for e in explainers}
        pixels = {fill: filled(fill, a, preprocessing, mean_face) for fill in fills}
        for judged in _curves(curves, block, a, maps, pixels, judge, right_at_first[block], generator):
            done += judged
            if tick is not None:
                tick(done, total)
    estimator = Estimator(len(found), faces.ids(found), replicates=replicates, seed=seed)
    rows = curves.rows(estimator)
    rate = float(right_at_first.mean())
    return Deletion(
        "identification", rows, len(found), rate, None, len(enrolled_keys), top, passed, estimator.unit
    )  # fmt: skip


def _against(
    explainer: Explainer, model: PairModel, a: Tensor, entries: Sequence[Tensor], generator: torch.Generator
) -> Saliency:
    """Maps against several faces as one: by the mean place of every pixel."""
    all_maps = [explained(explainer, model, a, entry) for entry in entries]
    if len(all_maps) == 1:
        return all_maps[0]
    means = []
    for maps in zip(*all_maps, strict=True):
        places = torch.stack([ranks(made, generator) for made in maps]).float().mean(0)
        means.append(-places.view(maps[0].shape))
    return Saliency(*means)
