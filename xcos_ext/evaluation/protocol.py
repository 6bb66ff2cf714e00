"""Verification of a model on a list of pairs, or of a training on its parts: scores in several forms, figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xcos_ext.backbones import Recogniser
from xcos_ext.faces.detector import Detector
from xcos_ext.io.errors import PictureError
from xcos_ext.io.several import several
from xcos_ext.model import XCosModel

from .bootstrap import Resampling, bootstrap
from .datasets import PairList
from .figures import Interval, plain
from .scoring import ATTENTIONS, Scores, Track, crops, extractor, score_pairs, scorers_of
from .verification import VerificationReport, verification

__all__ = ["Evaluation", "Variant", "corr_attention", "evaluate"]

Floats = NDArray[np.float64]


def corr_attention(similarity: Floats, target: Floats) -> Floats:
    """The fixed attention "corr": Pearson correlation of each cell's similarity with a target cosine, normalised.

    Cells that do not correlate, or correlate negatively, get no weight.

    >>> corr_attention(np.array([[0.1, 0.9], [0.4, 0.1], [0.8, 0.3]]), np.array([0.2, 0.5, 0.9])).round(3).tolist()
    [1.0, 0.0]

    Args:
        similarity: S of pairs [N, cells].
        target: cosine of the same pairs [N].

    Returns:
        [cells], non-negative, summing to 1.

    Raises:
        ValueError: other shapes, no pairs, or no cell that correlates.
    """
    if similarity.ndim != 2 or target.shape != similarity.shape[:1] or not target.size:
        got = f"{list(similarity.shape)} and {list(target.shape)}"
        raise ValueError(f"similarity, target: expected [N, cells] and [N] of at least one pair, got {got}")
    s, t = similarity - similarity.mean(0), target - target.mean()
    scale = np.sqrt((s**2).sum(0) * (t @ t))
    weights = np.clip(np.divide(t @ s, scale, out=np.zeros_like(scale), where=scale > 0), 0, None)
    total = weights.sum()
    if not total > 0:
        raise ValueError("corr: no cell's similarity correlates with the target cosine")
    return weights / total


@dataclass(frozen=True)
class Variant:
    """One way of scoring, and its figures.

    Attributes:
        name: a key of :data:`ATTENTIONS`, or ``"teacher"``.
        scores: [N]; pairs that failed have a score below all others.
        report: the figures.
        intervals: figure -> confidence interval; empty without bootstrap.
        correlation: of the scores with the teacher's cosine over the pairs that could be scored, or None.
        attention: for ``corr``, mean over folds [H, W]; else None.
    """

    name: str
    scores: Floats
    report: VerificationReport
    intervals: dict[str, Interval]
    correlation: float | None = None
    attention: Floats | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; without the scores."""
        more: dict[str, Any] = {"intervals": self.intervals, "teacher_correlation": self.correlation}
        if self.attention is not None:
            more["attention"] = self.attention
        return self.report.as_dict() | plain(more)


@dataclass(frozen=True)
class Evaluation:
    """A model on a list of pairs.

    Attributes:
        variants: name -> figures, in the order asked for; the teacher last.
        genuine: bool [N], of the pairs.
        failures: pictures that could not be enrolled -> why.
        failed: bool [N], pairs with such a picture. They count as rejected at every threshold (ISO/IEC 19795-1's
            generalised rates): a genuine one as a false non-match, an impostor one as rightly rejected.
        resampling: what the intervals come from, or None.
        corr_target: where the cosine for ``corr`` came from: ``"teacher"``, ``"embedding"`` or None.
        several: pictures with more than one face, of which the most prominent was taken -> how many.
    """

    variants: dict[str, Variant]
    genuine: NDArray[np.bool_]
    failures: dict[str, str]
    failed: NDArray[np.bool_]
    resampling: Resampling | None
    corr_target: str | None
    several: dict[str, int]


