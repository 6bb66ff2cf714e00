"""xCos's own maps as explainers: they come with the score, at no cost."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .interface import PairModel, Saliency, XCosPairs

__all__ = ["CellMap"]


class CellMap:
    """A map of the cells that the score is made of.

    Args:
        kind: ``"contribution"``: W * (S - t), what each cell adds to the decision; ``"similarity"``: S alone;
            ``"attention"``: W alone, the same for what is similar and what is not.
    """

    def __init__(self, kind: Literal["contribution", "similarity", "attention"] = "contribution") -> None:
        self.kind = kind
        self.name = {"contribution": "xcos", "similarity": "xcos-similarity", "attention": "xcos-attention"}[kind]

    @torch.no_grad()
    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over A's cells [N, h, w].

        Raises:
            ValueError: a model without cells, or ``"contribution"`` without a threshold.
        """
        if not isinstance(model, XCosPairs):
            raise ValueError(f"model: expected an xCos model, whose score has cells, got {model.name}")
        maps = model.model.score(model.features(a), model.features(b), return_maps=True)
        if self.kind == "attention":
            return Saliency(maps.attention, maps.attention)
        if self.kind == "similarity":
            return Saliency(maps.similarity, -maps.similarity)
        if model.threshold is None:
            raise ValueError("model: expected a decision threshold, which W * (S - t) is about, got none")
        parts = maps.attention * (maps.similarity - model.threshold)
        return Saliency(parts, -parts)
