"""The operators: one file each, with docstring, fake kernel, autograd function and rules for autocast and vmap.

Importing this package loads the compiled library and registers ``torch.ops.xcos_ext.*``.
"""

from . import _forward_mode as _forward_mode
from ._library import build_info
from .grid_cosine import grid_cosine
from .grid_match import GridMatch, grid_match
from .xcos_head import HeadLayer, HeadParameters, xcos_head
from .xcos_maps import XCosMaps, xcos_maps
from .xcos_matrix import xcos_matrix
from .xcos_score import XCosScore, xcos_score
from .xcos_topk import XCosTopk, xcos_topk

__all__ = [
    "GridMatch",
    "HeadLayer",
    "HeadParameters",
    "XCosMaps",
    "XCosScore",
    "XCosTopk",
    "build_info",
    "grid_cosine",
    "grid_match",
    "xcos_head",
    "xcos_maps",
    "xcos_matrix",
    "xcos_score",
    "xcos_topk",
]