def evaluate(
    model: XCosModel | Iterable[tuple[XCosModel, PairList]],
    pairs: PairList | None = None,
    *,
    attentions: Sequence[str] = ("own",),
    teacher: Recogniser | None = None,
    detector: Detector | None = None,
    flip: bool = False,
    fmrs: Sequence[float] = (1e-1, 1e-2, 1e-3),
    replicates: int = 1000,
    batch_size: int = 32,
    track: Track | None = None,
) -> Evaluation:
    """Score a list of pairs in several forms and compute every figure.

    Cross-validation: several models, each with the pairs whose people it has never seen. Figures are then of all pairs
    together: what is reported is the training, not one model. ``corr`` is estimated on the other folds' pairs,
    whichever model scored them.

    >>> from types import SimpleNamespace
    >>> crops = {key: np.random.default_rng(ord(key)).integers(0, 256, (112, 112, 3), np.uint8) for key in "abcd"}
    >>> pairs = PairList([("a", "b"), ("c", "d")], [True, False], pictures=SimpleNamespace(read=crops.get))
    >>> from torch.nn import AvgPool2d
    >>> from xcos_ext.model import XCosHead
    >>> model = XCosModel(AvgPool2d(16), XCosHead(3, 8, attention="norm")).eval()
    >>> evaluate(model, pairs, replicates=0).variants["own"].scores.shape
    (2,)

    Args:
        model: any model, in evaluation mode; or models with their pairs, of which one is looked at at a time, so they
            may be loaded on the way. A fold is with one model only.
        pairs: the list; None where the models come with theirs.
        attentions: keys of :data:`ATTENTIONS`.
        teacher: a recogniser whose plain cosine is a row of its own and is correlated with; in evaluation mode.
        detector: finds and aligns the faces; None: the pictures are aligned crops.
        flip: test-time augmentation: the feature of the mirrored picture, mirrored back in width, is averaged in
            (the teacher's embeddings are added).
        fmrs: false match rates of the operating points.
        replicates: of the bootstrap; 0 for none.
        batch_size: pictures per forward pass.
        track: as in :func:`score_pairs`.

    Returns:
        :class:`Evaluation`, pairs in the order of the list, or of the lists.

    Raises:
        PictureError: there is no genuine or no impostor pair, or none is left for pictures that could not be enrolled.
        ValueError: an unknown attention, ``corr`` without a target or with a single fold, pairs too few to be
            resampled, scores that are not finite, no models, or a fold with two of them.
        TypeError: no list of pairs.
    """
    attentions = tuple(dict.fromkeys(several(attentions, "attentions")))
    several(fmrs, "fmrs", "numbers")
    unknown = [name for name in attentions if name not in ATTENTIONS]
    if unknown or not attentions:
        raise ValueError(f"attentions: expected some of {', '.join(ATTENTIONS)}, got {', '.join(unknown) or 'none'}")
    if isinstance(model, XCosModel):
        if not isinstance(pairs, PairList):
            raise TypeError(f"pairs: expected a PairList, got {type(pairs).__name__}")
        # Before the work, not after it.
        _check_folds(attentions, pairs.folds)
        _check_kinds(pairs.genuine)
        if replicates:
            for _ in Resampling(len(pairs), _people([pairs])).of_both_kinds(pairs.genuine, replicates):
                pass
        model = [(model, pairs)]
    lists: list[PairList] = []
    found: list[Scores] = []
    several_faces: dict[str, int] = {}
    target: str | None = None
    for scorer, part in model:
        shared = [fold for other in lists for fold in np.intersect1d(other.folds, part.folds)]
        if shared:
            raise ValueError(f"parts: expected every fold in one part, got fold {shared[0]} in several")
        recogniser, target = _embedding(scorer, teacher, attentions)
        extract, scorers = extractor(scorer, recogniser, flip), scorers_of(scorer, attentions, recogniser is not None)
        read = crops(part, detector, scorer.preprocessing.size, several_faces)
        lists.append(part)
        found.append(score_pairs(part, extract, scorers, read=read, batch_size=batch_size, track=track))
    if not lists:
        raise ValueError("parts: expected at least one model with its pairs, got none")
    genuine, folds = (np.concatenate([getattr(part, name) for part in lists]) for name in ("genuine", "folds"))
    _check_folds(attentions, folds)
    scored = _joined(found, genuine)
    good, cosine = ~scored.failed, scored.values.get("teacher")
    resampling = Resampling(genuine.size, _people(lists)) if replicates else None

    def variant(name: str) -> Variant:
        values, by_fold, attention = scored.values[name], None, None
        if name == "corr":
            assert cosine is not None
            values, by_fold, attention = _corr(values, cosine, good, folds)
            by_fold = _rejected(by_fold, scored.failed)
        final, tested = _rejected(values, scored.failed), folds if np.unique(folds).size > 1 else None
        report = verification(final, genuine, tested, fold_scores=by_fold, fmrs=fmrs)
        intervals = {}
        if resampling is not None:
            intervals = bootstrap(
                final, genuine, resampling, tested, fold_scores=by_fold, fmrs=fmrs, replicates=replicates
            )
        correlation = None
        if teacher is not None and cosine is not None:
            correlation = _correlation(values[good], cosine[good])
        return Variant(name, final, report, intervals, correlation, attention)

    return Evaluation(
        {name: variant(name) for name in (*attentions, *(["teacher"] if teacher is not None else []))},
        genuine,
        scored.failures,
        scored.failed,
        resampling,
        target if "corr" in attentions else None,
        several_faces,
    )


