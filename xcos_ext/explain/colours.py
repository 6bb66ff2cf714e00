"""The colours of maps on pages: ColorBrewer's RdBu and YlGn, which stay apart under colour blindness, as in the figure.

They are tabled here so that a page needs no matplotlib; a test compares them with matplotlib's.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["RDBU", "YLGN", "Scale", "ink"]

#: Red (against) to blue (for the same person).
RDBU = (
    "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7",
    "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061",
)  # fmt: skip
#: Pale to dark green.
YLGN = ("#ffffe5", "#f7fcb9", "#d9f0a3", "#addd8e", "#78c679", "#41ab5d", "#238443", "#006837", "#004529")


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


class Scale:
    """Colours for numbers between two ends; what lies beyond an end gets its colour.

    Args:
        stops: colours at equal distances.
        low: value of the first.
        high: value of the last; greater.
    """

    def __init__(self, stops: Sequence[str], low: float, high: float) -> None:
        self.stops, self.low, self.high = tuple(stops), low, high

    def __call__(self, value: float) -> str:
        """The colour of a number, ``#rrggbb``."""
        place = (value - self.low) / (self.high - self.low)
        place = min(max(place, 0.0), 1.0) * (len(self.stops) - 1)
        index = min(int(place), len(self.stops) - 2)
        mixed = (
            round(a + (b - a) * (place - index))
            for a, b in zip(_rgb(self.stops[index]), _rgb(self.stops[index + 1]), strict=True)
        )
        return "#{:02x}{:02x}{:02x}".format(*mixed)


def ink(ground: str) -> str:
    """The colour of text that can be read on a ground."""
    red, green, blue = _rgb(ground)
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.52 * 255 else "#1a1a1a"
