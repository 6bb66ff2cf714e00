"""Showing why two faces match or do not (needs the ``cli`` extra).

``from xcos_ext.explain import explain``: ``explain(model, a, b)`` gives an :class:`Explanation`.
"""

from .decision import contribution
from .decision_figure import verification_figure
from .explanation import Explanation, Face, ModelCard, explain
from .plotting import FIGURE_SUFFIXES, check_figure_path, save_figure
from .regions import Region

__all__ = [
    "FIGURE_SUFFIXES",
    "Explanation",
    "Face",
    "ModelCard",
    "Region",
    "check_figure_path",
    "contribution",
    "explain",
    "save_figure",
    "verification_figure",
]
