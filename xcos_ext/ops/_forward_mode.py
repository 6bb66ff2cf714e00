"""The operators in plain torch, by the arguments of the compiled ones: what forward mode differentiates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _checks, reference
from ._library import plain_forms
from .grid_match import MATCHES, GridMatch
from .xcos_score import LOGITS, NORM, XCosScore

__all__: list[str] = []


def _grid_cosine(a: Tensor, b: Tensor, eps: float) -> Tensor:
    _checks.check_features("grid_cosine", a, b)
    _checks.check_positive("grid_cosine", "eps", eps)
    return reference.grid_cosine(a, b, eps=eps)


def _grid_match(a: Tensor, b: Tensor, *options: Any, offsets: bool = False) -> Tensor | GridMatch:
    radius, match, temperature, symmetric, eps = options
    _checks.check_features("grid_match", a, b)
    _checks.check_match("grid_match", radius, match, temperature)
    _checks.check_positive("grid_match", "eps", eps)
    how: dict[str, Any] = {"radius": radius, "match": MATCHES[match], "temperature": temperature, "eps": eps}
    return reference.grid_match(a, b, symmetric=symmetric, return_offsets=offsets, **how)


def _xcos_score(a: Tensor, b: Tensor, attention: Tensor | None, *options: Any) -> XCosScore:
    mode, temperature, eps = options
    _checks.check_score("xcos_score", a, b, attention, *options)
    how: dict[str, Any] = {"logits": mode == LOGITS, "temperature": temperature, "eps": eps}
    found = reference.xcos_score(a, b, "norm" if mode == NORM else attention, return_maps=True, **how)
    assert isinstance(found, XCosScore)
    return found


plain_forms |= {
    "grid_cosine": _grid_cosine,
    "grid_match": _grid_match,
    "grid_match.offsets": lambda *args: _grid_match(*args, offsets=True),
    "xcos_score": lambda *args: _xcos_score(*args).score,
    "xcos_score.maps": _xcos_score,
    "xcos_matrix": reference.learned_scores,
}
