"""Text from anywhere made fit to be shown: nothing invisible, nothing that turns the line around."""

from __future__ import annotations

__all__ = ["percent", "printable", "signed"]


def printable(text: str) -> str:
    """Text with every character that is not printable as a backslash escape.

    That takes control characters, line breaks, half surrogates, and the marks that reverse the direction of writing,
    with which ``gpj.exe`` passes for ``exe.jpg``.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, a minus that is a minus, and no negative zero."""
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", "\u2212")


def percent(share: float) -> str:
    """A share in per cent, for people."""
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"
