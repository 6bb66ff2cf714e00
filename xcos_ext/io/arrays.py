"""NumPy arrays that say more than their values, which nothing here would look at."""

from __future__ import annotations

import numpy as np

__all__ = ["picture_hint", "refuse_masked"]


def picture_hint(value: object) -> str:
    """What to say to somebody who gives a face where its picture is wanted; else nothing.

    >>> picture_hint(np.zeros(3))
    ''
    """
    return "; its .rgb is the picture" if hasattr(value, "rgb") else ""


def refuse_masked(**given: object) -> None:
    """Refuse masked arrays: NumPy's own functions, and ours, would read the values under the mask.

    Args:
        given: arguments by their names; anything else than a masked array passes.

    Raises:
        TypeError: a masked array.

    >>> refuse_masked(scores=np.zeros(3))
    >>> refuse_masked(scores=np.ma.masked_invalid([0.5, np.nan]))
    Traceback (most recent call last):
    TypeError: scores: expected an array without a mask, got a MaskedArray; what is masked has to be left out or filled
    """
    for name, value in given.items():
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(
                f"{name}: expected an array without a mask, got a MaskedArray; what is masked has to be left out or "
                "filled"
            )
