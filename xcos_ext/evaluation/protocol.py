"""Verification of a model on a list of pairs, or of a training on its parts: scores in several forms, figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xcos_ext.backbones import Recogniser
from xcos_ext.faces.detector import Detector
from xcos_ext.io.errors import PictureError
from xcos_ext.model import XCosModel

from .bootstrap import Resampling, bootstrap
from .datasets import PairList
from .figures import Interval, plain
from .scoring import ATTENTIONS, Scores, Track, crops, extractor, score_pairs, scorers_of
from .verification import VerificationReport, verification

__all__ = ["Evaluation", "Variant", "corr_attention", "evaluate"]


def corr_attention(similarity: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The fixed attention "corr": Pearson correlation of each cell's similarity with a target cosine, normalised.

    Cells that do not correlate, or correlate negatively, get no weight.

    Args:
        similarity: S of pairs [N, cells].
        target: cosine of the same pairs [N].

    Returns:
        [cells], non-negative, summing to 1.

    Raises:
        ValueError: no cell correlates.
    """
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
    scores: NDArray[np.float64]
    report: VerificationReport
    intervals: dict[str, Interval]
    correlation: float | None = None
    attention: NDArray[np.float64] | None = None

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
    """

    variants: dict[str, Variant]
    genuine: NDArray[np.bool_]
    failures: dict[str, str]
    failed: NDArray[np.bool_]
    resampling: Resampling | None
    corr_target: str | None


def _rejected(values: NDArray[np.float64], failed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Scores [..., N] with failed pairs below all others."""
    lowest = values[..., ~failed].min() - 1
    return np.where(failed, lowest, values)


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
        PictureError: so many pictures could not be enrolled that no genuine or no impostor pair is left.
        ValueError: an unknown attention, ``corr`` without a target or with a single fold, scores that are not finite,
            no models, or a fold with two of them.
    """
    parts: Iterable[tuple[XCosModel, PairList]]
    if isinstance(model, XCosModel):
        if pairs is None:
            raise ValueError("pairs: expected a list for the model, got none")
        _check_folds(attentions, pairs.folds)  # before the work, not after it
        parts = [(model, pairs)]
    else:
        parts = model
    attentions = tuple(dict.fromkeys(attentions))
    unknown = [name for name in attentions if name not in ATTENTIONS]
    if unknown or not attentions:
        raise ValueError(f"attentions: expected some of {', '.join(ATTENTIONS)}, got {', '.join(unknown) or 'none'}")
    lists: list[PairList] = []
    found: list[Scores] = []
    target: str | None = None
    grid: tuple[int, int] = (0, 0)
    for scorer, part in parts:
        shared = [fold for other in lists for fold in np.intersect1d(other.folds, part.folds)]
        if shared:
            raise ValueError(f"parts: expected every fold in one part, got fold {shared[0]} in several")
        recogniser, target = teacher, None if teacher is None else "teacher"
        if "corr" in attentions:
            own = scorer.backbone
            if recogniser is None and isinstance(own, Recogniser) and own.embedding_size is not None:
                recogniser, target = own, "embedding"
            if recogniser is None:
                raise ValueError("corr: the model has no embedding of its own to correlate with; give a teacher")
        lists.append(part)
        grid = _grid(scorer)
        found.append(
            score_pairs(
                part,
                extractor(scorer, recogniser, flip),
                scorers_of(scorer, attentions, recogniser is not None),
                read=crops(part, detector, scorer.preprocessing.size),
                batch_size=batch_size,
                track=track,
            )
        )
    if not lists:
        raise ValueError("parts: expected at least one model with its pairs, got none")
    scored = Scores(
        {name: np.concatenate([part.values[name] for part in found]) for name in found[0].values},
        {key: why for part in found for key, why in part.failures.items()},
        np.concatenate([part.failed for part in found]),
    )
    genuine, all_folds = (np.concatenate([getattr(part, name) for part in lists]) for name in ("genuine", "folds"))
    names = _check_folds(attentions, all_folds)
    good = ~scored.failed
    if not (good & genuine).any() or not (good & ~genuine).any():
        reason = next(iter(scored.failures.values()), "the list has pairs of one kind only")
        raise PictureError(f"no genuine or no impostor pair can be scored: {reason}")
    for name, values in scored.values.items():
        bad = int((~np.isfinite(values[good])).sum())
        if bad:
            raise ValueError(f"{name}: {bad} scores are NaN or infinite")
    resampling = Resampling(genuine.size, _people(lists)) if replicates else None
    cosine = scored.values.get("teacher")

    def variant(name: str) -> Variant:
        values, by_fold, attention = scored.values[name], None, None
        if name == "corr":
            assert cosine is not None
            maps = []
            by_fold = np.empty((names.size, genuine.size))
            for row, fold in zip(by_fold, names, strict=True):
                train = good & (all_folds != fold)
                maps.append(corr_attention(values[train], cosine[train]))
                row[:] = values @ maps[-1]
            values = by_fold[np.searchsorted(names, all_folds), np.arange(genuine.size)]
            by_fold = _rejected(by_fold, scored.failed)
            attention = np.mean(maps, 0).reshape(grid)
        final = _rejected(values, scored.failed)
        folds = all_folds if names.size > 1 else None
        report = verification(final, genuine, folds, fold_scores=by_fold, fmrs=fmrs)
        intervals = {}
        if resampling is not None:
            intervals = bootstrap(
                final, genuine, resampling, folds, fold_scores=by_fold, fmrs=fmrs, replicates=replicates
            )
        correlation = None
        if teacher is not None and cosine is not None:
            correlation = _correlation(values[good], cosine[good])
        return Variant(name, final, report, intervals, correlation, attention)

    shown = [*attentions, *(["teacher"] if teacher is not None else [])]
    return Evaluation(
        {name: variant(name) for name in shown},
        genuine,
        scored.failures,
        scored.failed,
        resampling,
        target if "corr" in attentions else None,
    )


def _check_folds(attentions: Sequence[str], folds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The folds, each once."""
    names = np.unique(folds)
    if "corr" in attentions and names.size < 2:
        raise ValueError("corr: its weights are estimated on the other folds, and these pairs have a single one")
    return names


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


def _grid(model: XCosModel) -> tuple[int, int]:
    height, width = model.preprocessing.size
    if isinstance(model.backbone, Recogniser):
        return model.backbone.grid_shape[1:]
    with torch.no_grad():
        shape = model.features(torch.zeros(1, 3, height, width, device=next(model.parameters()).device)).shape
    return shape[2], shape[3]


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Pearson's, or None where one side is constant."""
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
