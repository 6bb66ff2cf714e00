"""Numbers in variables of the environment, read so that a wrong one is named."""

from __future__ import annotations

import os

from .errors import XCosError

__all__ = ["whole_number"]


def whole_number(name: str, default: int, *, least: int = 0, below: int | None = None) -> int:
    """The whole number in a variable of the environment.

    Args:
        name: the variable.
        default: what it means where it is not set.
        least: the smallest number that it may hold.
        below: the number that it must stay below; None: any.

    Raises:
        XCosError: it holds something else.

    >>> whole_number("XCOS_NOT_SET", 1)
    1
    """
    text = os.environ.get(name)
    if text is None:
        return default
    if text.isdecimal() and least <= int(text) and (below is None or int(text) < below):
        return int(text)
    limits = f" from {least}" + (f" to {below - 1}" if below is not None else " on")
    raise XCosError(f"{name}: expected a whole number{limits}, got {text!r}")
