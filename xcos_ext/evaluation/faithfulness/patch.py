"""Decision-patch replacement (Patch-LFW): the cells that a map says decide are taken from another picture.

Of a genuine pair, the first cells of the similar map are replaced in A by an impostor's; of an impostor pair, the first
cells of the dissimilar map by those of another photograph of B's person (A and B change places where only A's person
has one). A map that names the cells that decide turns
verdicts with few of them. Counted are pairs whose verdict was right to begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xcos_ext.evaluation.verification import eer
from xcos_ext.explain.explainers.interface import Explainer, PairModel

from .faces import Drawn, Faces, normalised
from .models import device_of, explained, grid_of, remembering
from .ranking import ranks
from .regions import Blend, paste
from .resolution import to_cells
from .statistics import Curve, Estimator, mean_curve

__all__ = ["STEPS", "Patch", "PatchRow", "patch_replacement"]

#: Cells replaced, of 49; other grids take the same shares.
STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 49)

Tick = Callable[[int, int], None]


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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        data = {"explainer": self.explainer, "pairs": self.pairs}
        return data | {"flips": self.flips.as_dict(), "change": self.change.as_dict()}


@dataclass(frozen=True)
class Patch:
    """All rows.

    Attributes:
        rows: per explainer: genuine, impostor, all.
        steps: numbers of cells replaced.
        cells: of the grid.
        threshold: of the equal error rate on the untouched pairs.
        genuine, impostor: pairs drawn.
        right: of them, those whose verdict was right.
        passed_over: pairs left out for want of a picture or a donor.
        unit: what the intervals' bootstrap draws.
    """

    rows: tuple[PatchRow, ...]
    steps: tuple[int, ...]
    cells: int
    threshold: float
    genuine: int
    impostor: int
    right: int
    passed_over: int
    unit: str

    def find(self, explainer: str, pairs: str = "all") -> PatchRow:
        """One row.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.explainer, row.pairs) == (explainer, pairs):
                return row
        raise KeyError((explainer, pairs))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        names = ("cells", "threshold", "genuine", "impostor", "right", "passed_over", "unit")
        data = {name: getattr(self, name) for name in names} | {"steps": list(self.steps)}
        return data | {"rows": [row.as_dict() for row in self.rows]}


@torch.no_grad()
def patch_replacement(
    model: PairModel,
    explainers: Sequence[Explainer],
    faces: Faces,
    *,
    pairs: int = 60,
    blend: Blend = "hard",
    match_colour: bool = False,
    seed: int = 0,
    replicates: int = 1000,
    batch_size: int = 32,
    tick: Tick | None = None,
) -> Patch:
    """Replace the cells that a map names first, and count the verdicts that turn.

    Args:
        model: whose decisions are explained.
        explainers: with the controls.
        faces: with people.
        pairs: of each kind, genuine and impostor.
        blend, match_colour: see :func:`~.regions.paste`.
        seed: of the draw, and of the order of equal values.
        replicates: for the intervals; 0 for none. The threshold stays fixed in them.
        batch_size: pairs at once.
        tick: called with (pictures scored, pictures in all).

    Raises:
        TooFewError: fewer pairs of a kind than asked for, none that has donors, or people unknown.
        ValueError: no verdict was right, or a map that is not finite.
    """
    faces.need_people("patch replacement")
    rng = np.random.default_rng(seed)

    def impostor(pair: Drawn) -> Drawn | None:
        donor = faces.stranger((faces.person(pair.a),), rng)
        return None if donor is None else pair._replace(donor=donor)

    first, passed = faces.draw(True, pairs, rng, impostor)
    second, also = faces.draw(False, pairs, rng, lambda pair: faces.with_relative(pair, rng))
    found = [*first, *second]
    genuine = np.arange(len(found)) < len(first)
    # A batch is of one kind: one map is asked in it.
    blocks = [
        slice(start, min(start + batch_size, stop))
        for begin, stop in ((0, len(first)), (len(first), len(found)))
        for start in range(begin, stop, batch_size)
    ]
    grid, device, preprocessing = grid_of(model), device_of(model), model.preprocessing
    cells = grid[0] * grid[1]
    steps = tuple(dict.fromkeys(round(step * cells / STEPS[-1]) for step in STEPS))
    model = remembering(model)
    scores = np.empty(len(found))
    after = {explainer.name: np.empty((len(found), len(steps))) for explainer in explainers}
    generator = torch.Generator().manual_seed(seed)
    done, total = 0, len(found) * len(explainers) * (len(steps) - 1)
    for block in blocks:
        part = found[block]
        pictures, others, donors = (
            faces.stacked(keys) for keys in ([p.a for p in part], [p.b for p in part], [p.donor or p.a for p in part])
        )
        a, b = (normalised(preprocessing, p, device) for p in (pictures, others))
        enrolled = model.features(b)
        scores[block] = model.score(model.features(a), enrolled).double().cpu().numpy()
        for explainer in explainers:
            maps = explained(explainer, model, a, b)[0 if genuine[block.start] else 1]
            places = ranks(to_cells(maps, grid), generator).view(-1, *grid).cpu()
            values = after[explainer.name]
            values[block, 0] = scores[block]
            for column, step in list(enumerate(steps))[1:]:
                changed = paste(pictures, donors, places < step, blend=blend, match_colour=match_colour).images
                features = model.features(normalised(preprocessing, changed, device))
                values[block, column] = model.score(features, enrolled).double().cpu().numpy()
                done += len(part)
                if tick is not None:
                    tick(done, total)
    threshold = eer(scores, genuine).threshold
    right = (scores >= threshold) == genuine
    if not right.any():
        raise ValueError("pairs: no verdict on the untouched pairs is right, so none can be turned")
    estimator = Estimator(len(found), faces.ids(found), replicates=replicates, seed=seed)
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
        tuple(rows), steps, cells, threshold, len(first), len(second), int(right.sum()), passed + also, estimator.unit
    )
