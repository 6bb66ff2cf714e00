"""Explainable face similarity at the price of cosine.

xCos compares two faces cell by cell (cosine S of a 7x7 grid of features), weighs the cells (attention W) and scores
``sum W * S``: a number that comes with its own explanation (arXiv 2003.05383).

    print(xcos_ext.verify("a.jpg", "b.jpg"))               # the verdict, and why
    score = xcos_ext.xcos_score(a, b, logits_or_weights, logits=True)
    score, similarity, attention = xcos_ext.xcos_score(a, b, "norm", return_maps=True)

Names are loaded when first used, so importing the package costs nothing; ``import xcos_ext.ops`` registers the torch
operators at once (for programs that load exported graphs).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xcos_ext.api import represent, verify, verify_many
    from xcos_ext.gallery import Gallery, ShardedGallery
    from xcos_ext.io.errors import ModelError, PictureError, XCosError
    from xcos_ext.model import ArcFaceHead, CosFaceHead, XCosAttention, XCosHead, XCosModel, load_model, plug
    from xcos_ext.ops import GridMatch, HeadLayer, HeadParameters, XCosMaps, XCosScore, XCosTopk, build_info
    from xcos_ext.ops import reference as reference
    from xcos_ext.ops.grid_cosine import grid_cosine
    from xcos_ext.ops.grid_match import grid_match
    from xcos_ext.ops.templates import Templates
    from xcos_ext.ops.xcos_head import xcos_head
    from xcos_ext.ops.xcos_maps import xcos_maps
    from xcos_ext.ops.xcos_matrix import xcos_matrix
    from xcos_ext.ops.xcos_score import xcos_score
    from xcos_ext.ops.xcos_topk import xcos_topk

__version__ = "0.1.0"

_HOMES = {
    "xcos_ext.ops": (
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
    ),
    "xcos_ext.api": ("represent", "verify", "verify_many"),
    "xcos_ext.gallery": ("Gallery", "ShardedGallery"),
    "xcos_ext.io.errors": ("ModelError", "PictureError", "XCosError"),
    "xcos_ext.ops.templates": ("Templates",),
    "xcos_ext.model": (
        "ArcFaceHead",
        "CosFaceHead",
        "XCosAttention",
        "XCosHead",
        "XCosModel",
        "load_model",
        "plug",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ArcFaceHead",
    "CosFaceHead",
    "Gallery",
    "GridMatch",
    "HeadLayer",
    "HeadParameters",
    "ModelError",
    "PictureError",
    "ShardedGallery",
    "Templates",
    "XCosAttention",
    "XCosError",
    "XCosHead",
    "XCosMaps",
    "XCosModel",
    "XCosScore",
    "XCosTopk",
    "build_info",
    "grid_cosine",
    "grid_match",
    "load_model",
    "plug",
    "reference",
    "represent",
    "verify",
    "verify_many",
    "xcos_head",
    "xcos_maps",
    "xcos_matrix",
    "xcos_score",
    "xcos_topk",
]


def __getattr__(name: str) -> Any:
    if name == "reference":
        return importlib.import_module("xcos_ext.ops.reference")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'xcos_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
