"""One decision taken apart: which cells agree, where the model looked, and how that makes the score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from xcos_ext.card.calibration import check_threshold
from xcos_ext.deploy.onnx_model import OnnxModel
from xcos_ext.devices import module_device
from xcos_ext.faces.alignment import checked_landmarks
from xcos_ext.faces.quality import Quality, doubts
from xcos_ext.io.arrays import picture_hint, refuse_masked
from xcos_ext.io.several import several
from xcos_ext.io.text import percent, printable, short_name, signed, telling_digits

from .decision import contribution as contribution_of
from .decision import one_pair
from .regions import Region, cell_parts, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from xcos_ext.card import FMRAtScore, FMRCurve
    from xcos_ext.faces import AlignedFace
    from xcos_ext.model import XCosModel

__all__ = ["Explanation", "Face", "ModelCard", "explain", "explain_pairs", "features_of_faces"]

#: Rounding that the identity ``sum W (S - t) = score - t`` is allowed in fp64, in units of its largest term.
_ROUNDING = 64 * np.finfo(np.float64).eps

Identical = Literal["pictures", "features"]
IDENTICAL = {
    "pictures": "Both crops are the same picture, pixel by pixel: the score says nothing about the person",
    "features": "The model keeps exactly the same of both pictures: the score says nothing about the person",
}


@dataclass(frozen=True, eq=False)
class Face:
    """One of the two faces.

    >>> Face(name="a.jpg", details={"faces": 2}).as_dict()
    {'picture': 'a.jpg', 'faces': 2}

    Attributes:
        rgb: the aligned crop, uint8 [height, width, 3], or None.
        name: of its picture, as it came.
        landmarks: five points in the crop [5, 2]; None: the template's are assumed.
        details: what else is known of it, ready for JSON, e.g. ``box`` and ``detection_score``; ``faces``: how many
            were found, 0 where an aligned crop does not look like one.
    """

    rgb: np.ndarray | None = None
    name: str = "picture"
    landmarks: np.ndarray | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"picture": printable(self.name), **self.details}


@dataclass(frozen=True)
class ModelCard:
    """The model behind an explanation.

    >>> ModelCard("toy", None, "0123", "uniform").attention_in_words
    'uniform, not learned: every cell counts alike'

    Attributes:
        name: of the model.
        file: that it was loaded from, or None.
        fingerprint: of all that its features depend on.
        attention: ``"learned"``, ``"norm"`` or ``"uniform"``.
    """

    name: str
    file: str | None
    fingerprint: str
    attention: str

    @classmethod
    def of(cls, model: XCosModel | OnnxModel, file: str | None) -> ModelCard:
        """The card of a model that was loaded from a file."""
        if isinstance(model, OnnxModel):
            attention = model.card.attention
        else:
            from xcos_ext.deploy.graphs import attention_of  # needs torch

            kind = attention_of(model.head)
            attention = kind if isinstance(kind, str) else "learned"
        return cls(model.name, file, model.fingerprint(), attention)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "name": printable(self.name),
            "file": None if self.file is None else printable(self.file),
            "fingerprint": self.fingerprint,
        }

    @property
    def attention_in_words(self) -> str:
        """Whether the model chose where to look."""
        return {
            "learned": "learned: the model chose where to look",
            "norm": "norm, not learned: a cell counts as much as its features are strong in both faces",
            "uniform": "uniform, not learned: every cell counts alike",
        }.get(self.attention, self.attention)


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """A score, and what it is made of: ``score - threshold = sum W * (S - threshold)``, cell by cell.

    Everything is computed again in fp64 from the model's S and W: W is divided by its sum, which is 1 up to the model's
    rounding, and the score is ``sum W * S``. So the identity holds to the last bits of fp64, and the score equals the
    model's own within the rounding of the model's type. Both are checked when it is made: the cells' contributions,
    summed without rounding, are off by at most 64 eps of fp64 times the largest of 1, abs(score) and abs(threshold);
    the score is off the model's by at most 64 eps of the model's type.

    >>> card = ModelCard("toy", None, "0123", "learned")
    >>> e = Explanation(np.array([[0.9, 0.1]]), np.array([[0.75, 0.25]]), 0.7, 0.3, Face(), Face(), card)
    >>> e
    <Explanation: same person, score 0.7000, threshold 0.3000, 1x2 cells>
    >>> "let in" if e else "keep out"
    'let in'
    >>> e.contribution.round(2)
    array([[ 0.45, -0.05]])

    Args:
        similarity: S [h, w], cosines.
        attention: W [h, w], not negative, sums to 1 up to rounding.
        model_score: the model's own score.
        threshold: t: the same person if score >= t; None: unknown, then there is no verdict and no contribution.
        a, b: the faces.
        model: what scored them.
        curve: the model's false match rate at any score; None: it is not calibrated.
        given: whether the threshold is the caller's and not the model's.
        identical: ``"pictures"`` if both crops are the same, ``"features"`` if what the model keeps of them is.
        exchanged: the model's score of (B, A); None where unknown.
        eps: machine epsilon of the type that the model computed in.

    Attributes:
        score: fp64.
        contribution: W * (S - t) [h, w], fp64; None without a threshold.
        parts: the part of the face that every cell lies on, int64 [h, w]: indices into
            :data:`~xcos_ext.explain.regions.PARTS`.
        regions: what every part of the faces did.

    Raises:
        ValueError: maps of other shapes, values that are not finite, weights that are negative or do not sum to 1, or
            a score that the maps do not make.
    """

    similarity: np.ndarray
    attention: np.ndarray
    model_score: float
    threshold: float | None
    a: Face
    b: Face
    model: ModelCard
    curve: FMRCurve | None = None
    given: bool = False
    identical: Identical | None = None
    exchanged: float | None = None
    eps: float = float(np.finfo(np.float32).eps)
    score: float = field(init=False)
    contribution: np.ndarray | None = field(init=False)
    parts: np.ndarray = field(init=False)
    regions: tuple[Region, ...] = field(init=False)

    def __post_init__(self) -> None:
        maps = one_pair(SimpleNamespace(score=self.model_score, similarity=self.similarity, attention=self.attention))
        similarity, weights = maps.similarity.copy(), maps.attention
        total = math.fsum(weights.ravel().tolist())
        slack = 64 * self.eps
        if weights.min() < -slack or abs(total - 1) > slack:
            raise ValueError(
                "attention: expected weights that are not negative and sum to 1, got a sum of "
                f"{total:.6g} and a least of {weights.min():.3g}"
            )
        attention = weights / total
        score = math.fsum((attention * similarity).ravel().tolist())
        if abs(score - self.model_score) > slack * max(1.0, float(np.abs(similarity).max())):
            raise ValueError(f"model_score: expected {score:.9g}, which sum W * S gives, got {self.model_score:.9g}")
        threshold = check_threshold(self.threshold)
        decided = threshold is not None
        origin = threshold or 0.0
        added = contribution_of(similarity, attention, origin)
        margin = math.fsum(added.ravel().tolist())
        if abs(margin - (score - origin)) > _ROUNDING * max(1.0, abs(score), abs(origin)):
            raise ValueError(f"contribution: expected a sum of score - threshold = {score - origin!r}, got {margin!r}")
        for values in (similarity, attention, added):
            values.setflags(write=False)
        known = [face.landmarks for face in (self.a, self.b) if face.landmarks is not None]
        picture = self.a.rgb if self.a.rgb is not None else self.b.rgb
        size = (112, 112) if picture is None else picture.shape[:2]
        parts = cell_parts(similarity.shape, size, np.mean(known, axis=0) if known else None)
        computed = {
            "threshold": threshold,
            "model_score": maps.score,
            "similarity": similarity,
            "attention": attention,
            "score": score,
            "contribution": added if decided else None,
            "parts": parts,
            "regions": summarise(similarity, attention, added, parts, decided=decided),
        }
        for name, value in computed.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def weighted(self) -> np.ndarray:
        """W * S [h, w]: adds up to the score."""
        return self.attention * self.similarity

    @property
    def same(self) -> bool | None:
        """The verdict: the same person; None without a threshold."""
        return None if self.threshold is None else self.score >= self.threshold

    def __bool__(self) -> bool:
        """Whether it is the same person.

        Raises:
            ValueError: without a threshold there is no verdict.
        """
        if self.same is None:
            raise ValueError("threshold: expected one, without which there is no verdict, got None")
        return self.same

    @property
    def margin(self) -> float | None:
        """Score - threshold, or None."""
        return None if self.threshold is None else self.score - self.threshold

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return {True: "same person", False: "different people", None: "no verdict"}[self.same]

    @property
    def fmr(self) -> FMRAtScore | None:
        """False match rate at the score; None: the model is not calibrated."""
        return None if self.curve is None else self.curve.at(self.score)

    @property
    def fmr_at_threshold(self) -> FMRAtScore | None:
        """False match rate at the threshold; None: no threshold, or the model is not calibrated."""
        return None if self.curve is None or self.threshold is None else self.curve.at(self.threshold)

    # --- words

    @property
    def printed(self) -> tuple[str, str]:
        """Score and threshold with as many digits as tell them apart, four or more; without a threshold ``"None"``."""
        if self.threshold is None:
            return f"{self.score:.4f}", "None"
        digits = telling_digits(self.score, self.threshold)
        return f"{self.score:.{digits}f}", f"{self.threshold:.{digits}f}"

    @property
    def certainty(self) -> str:
        """How far the score is from the threshold, in false match rates."""
        fmr, at_threshold = self.fmr, self.fmr_at_threshold
        if self.curve is None or fmr is None:
            return "This model is not calibrated, so nobody knows how often different people score as high."
        said = f"The share of impostor pairs that score at least {self.score:.3f} is {fmr}"
        if at_threshold is not None:
            said += f"; at the threshold it is {at_threshold}"
            if fmr.resolved and at_threshold.resolved:
                ratio = at_threshold.rate / fmr.rate
                if ratio >= 1.05:
                    said += f": {_times(ratio)} fewer"
                elif ratio <= 1 / 1.05:
                    said += f": {_times(1 / ratio)} more"
        return f"{said}. Measured on {self.curve.sample}: on other people and other photographs the shares differ."

    @property
    def doubt(self) -> str | None:
        """Why the verdict should not be relied on: faces that are small, blurred, badly lit, or turned against each
        other; None: nothing is known against it."""
        known = [face.details.get("quality") for face in (self.a, self.b)]
        a, b = (None if found is None else Quality(**found) for found in known)
        return doubts(a, b, (printable(self.a.name), printable(self.b.name)))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader must know beside the numbers, a sentence each."""
        said = [
            f"{printable(face.name)} does not look like a face: the score says nothing about a person."
            for face in (self.a, self.b)
            if face.details.get("faces") == 0
        ]
        if self.doubt is not None:
            said.append(self.doubt)
        if self.identical is not None:
            said.append(f"{IDENTICAL[self.identical]}.")
        if self.threshold is None:
            said.append("The model knows no decision threshold (it is not calibrated): there is no verdict.")
        elif self.given:
            said.append(f"The threshold {self.threshold:.4f} was given for this comparison; it is not the model's own.")
        if self.model.attention in ("norm", "uniform"):
            said.append(f"The attention is {self.model.attention_in_words}.")
        rounding = 64 * self.eps
        if self.margin is not None and abs(self.margin) <= rounding:
            said.append("The score is on the threshold within rounding: the verdict could as well be the other.")
        if self.exchanged is not None and abs(self.exchanged - self.model_score) > rounding:
            turned = self.threshold is not None and (self.exchanged >= self.threshold) != self.same
            said.append(
                f"With the faces exchanged the score is {self.exchanged:.4f}{', and the verdict the other' * turned}: "
                "this model's attention depends on the order."
            )
        return tuple(said)

    @property
    def summary(self) -> str:
        """Two or three sentences: the verdict, and which parts made it."""
        if self.threshold is None or self.margin is None:
            head = f"No verdict: score {self.score:.4f}, and no threshold to compare it with."
            most = sorted(self.regions, key=lambda r: -r.share)[:3]
            looked = ", ".join(f"{r.name} ({percent(r.share)}, mean S {r.similarity:.2f})" for r in most)
            return f"{head} Most attention: {looked}."
        side = "above" if self.margin >= 0 else "below"
        score, threshold = self.printed
        margin = f"{abs(self.margin):.{len(score.partition('.')[2])}f}"
        head = f"{self.verdict.capitalize()}: score {score} is {margin} {side} the threshold {threshold}."
        said = [head]
        for word, verb in (("agrees", "For the same person"), ("differs", "Against it")):
            chosen = sorted((r for r in self.regions if r.word == word), key=lambda r: -abs(r.contribution))
            if chosen:
                total = math.fsum(r.contribution for r in chosen)
                names = ", ".join(f"{r.name} {signed(r.contribution)}" for r in chosen)
                said.append(f"{verb} ({signed(total)}): {names}.")
        return " ".join(said)

    def __str__(self) -> str:
        return "\n".join((self.summary, self.certainty, *self.remarks))

    def __repr__(self) -> str:
        score, threshold = self.printed
        rows, columns = self.similarity.shape
        return f"<Explanation: {self.verdict}, score {score}, threshold {threshold}, {rows}x{columns} cells>"

    # --- ways out

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: the keys of ``xcos verify --json``, then parts of the face and words."""
        curve = self.curve
        return {
            "score": self.score,
            "threshold": self.threshold,
            "same": self.same,
            "fmr": _rate(self.fmr, curve),
            "similarity": self.similarity.tolist(),
            "attention": self.attention.tolist(),
            "contribution": None if self.contribution is None else self.contribution.tolist(),
            "model": self.model.as_dict(),
            "a": self.a.as_dict(),
            "b": self.b.as_dict(),
            "fmr_at_threshold": _rate(self.fmr_at_threshold, curve),
            "regions": [
                {
                    "name": region.name,
                    "cells": [list(cell) for cell in region.cells],
                    "similarity": region.similarity,
                    "attention": region.share,
                    "contribution": None if self.threshold is None else region.contribution,
                    "word": region.word,
                }
                for region in self.regions
            ],
            "attention_kind": self.model.attention,
            "doubt": self.doubt,
            "identical": self.identical,
            "model_score": self.model_score,
            "exchanged_score": self.exchanged,
            "threshold_given": self.given,
            "text": {"summary": self.summary, "certainty": self.certainty, "remarks": list(self.remarks)},
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """:meth:`as_dict` as strict JSON."""
        import json

        return json.dumps(self.as_dict(), indent=indent, allow_nan=False)

    def figure(self) -> Figure:
        """The decision as a matplotlib figure; write it with :func:`~xcos_ext.explain.save_figure`.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from .decision_figure import verification_figure

        both = self.a.rgb is not None and self.b.rgb is not None
        fmr = self.fmr
        return verification_figure(
            self.a.rgb if both else None,
            self.b.rgb if both else None,
            self,
            self.threshold,
            names=(short_name(self.a.name), short_name(self.b.name)),
            note=printable(self.model.name),
            meaning="" if fmr is None else f"false match rate at this score {fmr}",
        )

    def to_html(self, *, title: str | None = None) -> str:
        """One page with everything in it: pictures, style and program; nothing is loaded from anywhere.

        Args:
            title: of the page; by default the names of the pictures.

        Raises:
            MissingPackageError: Jinja, or Pillow, which encodes the pictures, is not installed.
        """
        from .page import explanation_page

        return "".join(explanation_page(self, title))

    def _repr_html_(self) -> str:
        from .page import notebook_frame

        return notebook_frame(self)


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 9.95 else f"{ratio:,.0f} times"