def _check_folds(attentions: Sequence[str], folds: NDArray[np.int64]) -> None:
    if "corr" in attentions and np.unique(folds).size < 2:
        raise ValueError("corr: its weights are estimated on the other folds, and these pairs have a single one")


def _check_kinds(genuine: NDArray[np.bool_], why: str | None = None) -> None:
    if np.unique(genuine).size < 2:
        reason = why or f"{int(genuine.sum())} of {genuine.size} pairs are genuine"
        raise PictureError(f"no genuine or no impostor pair can be scored: {reason}")


def _embedding(
    model: XCosModel, teacher: Recogniser | None, attentions: Sequence[str]
) -> tuple[Recogniser | None, str | None]:
    """Whose plain cosine is needed, if anybody's, and what it is called as the target of ``corr``."""
    own = model.backbone
    if teacher is not None:
        return teacher, "teacher"
    if "corr" not in attentions:
        return None, None
    if not isinstance(own, Recogniser) or own.embedding_size is None:
        raise ValueError("corr: the model has no embedding of its own to correlate with; give a teacher")
    return own, "embedding"


def _joined(parts: Sequence[Scores], genuine: NDArray[np.bool_]) -> Scores:
    """The scores of all parts, if they can be used."""
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
    failures = {key: why for part in parts for key, why in part.failures.items()}
    failed = np.concatenate([part.failed for part in parts])
    _check_kinds(genuine[~failed], next(iter(failures.values()), None))
    for name, found in values.items():
        bad = int((~np.isfinite(found[~failed])).sum())
        if bad:
            raise ValueError(f"{name}: {bad} scores are NaN or infinite")
    return Scores(values, failures, failed)


def _corr(similarity: Floats, cosine: Floats, good: NDArray[np.bool_], folds: NDArray[np.int64]) -> tuple[Floats, ...]:
    """Scores [N] with the weights from the other folds, those [K, N] with each fold's weights, the mean weights."""
    cells = similarity.reshape(len(similarity), -1)
    names, fold = np.unique(folds, return_inverse=True)
    trained = [good & (folds != name) for name in names]
    weights = [corr_attention(cells[train], cosine[train]) for train in trained]
    by_fold = np.stack([cells @ row for row in weights])
    return by_fold[fold, np.arange(fold.size)], by_fold, np.mean(weights, 0).reshape(similarity.shape[1:])


def _rejected(values: Floats, failed: NDArray[np.bool_]) -> Floats:
    """Scores [..., N] with failed pairs below all others."""
    return np.where(failed, values[..., ~failed].min() - 1, values)


def _people(lists: Sequence[PairList]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """The two people of every pair of all lists, as numbers; None where a list does not say."""
    named = []
    for pairs in lists:
        if pairs.people is None:
            return None
        people = np.array(pairs.people)
        named.append(np.stack((people[pairs.first], people[pairs.second])))
    _, ids = np.unique(np.concatenate(named, 1), return_inverse=True)
    first, second = ids.reshape(2, -1)
    return first, second


def _correlation(a: Floats, b: Floats) -> float | None:
    """Pearson's, or None where one side is constant."""
    return None if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])
