"""Showing why two faces match or do not (needs the ``cli`` extra)."""

from .decision import contribution
from .figure import FIGURE_SUFFIXES, check_figure_path, save_figure, verification_figure
from .files import OutputError

__all__ = [
    "FIGURE_SUFFIXES",
    "OutputError",
    "check_figure_path",
    "contribution",
    "save_figure",
    "verification_figure",
]
