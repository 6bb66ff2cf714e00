"""Text for people: numbers, sizes, lists and errors in short, and text from anywhere made fit to be shown."""

from __future__ import annotations

import codecs
import os
import unicodedata
from collections.abc import Iterable

__all__ = [
    "ENCODABLE",
    "byte_size",
    "composed",
    "counted",
    "display_name",
    "duration",
    "few",
    "first_line",
    "number",
    "percent",
    "printable",
    "rate",
    "short_name",
    "shorten",
    "signed",
    "span",
    "telling_digits",
]

#: What stands for the package's own characters beyond ASCII where a stream cannot hold them.
_EQUIVALENTS = {"\u2212": "-", "\u2013": "-", "\u2026": "...", "\u00d7": "x", "\u2265": ">=", "\u2264": "<="}
_EQUIVALENTS |= {"\u00b5": "u", "\u2191": "^", "\u2193": "v"}


def _encodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    beyond = error.object[error.start : error.end]
    return "".join(_EQUIVALENTS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in beyond), error.end


#: An error handler of encodings: the likeness in ASCII, or a backslash escape, for what they do not have.
ENCODABLE = "xcos_ext.encodable"
codecs.register_error(ENCODABLE, _encodable)

_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))


def printable(text: str) -> str:
    """Text with every character that is not printable as a backslash escape.

    That takes control characters, line breaks, half surrogates, and the marks that reverse the direction of writing,
    with which ``gpj.exe`` passes for ``exe.jpg``.

    >>> printable("a\\nb")
    'a\\\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def composed(text: str) -> str:
    """Text in Unicode's composed form (NFC): names that look the same are the same, however they are spelled.

    >>> composed("Zoe\\u0308") == "Zo\\u00eb"
    True
    """
    return unicodedata.normalize("NFC", text)


def display_name(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """A path as text that can be printed on one line of any terminal.

    Bytes that are not UTF-8 and characters that are not printable are shown as backslash escapes.

    >>> print(display_name(b"\\xff.png"))
    \\xff.png
    """
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def first_line(error: BaseException, most: int | None = 200) -> str:
    """The first line of another library's message, cut to ``most`` characters (None: whole); the type's name where
    it has none.

    >>> first_line(RuntimeError("no memory\\nin line 3"))
    'no memory'
    """
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def few(names: Iterable[str], most: int = 4) -> str:
    """The first of some names, for a message.

    >>> few("abcde")
    'a, b, c, d, ...'
    """
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def counted(count: int, what: str) -> str:
    """So many of something, one of it in the singular.

    >>> counted(1, "face"), counted(0, "face"), counted(12_000, "face")
    ('1 face', '0 faces', '12,000 faces')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def short_name(name: str) -> str:
    """The last part of a path, printable.

    >>> short_name("photos/ann.jpg")
    'ann.jpg'
    """
    return printable(name).rstrip("/").rpartition("/")[2] or printable(name)


def shorten(name: str, most: int = 30) -> str:
    """A name of at most ``most`` characters: what is too much is left out in its middle.

    >>> shorten("photograph-of-ann.jpg", 10)
    'phot…n.jpg'
    """
    return name if len(name) <= most else name[: most // 2 - 1] + "\u2026" + name[-most // 2 :]


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, a minus that is a minus, and no negative zero.

    >>> signed(0.25), signed(-0.00001), signed(-1.5, 1)
    ('+0.250', '0.000', '−1.5')
    """
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", "\u2212")


def number(value: float, digits: int = 3) -> str:
    """A number with a minus that is a minus, and no negative zero."""
    return signed(value, digits).lstrip("+")


def telling_digits(a: float, b: float, digits: int = 4) -> int:
    """How many decimals, ``digits`` or more, show that two numbers differ, and by how much.

    >>> telling_digits(0.58007561, 0.5800756), telling_digits(0.6, 0.5)
    (8, 4)
    """
    while a != b and digits < 17 and (f"{a:.{digits}f}" == f"{b:.{digits}f}" or round(abs(a - b), digits) == 0):
        digits += 1
    return digits


def percent(share: float) -> str:
    """A share in per cent, for people.

    >>> percent(0.031), percent(0.5)
    ('3.1 %', '50 %')
    """
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def byte_size(count: float) -> str:
    """Decimal units, three digits that count.

    >>> byte_size(2_610_000)
    '2.61 MB'
    """
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
    """Three digits that count, in the unit that suits.

    >>> duration(0.00461), duration(None)
    ('4.61 ms', '-')
    """
    if seconds is None:
        return "-"
    unit, scale = _unit(seconds)
    return f"{_number(seconds / scale)} {unit}"


def span(seconds: float, low: float, high: float) -> str:
    """A duration and its interval, all in one unit.

    >>> span(0.00461, 0.0046, 0.00482)
    '4.61 ms (4.60 – 4.82)'
    """
    _, scale = _unit(seconds)
    return f"{duration(seconds)} ({_number(low / scale)} – {_number(high / scale)})"


def rate(per_second: float, unit: str) -> str:
    """So many a second; from a million on in millions.

    >>> rate(2_341.2, "pairs"), rate(1_110_000, "pairs")
    ('2,341 pairs/s', '1.11 M pairs/s')
    """
    for name, scale in (("G ", 1e9), ("M ", 1e6)):
        if per_second >= scale:
            return f"{_number(per_second / scale)} {name}{unit}/s"
    return f"{_number(per_second)} {unit}/s"
