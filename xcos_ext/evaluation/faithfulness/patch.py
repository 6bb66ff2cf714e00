"""Decision-patch replacement (Patch-LFW): the cells that a map says decide are taken from another picture.

Of a genuine pair, the first cells of the similar map are replaced in A by an impostor's; of an impostor pair, the first
cells of the dissimilar map by those of another photograph of B's person (A and B change places where only A's person
has one). A map that names the cells that decide turns verdicts with few of them. Counted are pairs whose verdict was
right to begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from xcos_ext.evaluation.verification import eer
from xcos_ext.explain.explainers.interface import Explainer
from xcos_ext.io.several import several

from .maps import Curve, explained, mean_curve, ranks, to_cells
from .pasting import paste
from .study import Results, Study

__all__ = ["Patch", "PatchRow", "patch_replacement"]

# Cells replaced, of 49; other grids take the same shares.
_STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 49)


@dataclass(frozen=True)
class PatchRow:
    """One explainer on one kind of pairs.

    Attributes:
        explainer: its name.
        pairs: ``"genuine"``, ``"impostor"``, or ``"all"``.
        flips: share of the verdicts that turned, over the share of the cells replaced; its area times 100, larger is
            better.
        change: mean change of the score towards the other verdict.
    """

    explainer: str
    pairs: str
    flips: Curve
    change: Curve


@dataclass(frozen=True)
class Patch(Results[PatchRow]):
    """All figures: per explainer a row of genuine, of impostor and of all pairs.

    Attributes:
        threshold: of the equal error rate on the untouched pairs.
        genuine, impostor: pairs drawn.
        right: of them, those whose verdict was right.
        passed_over: pairs left out for want of a picture or a donor.
    """

    threshold: float
    genuine: int
    impostor: int
    right: int
    passed_over: int

    usual: ClassVar = {"pairs": "all"}


@torch.no_grad()
def patch_replacement(study: Study, explainers: Sequence[Explainer]) -> Patch:
    """Replace the cells that a map names first, and count the verdicts that turn.

    Args:
        study: of the settings, count, blend, match_colour, seed, replicates and batch_size are used.

    Raises:
        TooFewError: fewer pairs of a kind than asked for, none that has donors, or people unknown.
        ValueError: no verdict was right, or a map that is not finite.
    """
    study.faces.need_people("patch replacement")
    several(explainers, "explainers", "explainers")
    asked, faces, rng = study.settings, study.faces, np.random.default_rng(study.settings.seed)
    (first, passed), (second, also) = (
        faces.draw(same, study.count(), rng, partial(faces.with_donor, genuine=same, rng=rng)) for same in (True, False)
    )
    found = [*first, *second]
    genuine = np.arange(len(found)) < len(first)
    grid = study.grid
    cells = grid[0] * grid[1]
    steps = tuple(dict.fromkeys(round(step * cells / _STEPS[-1]) for step in _STEPS))
    scores = np.empty(len(found))
    after = {explainer.name: np.empty((len(found), len(steps))) for explainer in explainers}
    study.begin(len(found) * len(explainers) * (len(steps) - 1))
    for block in study.blocks(len(first), len(second)):
        part = found[block]
        pictures, donors = (faces.stacked(keys) for keys in ([p.a for p in part], [p.donor or p.a for p in part]))
        a, b = study.normalised(pictures), study.pictures([p.b for p in part])
        enrolled = study.model.features(b)
        scores[block] = study.scores(a, enrolled)
        for explainer in explainers:
            maps = explained(explainer, study.model, a, b)[0 if genuine[block.start] else 1]
            places = ranks(to_cells(maps, grid), study.generator).view(-1, *grid).cpu()
            values = after[explainer.name][block]
            values[:, 0] = scores[block]
            for column, step in list(enumerate(steps))[1:]:
                made = paste(pictures, donors, places < step, blend=asked.blend, match_colour=asked.match_colour)
                values[:, column] = study.scores(study.normalised(made.images), enrolled)
                study.advance(len(part))
    threshold = eer(scores, genuine).threshold
    right = (scores >= threshold) == genuine
    if not right.any():
        raise ValueError("pairs: no verdict on the untouched pairs is right, so none can be turned")
    estimator = study.estimator(found)
    towards = np.where(genuine, -1.0, 1.0)[:, None]
    levels = [step / cells for step in steps]
    rows = []
    for name, values in after.items():
        flips = ((values >= threshold) != genuine[:, None]).astype(np.float64)
        change = towards * (values - scores[:, None])
        for kind, which in (("genuine", genuine), ("impostor", ~genuine), ("all", np.ones_like(genuine))):
            used = (right & which)[:, None]
            if used.any():
                both = [mean_curve(levels, np.where(used, v, np.nan), estimator) for v in (flips, change)]
                rows.append(PatchRow(name, kind, both[0], both[1]))
    return Patch(
        tuple(rows),
        estimator.unit,
        threshold=threshold,
        genuine=len(first),
        impostor=len(second),
        right=int(right.sum()),
        passed_over=passed + also,
    )
