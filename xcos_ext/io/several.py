"""Arguments that want several values: not one text, whose letters Python would take, nor a set, which has no order."""

from __future__ import annotations

import os
from typing import TypeVar

from .text import shorten

__all__ = ["several"]

Values = TypeVar("Values")


def several(values: Values, argument: str, what: str = "texts", *, ordered: bool = False) -> Values:
    """What is given where several values are wanted, unchanged; one text is refused, whose letters would be taken.

    Args:
        values: a list, an array, or whatever else is gone through.
        argument: its name, for the message.
        what: is in the sequence.
        ordered: their places count, as where each belongs to a row of something else; sets are refused then.

    Raises:
        TypeError: one text, bytes, a path, something that cannot be gone through, or a set.

    >>> several(["12"], "gallery.remove: ids")
    ['12']
    >>> several("12", "gallery.remove: ids")
    Traceback (most recent call last):
    TypeError: gallery.remove: ids: expected a sequence of texts, got one text, '12'
    """
    for kinds, name in ((str, "one text"), ((bytes, bytearray), "bytes"), (os.PathLike, "one path")):
        if isinstance(values, kinds):
            raise TypeError(f"{argument}: expected a sequence of {what}, got {name}, {shorten(repr(values), 80)}")
    if not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{argument}: expected a sequence of {what}, got {type(values).__name__}")
    if ordered and isinstance(values, (set, frozenset)):
        raise TypeError(f"{argument}: expected a sequence of {what}, got a {type(values).__name__}, which has no order")
    return values
