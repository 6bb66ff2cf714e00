"""One pair, and what several explainers say about it, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xcos_ext.explain.plotting import FAINT, INK, RDBU, bare_axes, check_face, colour_map, new_figure
from xcos_ext.io.optional import need
from xcos_ext.io.several import several

from .interface import Saliency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["explainers_figure"]

_ROWS = ("similar", "dissimilar")
_SHOWN = 50  # per cent: the half of the face that a map ranks lower stays without colour


def explainers_figure(
    face_a: np.ndarray,
    face_b: np.ndarray,
    maps: Mapping[str, Saliency],
    *,
    names: tuple[str, str] = ("A", "B"),
    heading: str = "",
    note: str = "",
) -> Figure:
    """Draw the maps of one pair over face A.

    Explainers share nothing but the order of a map's values, so colours show ranks: the share of the face that a map
    ranks lower than a place. The upper half is coloured, blue where A is like B, red where it is not (ColorBrewer's
    RdBu, which stays apart under colour blindness); places of equal value share the middle of their ranks.

    >>> face, cells = np.zeros((112, 112, 3), np.uint8), np.eye(7)
    >>> figure = explainers_figure(face, face, {"mine": Saliency(cells, -cells)})
    >>> [axes.get_title() for axes in figure.axes if axes.get_title()]
    ['mine']

    Args:
        face_a: the face that is explained, uint8 RGB [height, width, 3].
        face_b: the one it is compared with.
        maps: label -> maps of this one pair, [1, h, w] or [h, w], of pixels or cells; at least one.
        names: of the pictures.
        heading: above all, e.g. the score.
        note: a small line at the bottom.

    Returns:
        A figure on the Agg canvas; write it with :func:`xcos_ext.explain.save_figure`.

    Raises:
        MissingPackageError: matplotlib or SciPy is not installed.
        ValueError: other shapes or types, no maps, or values that are not finite.
    """
    for name, face in (("face_a", face_a), ("face_b", face_b)):
        check_face(name, face)
    several(names, "names")
    if not maps:
        raise ValueError("maps: expected at least one explainer's, got none")
    ranks = {
        label: [_ranks(label, kind, made) for kind, made in zip(_ROWS, both, strict=True)]
        for label, both in maps.items()
    }
    panel, gap, right, bottom = 1.5, 0.1, 0.15, 0.75
    top = 0.58 if heading else 0.24
    width = max((len(ranks) + 1) * (panel + gap) + gap + right, 4.9)
    height = 2 * (panel + gap) + top + bottom
    figure = new_figure(width, height)

    def place(row: int, column: int) -> Axes:
        left = gap + column * (panel + gap)
        low = bottom + (1 - row) * (panel + gap)
        return bare_axes(figure, left / width, low / height, panel / width, panel / height)

    size = face_a.shape[:2]
    grey = face_a @ np.array([0.299, 0.587, 0.114])
    half = len(RDBU) // 2
    palettes = (RDBU[half:], RDBU[half::-1])
    for row, face in enumerate((face_a, face_b)):
        axes = place(row, 0)
        axes.imshow(face)
        axes.text(0.03, 0.03, names[row][:24], transform=axes.transAxes, fontsize=8, color="white", parse_math=False,
                  bbox={"facecolor": INK, "edgecolor": "none", "pad": 1.5, "alpha": 0.7})  # fmt: skip
    norm = need("matplotlib.colors", "drawing").Normalize(_SHOWN, 100)
    mappable = need("matplotlib.cm", "drawing").ScalarMappable
    for row, kind in enumerate(_ROWS):
        colours = colour_map(palettes[row])
        for column, (label, both) in enumerate(ranks.items(), 1):
            axes = place(row, column)
            axes.imshow(0.35 * grey + 0.65 * 255, cmap="gray", vmin=0, vmax=255)
            strength = np.clip((both[row] - _SHOWN) / (100 - _SHOWN), 0, 1)
            painted = colours(norm(both[row]))
            painted[..., 3] = 0.85 * np.sqrt(strength)  # so that the face shows where little is marked
            axes.imshow(painted, extent=(-0.5, size[1] - 0.5, size[0] - 0.5, -0.5), interpolation="nearest")
            if row == 0:
                axes.set_title(label, fontsize=9.5, color=INK, parse_math=False)
        legend = figure.add_axes(((gap + 0.1 + row * 2.35) / width, 0.42 / height, 1.9 / width, 0.11 / height))
        bar = figure.colorbar(mappable(norm, colours), cax=legend, orientation="horizontal")
        bar.outline.set_visible(False)
        bar.set_ticks([_SHOWN, 75, 100])
        bar.set_ticklabels(["half", "75 %", "all"])
        legend.tick_params(labelsize=7, length=2, color=FAINT, labelcolor=INK)
        legend.set_title(f"{kind}: ranked above this share of A", fontsize=7, color=INK, loc="left", pad=2)
    for row, kind in enumerate(_ROWS):
        middle = (bottom + (1 - row) * (panel + gap) + panel / 2) / height
        figure.text(1 - 0.06 / width, middle, kind, fontsize=8, color=FAINT, rotation=270, ha="right", va="center")
    if heading:
        figure.text(gap / width, 1 - 0.24 / height, heading, fontsize=11, color=INK, parse_math=False)
    if note:
        figure.text(gap / width, 0.05 / height, note, fontsize=7, color=FAINT, parse_math=False)
    return figure


def _ranks(label: str, kind: str, made: Any) -> NDArray[np.float64]:
    """[h, w]: per cent of the map that lies lower, and half of what is equal."""
    values = np.asarray(made.detach().cpu() if hasattr(made, "detach") else made, np.float64)
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2 or values.size < 1:
        raise ValueError(f"maps: expected [1, h, w] or [h, w], got {list(values.shape)} ({label}, {kind})")
    if not np.isfinite(values).all():
        raise ValueError(f"maps: expected finite values, got NaN or infinite ones ({label}, {kind})")
    if values.size == 1:
        return np.full(values.shape, 50.0)
    ranked = need("scipy.stats", "drawing").rankdata(values.ravel())
    return (100 * (ranked - 1) / (values.size - 1)).reshape(values.shape)
