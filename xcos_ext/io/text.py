"""Text for people: numbers, sizes, lists and errors in short, and text from anywhere made fit to be shown."""

from __future__ import annotations

import os
from collections.abc import Iterable

__all__ = [
    "byte_size",
    "display_name",
    "duration",
    "few",
    "first_line",
    "percent",
    "printable",
    "rate",
    "signed",
    "span",
]

_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))


def printable(text: str) -> str:
    """Text with every character that is not printable as a backslash escape.

    That takes control characters, line breaks, half surrogates, and the marks that reverse the direction of writing,
    with which ``gpj.exe`` passes for ``exe.jpg``.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def display_name(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """A path as text that can be printed on one line of any terminal.

    Bytes that are not UTF-8 and characters that are not printable are shown as backslash escapes.
    """
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def first_line(error: BaseException, most: int | None = 200) -> str:
    """The first line of another library's message, cut to ``most`` characters (None: whole); the type's name where
    it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def few(names: Iterable[str], most: int = 4) -> str:
    """The first of some names, for a message: ``"a, b, c, d, ..."``."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, a minus that is a minus, and no negative zero."""
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", "\u2212")


def percent(share: float) -> str:
    """A share in per cent, for people."""
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def byte_size(count: float) -> str:
    """``2_610_000`` -> ``"2.61 MB"``: decimal units, three digits that count."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"


def _unit(seconds: float) -> tuple[str, float]:
    return next((unit for unit in _UNITS if seconds >= unit[1]), _UNITS[-1])


def _number(value: float) -> str:
    """Three digits that count, never with an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    """``0.00461`` -> ``"4.61 ms"``; None -> ``"-"``."""
    if seconds is None:
        return "-"
    unit, scale = _unit(seconds)
    return f"{_number(seconds / scale)} {unit}"


def span(seconds: float, low: float, high: float) -> str:
    """A duration and its interval, all in one unit: ``"4.61 ms (4.60 – 4.82)"``."""
    _, scale = _unit(seconds)
    return f"{duration(seconds)} ({_number(low / scale)} – {_number(high / scale)})"


def rate(per_second: float, unit: str) -> str:
    """``(2_341.2, "pairs")`` -> ``"2,341 pairs/s"``; from a million on ``"1.11 M pairs/s"``."""
    for name, scale in (("G ", 1e9), ("M ", 1e6)):
        if per_second >= scale:
            return f"{_number(per_second / scale)} {name}{unit}/s"
    return f"{_number(per_second)} {unit}/s"