def _rate(rate: FMRAtScore | None, curve: FMRCurve | None) -> dict[str, Any] | None:
    if rate is None or curve is None:
        return None
    return rate._asdict() | {
        "smallest_resolved": curve.smallest,
        "impostor_pairs": curve.pairs,
        "people": curve.people,
        "domains": list(curve.domains),
    }


def features_of_faces(model: XCosModel, faces: Sequence[np.ndarray]) -> Any:
    """Grid features [N, C, H, W] of aligned crops, on the model's device, without gradients."""
    import torch

    with torch.no_grad():
        return model.features(model.preprocessing(list(faces)).to(module_device(model)))


def explain(
    model: XCosModel | OnnxModel,
    a: np.ndarray,
    b: np.ndarray,
    *,
    threshold: float | None = None,
    names: tuple[str, str] = ("A", "B"),
    landmarks_a: np.ndarray | None = None,
    landmarks_b: np.ndarray | None = None,
    details: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
    file: str | None = None,
) -> Explanation:
    """Why a model says what it says about two faces.

    >>> import xcos_ext
    >>> face = np.full((112, 112, 3), 90, np.uint8)
    >>> explanation = explain(xcos_ext.load_model(), face, face)
    >>> explanation.verdict, round(explanation.score, 3), explanation.identical
    ('same person', 1.0, 'pictures')
    >>> page = explanation.to_html()

    Args:
        model: in evaluation mode; of any kind of attention. Or a pair graph, which needs no torch.
        a: the first aligned face, uint8 RGB [height, width, 3] of the size that the model expects.
        b: the second.
        threshold: instead of the model's: the same person if score >= threshold.
        names: of the two pictures.
        landmarks_a: five points of A in the crop [5, 2], for the parts of the face, in the order of
            :data:`xcos_ext.faces.ARCFACE_TEMPLATE`, which they are by default. Left is the picture's.
        landmarks_b: of B. Where both are given, their mean decides.
        details: what else is known of the pictures, for JSON and the page.
        file: that the model was loaded from.

    Returns:
        :class:`Explanation`; ``.figure()``, ``.to_html()``, ``.to_json()``.

    Raises:
        TypeError: something else than a model, or a face that is not a uint8 array, or has a mask.
        ValueError: a face of another shape, landmarks that no upright face has in that order, a model in training
            mode, or one that gives values that are not finite.
    """
    if not hasattr(model, "preprocessing"):
        raise TypeError(f"model: expected an XCosModel or an OnnxModel, got {type(model).__name__}")
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call .eval() first")
    size = model.preprocessing.size
    refuse_masked(a=a, b=b)
    for argument, face in (("a", a), ("b", b)):
        if not isinstance(face, np.ndarray) or face.dtype != np.uint8:
            raise TypeError(
                f"{argument}: expected an aligned face, uint8 RGB, got {getattr(face, 'dtype', type(face).__name__)}"
                f"{picture_hint(face)}"
            )
        if face.shape != (*size, 3):
            raise ValueError(f"{argument}: expected an aligned face [{size[0]}, {size[1]}, 3], got {list(face.shape)}")
    if len(several(names, "names", ordered=True)) != 2:
        raise ValueError(f"names: expected two, of a and b, got {len(names)}")
    chosen = check_threshold(threshold)
    points = [
        None if p is None else checked_landmarks(p, f"landmarks_{which}", upright=True)
        for which, p in (("a", landmarks_a), ("b", landmarks_b))
    ]
    sides = (Face(a, names[0], points[0], details[0]), Face(b, names[1], points[1], details[1]))
    return _explained(model, [sides], chosen, ModelCard.of(model, file))[0]


