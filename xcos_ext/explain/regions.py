"""Which part of a face a cell lies on, and what each part did to the score.

The parts are drawn from five landmarks in the crop. Every cell belongs to exactly one part, so the parts' contributions
add up to what the cells' add up to. A cell of a usual backbone sees most of the face (docs/verify.md): a part is the
place whose features agree, not the pixels that they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from xcos_ext.faces.alignment import template_for

__all__ = ["PARTS", "Region", "cell_parts", "summarise"]

#: Parts of a face; left and right are the picture's. ``sides`` are the outer columns: ears, hair and background.
PARTS = ("forehead", "left eye", "right eye", "nose", "left cheek", "right cheek", "mouth", "chin", "sides")

_FEW = 0.5  # of the attention that a part of its size would get if all cells got the same
_FAINT = 0.05  # of what the strongest part contributes


@dataclass(frozen=True)
class Region:
    """One part of the faces in a decision.

    >>> Region("nose", ((2, 3), (3, 3)), 0.7, 0.1, 0.04, "agrees").name
    'nose'

    Attributes:
        name: one of :data:`PARTS`.
        cells: (row, column) of its cells.
        similarity: mean S of its cells.
        share: its share of the attention, sum of W.
        contribution: sum of W * (S - t) of its cells, or of W * S where there is no threshold.
        word: ``"agrees"`` or ``"differs"``: it speaks for or against the same person; ``"counts little"``: by at most
            5 % of what the strongest part does; without a threshold ``"much weight"``, ``"little weight"`` (more than
            twice, less than half of what an even attention would give it) or ``"usual weight"``.
    """

    name: str
    cells: tuple[tuple[int, int], ...]
    similarity: float
    share: float
    contribution: float
    word: str


def cell_parts(
    cells: tuple[int, int], size: tuple[int, int] = (112, 112), landmarks: np.ndarray | None = None
) -> np.ndarray:
    """The part that every cell's middle lies on.

    Lengths are multiples of the distance D between the eyes, along the line through them (u) and down from it (v), with
    the middle of the eyes as origin. Columns beyond 1.2 D are the sides; the forehead ends 0.55 D above the eyes; the
    eyes reach down to a third of the way to the tip of the nose; the nose is 0.3 D to either side, and ends half-way
    between its tip and the mouth; the mouth reaches 0.2 D beyond its corners, and the chin starts as far below the
    mouth as the nose ends above it. On the ArcFace template and 7x7 cells the eyes are rows 2 and 3, the nose rows 2 to
    4 of the middle column. The rule is ours.

    Args:
        cells: rows and columns of the grid.
        size: (height, width) of the crop.
        landmarks: fp64 [5, 2] in the crop, in the order of the ArcFace template, which None stands for.

    Returns:
        int64 [rows, columns], indices into :data:`PARTS`.
    """
    rows, columns = cells
    height, width = size
    points = template_for(size) if landmarks is None else landmarks
    origin = points[:2].mean(0)
    across = points[1] - points[0]
    distance = float(np.hypot(*across))
    axes = np.array([across, [-across[1], across[0]]]) / distance**2  # rows: u, v in units of D
    x = (np.arange(columns) + 0.5) * width / columns - 0.5
    y = (np.arange(rows) + 0.5) * height / rows - 0.5
    u, v = np.einsum("kd,rcd->krc", axes, np.stack(np.meshgrid(x, y), -1) - origin)
    (nose_u, nose_v), (left_u, left_v), (right_u, right_v) = (points[2:] - origin) @ axes.T
    mouth_v = (left_v + right_v) / 2
    nose_end = (nose_v + mouth_v) / 2
    chin = mouth_v + (mouth_v - nose_end)
    eyes_end = nose_v / 3
    found = np.where(u < nose_u, PARTS.index("left cheek"), PARTS.index("right cheek"))

    def mark(name: str, where: np.ndarray) -> None:
        found[where] = PARTS.index(name)

    mark("mouth", (v >= nose_end) & (u > left_u - 0.2) & (u < right_u + 0.2))
    mark("chin", v >= chin)
    mark("left eye", (v < eyes_end) & (u < 0))
    mark("right eye", (v < eyes_end) & (u >= 0))
    # The bridge of the nose runs from between the eyes to the tip.
    bridge = nose_u * np.clip(v / max(nose_v, 1e-6), 0, 1)
    mark("nose", (v < nose_end) & (np.abs(u - bridge) <= 0.3))
    mark("forehead", v < -0.55)
    mark("sides", np.abs(u) > 1.2)
    return found.astype(np.int64)


def summarise(
    similarity: np.ndarray, attention: np.ndarray, contribution: np.ndarray, parts: np.ndarray, *, decided: bool
) -> tuple[Region, ...]:
    """What every part of the faces did to the score.

    Args:
        similarity: S [h, w].
        attention: W [h, w].
        contribution: W * (S - t), or W * S.
        parts: from :func:`cell_parts`.
        decided: whether ``contribution`` is about a threshold.

    Returns:
        In the order of :data:`PARTS`, without parts that no cell lies on.
    """
    chosen = [(name, parts == index) for index, name in enumerate(PARTS) if (parts == index).any()]
    sums = [math.fsum(contribution[where].tolist()) for _, where in chosen]
    strongest = max(map(abs, sums), default=0.0)
    made = []
    for (name, where), value in zip(chosen, sums, strict=True):
        share = math.fsum(attention[where].tolist())
        if decided:
            word = "counts little" if abs(value) <= _FAINT * strongest else "agrees" if value > 0 else "differs"
        else:
            ratio = share / where.mean()
            word = "little weight" if ratio < _FEW else "much weight" if ratio > 1 / _FEW else "usual weight"
        cells = tuple((int(r), int(c)) for r, c in np.argwhere(where))
        made.append(Region(name, cells, float(similarity[where].mean()), share, value, word))
    return tuple(made)
