"""The set-up and the colours of all drawings, on pages and in figures.

ColorBrewer's RdBu and YlGn and Okabe and Ito's colours stay apart under every common colour vision deficiency; blue
speaks for the same person. They are tabled here so that a page needs no matplotlib.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.io.atomic import check_output, write_atomically
from xcos_ext.io.optional import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

__all__ = [
    "AGAINST",
    "DASHES",
    "FAINT",
    "FIGURE_SUFFIXES",
    "FOR",
    "GRID",
    "INK",
    "LINES",
    "RDBU",
    "YLGN",
    "Scale",
    "bare_axes",
    "check_face",
    "check_figure_path",
    "colour_map",
    "ink",
    "new_figure",
    "save_figure",
    "shades",
]

#: Red (against) to blue (for the same person).
RDBU = (
    "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7",
    "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061",
)  # fmt: skip
#: Pale to dark green.
YLGN = ("#ffffe5", "#f7fcb9", "#d9f0a3", "#addd8e", "#78c679", "#41ab5d", "#238443", "#006837", "#004529")
#: For and against the same person.
FOR, AGAINST = RDBU[-2], RDBU[1]
#: Text, less important text, and lines behind curves.
INK, FAINT, GRID = "#222222", "#6b6b6b", "#dddddd"
#: Colours and styles of curves that are compared.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
#: What :func:`save_figure` writes.
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


class Scale:
    """Colours for numbers between two ends; what lies beyond an end gets its colour.

    >>> Scale(("#000000", "#ffffff"), -1.0, 1.0)(0.0)
    '#808080'

    Args:
        stops: colours at equal distances.
        low: value of the first.
        high: value of the last; greater.
    """

    def __init__(self, stops: Sequence[str], low: float, high: float) -> None:
        self.stops, self.low, self.high = tuple(stops), low, high
        self._rgb = [_rgb(stop) for stop in stops]

    def __call__(self, value: float) -> str:
        """The colour of a number, ``#rrggbb``."""
        return self.at(self.place(value))

    def place(self, value: float) -> float:
        """Where a number lies: 0 at the low end, 1 at the high one."""
        span = self.high - self.low
        return (value - self.low) / span if span > 0 else 0.5  # the ends differ by less than rounding

    def at(self, place: float) -> str:
        """The colour at a place between the ends."""
        place = min(max(place, 0.0), 1.0) * (len(self.stops) - 1)
        index = min(int(place), len(self.stops) - 2)
        one, next_one = self._rgb[index : index + 2]
        return "#" + bytes(round(a + (b - a) * (place - index)) for a, b in zip(one, next_one, strict=True)).hex()


@cache
def shades(stops: tuple[str, ...]) -> tuple[str, ...]:
    """48 colours for a legend, from the first stop to the last."""
    return tuple(Scale(stops, 0.0, 48.0)(i + 0.5) for i in range(48))


def ink(ground: str) -> str:
    """The colour of text that can be read on a ground."""
    red, green, blue = _rgb(ground)
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.52 * 255 else "#1a1a1a"


# --- matplotlib


def new_figure(width: float, height: float, **how: Any) -> Figure:
    """An empty white figure on the Agg canvas; nothing is registered with pyplot.

    Args:
        width: in inches.
        height: in inches.
        **how: of matplotlib's ``Figure``, e.g. ``layout``.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure: Figure = need("matplotlib.figure", "drawing").Figure(figsize=(width, height), facecolor="white", **how)
    need("matplotlib.backends.backend_agg", "drawing").FigureCanvasAgg(figure)
    return figure


def bare_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes without ticks and frame at a place in the figure, in its widths and heights."""
    axes = figure.add_axes((left, bottom, width, height))
    axes.set_axis_off()
    return axes


def colour_map(stops: Sequence[str]) -> LinearSegmentedColormap:
    """A colour map of matplotlib through colours at equal distances."""
    made: LinearSegmentedColormap = need("matplotlib.colors", "drawing").LinearSegmentedColormap.from_list("", stops)
    return made


def check_face(name: str, face: np.ndarray) -> None:
    """Refuse what cannot be drawn as a face.

    Raises:
        ValueError: not uint8 [H, W, 3] with pixels in it.
    """
    if face.dtype != np.uint8 or face.ndim != 3 or face.shape[2] != 3 or face.size == 0:
        raise ValueError(f"{name}: expected uint8 [H, W, 3], got {face.dtype} {list(face.shape)}")


def check_figure_path(path: str | os.PathLike[str]) -> str:
    """Check that a figure can be written, before the work for it is done.

    >>> check_figure_path("/tmp/why.png")
    '/tmp/why.png'

    Raises:
        OutputError: a suffix other than :data:`FIGURE_SUFFIXES`, or a file that cannot be written.
    """
    return check_output(path, FIGURE_SUFFIXES)


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150) -> None:
    """Write a figure, atomically, in the format of its suffix.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_figure(new_figure(1, 1), f"{folder}/a.png", dpi=20)
    ...     os.listdir(folder)
    ['a.png']

    Args:
        figure: to write.
        path: ``.png``, ``.pdf`` or ``.svg``.
        dpi: pixels per inch of a PNG.

    Raises:
        OutputError: another suffix, or a file that cannot be written.
    """
    target = check_figure_path(path)
    kind = os.path.splitext(target if target.lower().endswith(FIGURE_SUFFIXES) else os.fspath(path))[1][1:].lower()
    # Without a date, and with names that are not drawn by chance, the same decision gives the same file.
    metadata = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    context = need("matplotlib", "drawing").rc_context({"svg.hashsalt": "xcos_ext"})
    with warnings.catch_warnings(), context:
        # Names in scripts that the font lacks are drawn as boxes; that is no reason to alarm anyone.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        write_atomically(target, lambda file: figure.savefig(file, format=kind, dpi=dpi, metadata=metadata))
