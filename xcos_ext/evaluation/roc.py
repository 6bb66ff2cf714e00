"""The ROC plot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from xcos_ext.explain.plotting import DASHES, FAINT, GRID, LINES, new_figure

from .verification import ErrorCurves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["roc_figure"]

_RELIABLE = 30  # false matches


def roc_figure(curves: Mapping[str, ErrorCurves], impostors: int, *, title: str = "") -> Figure:
    """True accept rate over false match rate, the latter on a logarithmic axis down to one false match.

    Where fewer than 30 impostor pairs are false matches, rates are uncertain by a third and more; that part is shaded.

    >>> from xcos_ext.evaluation import error_curves
    >>> figure = roc_figure({"a model": error_curves([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0])}, impostors=2)
    >>> figure.axes[0].get_ylabel()
    'true accept rate'

    Args:
        curves: label -> curves.
        impostors: number of impostor pairs.
        title: above the plot.

    Returns:
        A figure on the Agg canvas; write it with :func:`xcos_ext.explain.save_figure`.

    Raises:
        ValueError: ``impostors`` is below 2: between one false match and all there is nothing to draw.
        MissingPackageError: matplotlib is not installed.
    """
    if impostors < 2:
        raise ValueError(f"impostors: expected at least two pairs, got {impostors}")
    figure = new_figure(7.2, 5.0, layout="constrained")
    axes = figure.add_subplot()
    smallest = 1 / impostors
    lowest = 1.0
    for i, (label, curve) in enumerate(curves.items()):
        # Ascending rates; between two of them the accept rate of the lower one holds.
        fmr, tar = curve.fmr[::-1], 1 - curve.fnmr[::-1]
        start = max(int(np.searchsorted(fmr, smallest * (1 + 1e-9), "right")) - 1, 0)
        visible, accepted = np.maximum(fmr[start:], smallest), tar[start:]
        lowest = min(lowest, float(accepted[0]))
        colour, style = LINES[i % len(LINES)], DASHES[i % len(DASHES)]
        axes.step(visible, accepted, where="post", label=label, color=colour, linestyle=style, linewidth=1.8)
    axes.set_xscale("log")
    axes.set_xlim(smallest, 1)
    axes.set_ylim(max(0.0, np.floor(20 * lowest) / 20 - 0.01), 1.005)
    axes.axvspan(smallest, min(1.0, _RELIABLE / impostors), color="#eeeeee", zorder=0, linewidth=0)
    axes.text(
        smallest * 1.06, 0.02, f"fewer than {_RELIABLE} false matches",
        transform=axes.get_xaxis_transform(), fontsize=8, color=FAINT,
    )  # fmt: skip
    axes.set_xlabel("false match rate")
    axes.set_ylabel("true accept rate")
    axes.grid(True, which="major", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    if title:
        axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    return figure