def explain_pairs(
    model: XCosModel | OnnxModel,
    pairs: Sequence[tuple[AlignedFace, AlignedFace]],
    threshold: float | None = None,
    file: str | None = None,
) -> list[Explanation]:
    """:func:`explain` for many pairs at once; every face goes through the network once.

    Args:
        model, threshold, file: as of :func:`explain`.
        pairs: of faces of the size that the model expects.

    Raises:
        ValueError: as :func:`explain`.
    """
    made: dict[int, Face] = {}
    for face in (face for pair in pairs for face in pair):
        if id(face) not in made:
            made[id(face)] = Face(face.rgb, face.name, face.landmarks_in_crop, face.as_dict())
    sides = [(made[id(a)], made[id(b)]) for a, b in pairs]
    return _explained(model, sides, check_threshold(threshold), ModelCard.of(model, file))


def _explained(
    model: XCosModel | OnnxModel, pairs: Sequence[tuple[Face, Face]], threshold: float | None, card: ModelCard
) -> list[Explanation]:
    if not pairs:
        return []
    crops: dict[int, Any] = {id(face): face.rgb for pair in pairs for face in pair}
    if isinstance(model, OnnxModel):
        results = [model.compare(crops[id(a)], crops[id(b)]) for a, b in pairs]
        scores, similarity, attention = (np.concatenate([maps[i] for maps, _ in results]) for i in range(3))
        exchanged = [other for _, other in results]
        eps, alike = float(np.finfo(np.float32).eps), [False] * len(pairs)  # a graph does not give the features
    else:
        import torch

        number = {key: i for i, key in enumerate(crops)}
        features = features_of_faces(model, list(crops.values()))
        first, second = (features[[number[id(pair[side])] for pair in pairs]] for side in (0, 1))
        with torch.no_grad():
            # (A, B) and (B, A) in one call: for a model whose attention depends on the order.
            result = model.score(torch.cat([first, second]), torch.cat([second, first]), return_maps=True)
        values = result.score.double().cpu().numpy()
        scores, exchanged = values[: len(pairs)], values[len(pairs) :].tolist()
        similarity, attention = (part[: len(pairs)].double().cpu().numpy() for part in result[1:])
        eps, alike = float(torch.finfo(result.score.dtype).eps), (first == second).flatten(1).all(1).tolist()
    return [
        Explanation(
            similarity[i],
            attention[i],
            float(scores[i]),
            model.threshold if threshold is None else threshold,
            a,
            b,
            card,
            curve=model.fmr_curve,
            given=threshold is not None,
            identical="pictures" if np.array_equal(crops[id(a)], crops[id(b)]) else "features" if alike[i] else None,
            exchanged=exchanged[i] if math.isfinite(exchanged[i]) else None,
            eps=eps,
        )
        for i, (a, b) in enumerate(pairs)
    ]
