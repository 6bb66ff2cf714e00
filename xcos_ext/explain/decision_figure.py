"""The picture of one decision: two faces, where they agree, what counted, and how the score came about."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.card.calibration import check_threshold
from xcos_ext.io.optional import need
from xcos_ext.io.text import counted, number, shorten, signed, telling_digits

from .decision import Maps, contribution, one_pair
from .plotting import AGAINST, FAINT, FOR, INK, RDBU, YLGN, Scale, bare_axes, check_face, colour_map, ink, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["verification_figure"]

_GREY = "#8a8a8a"


def verification_figure(
    face_a: np.ndarray | None,
    face_b: np.ndarray | None,
    result: Any,
    threshold: float | None,
    *,
    names: tuple[str, str] = ("A", "B"),
    heading: str | None = None,
    note: str = "",
    meaning: str = "",
) -> Figure:
    """Draw a decision and what it is made of.

    Both faces with the grid of cells; the similarity S, its colours centred on the threshold; the attention
    W; and the signed contribution W * (S - t), which adds up to score - threshold. Without a threshold there is no
    verdict: the colours of S are centred on 0, and the last map is W * S, which adds up to the score.

    >>> result = Maps(0.5, np.array([[0.5, 0.5]]), np.array([[0.5, 0.5]]))
    >>> [text.get_text() for text in verification_figure(None, None, result, 0.3).texts]
    ['same person', 'score 0.500 \u2265 threshold 0.300']

    Args:
        face_a: the first aligned face, uint8 RGB [height, width, 3], or None to leave the faces out.
        face_b: the second.
        result: an ``XCosScore`` of one pair, or anything with ``score``, ``similarity`` and ``attention``.
        threshold: t: the same person if score >= t; None: unknown.
        names: of the two pictures.
        heading: instead of the verdict, e.g. for data that are not faces.
        note: a small line at the bottom: the model, the origin of the data.
        meaning: a small line under the score: what it means, e.g. the false match rate at it.

    Returns:
        A figure on the Agg canvas; write it with :func:`~xcos_ext.explain.save_figure`.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: other shapes or types, values or a threshold that are not finite.
    """
    maps = one_pair(result)
    check_threshold(threshold)
    faces = [face for face in (face_a, face_b) if face is not None]
    if len(faces) == 1:
        raise ValueError("face_a, face_b: expected two faces or none, got one")
    for name, face in zip(("face_a", "face_b"), faces, strict=False):
        check_face(name, face)
    height = 6.95 if faces else 3.95
    figure = new_figure(10.2, height)
    left, width, gap = 0.032, 0.258, 0.071
    inch = 1 / height

    def panel(column: int, bottom: float) -> Axes:
        return bare_axes(figure, left + column * (width + gap), bottom * inch, width, 2.632 * inch)

    cells = maps.similarity.shape
    upper, lower = 3.5, 0.42
    if faces:
        for column, (name, face) in enumerate(zip(names, faces, strict=True)):
            _draw_face(panel(column, upper), face, cells, shorten(name))
        _draw_budget(panel(2, upper), maps, threshold)
    middle = 0.0 if threshold is None else threshold
    parts = contribution(maps.similarity, maps.attention, middle)
    span = max(1 - middle, 0.05)
    # One scale for all figures with this threshold, so that they can be compared; rarer, lower values saturate.
    similarity = Scale(RDBU, middle - span, middle + span)
    _draw_map(panel(0, lower), maps.similarity, similarity, "similarity S", lambda s: number(s, 2), mark=middle)
    percent = 100 * maps.attention
    attention = Scale(YLGN, min(0.0, float(percent.min())), max(float(percent.max()), 1e-7))
    _draw_map(panel(1, lower), percent, attention, "attention W, %", lambda w: number(w, 1))
    most = 100 * max(float(np.abs(parts).max()), 1e-9)
    title = "W S, \u00d7 100" if threshold is None else "contribution W (S \u2212 threshold), \u00d7 100"
    _draw_map(panel(2, lower), 100 * parts, Scale(RDBU, -most, most), title, lambda c: signed(c, 1), mark=0.0)
    same = None if threshold is None else maps.score >= threshold
    verdict, colour = {
        True: ("same person", FOR),
        False: ("different people", AGAINST),
        None: ("no verdict: no threshold", INK),
    }[same]
    top, right = height - 0.33, 1 - left + 0.005
    head = {"fontsize": 17, "fontweight": "bold", "color": INK if heading else colour}
    _text(figure, left, top * inch, heading or verdict, **head)
    digits = 3 if threshold is None else telling_digits(maps.score, threshold, 3)
    summary = f"score {number(maps.score, digits)}"
    if threshold is not None:
        sign = "\u2265" if same else "<"
        summary += f" {sign} threshold {number(threshold, digits)}"
    _text(figure, right, top * inch, summary, fontsize=14, color=INK, ha="right")
    if meaning:
        _text(figure, right, (top - 0.21) * inch, meaning, fontsize=8.5, color=FAINT, ha="right")
    if note:
        _text(figure, left, 0.1 * inch, note, fontsize=8, color=FAINT)
    return figure


def _text(owner: Any, x: float, y: float, text: str, **how: Any) -> None:
    # File names may hold dollar signs, which would start a formula.
    owner.text(x, y, text, parse_math=False, **how)


def _draw_face(axes: Axes, face: np.ndarray, cells: tuple[int, ...], name: str) -> None:
    rows, columns = cells
    axes.imshow(face, extent=(0, columns, rows, 0), interpolation="bicubic", aspect="auto")
    for dark, line in (("#000000", 1.3), ("#ffffff", 0.5)):  # two strokes show on any face
        for x in range(1, columns):
            axes.axvline(x, color=dark, linewidth=line, alpha=0.28)
        for y in range(1, rows):
            axes.axhline(y, color=dark, linewidth=line, alpha=0.28)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_title(name, fontsize=10, color=INK, loc="left", parse_math=False)


def _draw_map(
    axes: Axes,
    values: np.ndarray,
    scale: Scale,
    title: str,
    written: Callable[[float], str],
    mark: float | None = None,
) -> None:
    rows, columns = values.shape
    norm = need("matplotlib.colors", "drawing").Normalize(scale.low, scale.high)
    colours = colour_map(scale.stops)
    image = axes.imshow(values, cmap=colours, norm=norm, extent=(0, columns, rows, 0), aspect="auto")
    axes.vlines(range(1, columns), 0, rows, color="white", linewidth=0.8)
    axes.hlines(range(1, rows), 0, columns, color="white", linewidth=0.8)
    axes.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    size = min(8.6, 60 / max(rows, columns))
    if size >= 4:  # smaller print helps nobody
        for (row, column), value in np.ndenumerate(values):
            how = {"ha": "center", "va": "center", "fontsize": size, "color": ink(scale(value))}
            axes.text(column + 0.5, row + 0.5, written(value), **how)
    bar_axes = axes.inset_axes((1.02, 0.0, 0.035, 1.0))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[
        (bool(values.min() < norm.vmin), bool(values.max() > norm.vmax))
    ]
    bar = axes.figure.colorbar(image, cax=bar_axes, extend=extend)
    bar.outline.set_visible(False)
    bar_axes.tick_params(labelsize=7.5, length=2, color=FAINT, labelcolor=INK)
    if mark is not None:
        bar_axes.axhline(mark, color="black", linewidth=1.2)


def _draw_budget(axes: Axes, maps: Maps, given: float | None) -> None:
    """Threshold, plus what speaks for, minus what speaks against, is the score; without a threshold from zero."""
    threshold = given or 0.0
    parts = contribution(maps.similarity, maps.attention, threshold)
    gain, loss = float(parts[parts > 0].sum()), float(parts[parts < 0].sum())
    kinds = ("above zero", "below zero") if given is None else ("for", "against")
    numbers = int((parts > 0).sum()), int((parts < 0).sum())
    steps = [
        ("threshold", 0.0, threshold, _GREY, number(threshold)),
        (f"{counted(numbers[0], 'cell')} {kinds[0]}", threshold, gain, FOR, signed(gain)),
        (f"{counted(numbers[1], 'cell')} {kinds[1]}", threshold + gain, loss, AGAINST, signed(loss)),
        ("score", 0.0, maps.score, INK, number(maps.score)),
    ][0 if given is not None else 1 :]
    ends = [0.0, *(start + length for _, start, length, _, _ in steps), *(start for _, start, *_ in steps)]
    low, high = min(ends), max(ends)
    room = max(high - low, 1e-6)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the threshold's line stops at words
    for y, (label, start, length, colour, text) in enumerate(steps):
        axes.barh(y, length, left=start, height=0.42, color=colour)
        _text(axes, low, y - 0.33, label, fontsize=9, color=INK, va="bottom", bbox=paper)
        end = max(start, start + length) + 0.015 * room
        _text(axes, end, y, text, fontsize=9, color=colour, va="center", fontweight="bold", bbox=paper)
    axes.axvline(threshold, color=_GREY, linewidth=1, linestyle=(0, (3, 2)), zorder=0)
    axes.set_xlim(low - 0.01 * room, high + 0.22 * room)
    axes.set_ylim(len(steps) - 0.6, -0.75)
    title = "from zero to score" if given is None else "from threshold to score"
    axes.set_title(title, fontsize=10, color=INK, loc="left")
