"""Text from anywhere made fit to be shown: nothing invisible, nothing that turns the line around."""

from __future__ import annotations

__all__ = ["number", "percent", "printable", "short_name", "shorten", "signed"]


def printable(text: str) -> str:
    """Text with every character that is not printable as a backslash escape.

    That takes control characters, line breaks, half surrogates, and the marks that reverse the direction of writing,
    with which ``gpj.exe`` passes for ``exe.jpg``.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def short_name(name: str) -> str:
    """The last part of a path, printable."""
    return printable(name).rstrip("/").rpartition("/")[2] or printable(name)


def shorten(name: str, most: int = 30) -> str:
    """A name of at most ``most`` characters: what is too much is left out in its middle."""
    return name if len(name) <= most else name[: most // 2 - 1] + "\u2026" + name[-most // 2 :]


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, a minus that is a minus, and no negative zero."""
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", "\u2212")


def number(value: float, digits: int = 3) -> str:
    """A number with a minus that is a minus, and no negative zero."""
    return signed(value, digits).lstrip("+")


def percent(share: float) -> str:
    """A share in per cent, for people."""
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"
