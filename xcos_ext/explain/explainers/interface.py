"""What every explainer is given and gives back, and the two scores that are explained."""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from xcos_ext.backbones import Recogniser
from xcos_ext.card import Preprocessing
from xcos_ext.model import XCosModel

__all__ = ["EmbeddingCosine", "Explainer", "PairModel", "Saliency", "XCosPairs", "as_pair_model"]


class Saliency(NamedTuple):
    """Where face A is like face B, and where it is not: larger means more.

    Only the order of a map's values has a meaning that all explainers share; they may be negative. Maps of B come from
    the explainer called with the faces exchanged.

    >>> Saliency(torch.rand(2, 7, 7), torch.rand(2, 7, 7)).similar.shape
    torch.Size([2, 7, 7])

    Attributes:
        similar: [N, h, w], fp32: pixels of A, or cells of its grid.
        dissimilar: the same shape.
    """

    similar: Tensor
    dissimilar: Tensor


class PairModel(Protocol):
    """A similarity of two pictures, through features of each.

    Attributes:
        preprocessing: of the pictures.
        threshold: the same person if score >= threshold; None where it is not calibrated.
        name: for reports.
    """

    @property
    def preprocessing(self) -> Preprocessing: ...
    @property
    def threshold(self) -> float | None: ...
    @property
    def name(self) -> str: ...

    def features(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> what is kept of each face [N, ...]."""
        ...

    def score(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """Similarities [N] of two batches of features; differentiable."""
        ...

    def channels(self, features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors u, v [N, K] with ``(u * v).sum(1)`` = score: u of A's features, v of B's, differentiable."""
        ...


class Explainer(Protocol):
    """Maps of what makes two faces similar and dissimilar.

    Attributes:
        name: as in :func:`xcos_ext.explain.explainers.create`.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over A.

        Args:
            model: of the score to explain.
            a: normalised images [N, 3, H, W].
            b: the faces that they are compared with, the same shape.
        """
        ...


class EmbeddingCosine:
    """The plain cosine of a recogniser's embeddings as a :class:`PairModel`.

    >>> from xcos_ext import backbones
    >>> model = EmbeddingCosine(backbones.create("mobilefacenet", embedding_size=8).eval(), threshold=0.3)
    >>> model.name
    'mobilefacenet, cosine'

    Args:
        recogniser: with its output block, in evaluation mode.
        threshold: the same person if cosine >= threshold; None: unknown.
        name: for reports; None: the architecture's.

    Attributes:
        module: the network.

    Raises:
        ValueError: the recogniser has no output block.
    """

    def __init__(self, recogniser: Recogniser, *, threshold: float | None = None, name: str | None = None) -> None:
        if recogniser.embedding_size is None:
            raise ValueError("recogniser: expected one with its output block, whose embeddings are compared; got none")
        self.module = self.recogniser = recogniser
        self.preprocessing, self.threshold = recogniser.preprocessing, threshold
        self.name = f"{recogniser.architecture}, cosine" if name is None else name

    def embedding(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> the recogniser's embeddings [N, D], not of unit length."""
        found: Tensor = self.recogniser(images)
        return found

    def features(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> unit embeddings [N, D]."""
        return F.normalize(self.embedding(images), dim=1)

    def score(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """Cosines [N] of unit embeddings [N, D]."""
        return (features_a * features_b).sum(1)

    def channels(self, features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
        """The unit embeddings themselves."""
        return features_a, features_b


class XCosPairs:
    """The score sum W * S of an xCos model as a :class:`PairModel`.

    >>> import torch, xcos_ext
    >>> model = XCosPairs(xcos_ext.load_model())
    >>> model.features(torch.zeros(2, 3, 112, 112)).shape
    torch.Size([2, 32, 7, 7])

    Args:
        model: in evaluation mode.

    Attributes:
        module: the network.
    """

    def __init__(self, model: XCosModel) -> None:
        self.module = self.model = model
        self.preprocessing, self.name = model.preprocessing, model.name

    @property
    def threshold(self) -> float | None:
        """The model's decision threshold."""
        return self.model.threshold

    def features(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> grid features [N, C, h, w]."""
        return self.model.features(images)

    def score(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """xCos scores [N]."""
        return cast(Tensor, self.model.score(features_a, features_b))

    def channels(self, features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features of each cell, flattened; A's weighed with the attention, held constant."""
        with torch.no_grad():
            weights = self.model.score(features_a, features_b, return_maps=True).attention
        unit_a, unit_b = F.normalize(features_a, dim=1, eps=1e-6), F.normalize(features_b, dim=1, eps=1e-6)
        return (weights.unsqueeze(1).to(unit_a.dtype) * unit_a).flatten(1), unit_b.flatten(1)


def as_pair_model(model: PairModel | XCosModel | Recogniser) -> PairModel:
    """A model as explainers want it: an :class:`XCosModel`'s own score, a recogniser's plain cosine.

    >>> import xcos_ext
    >>> as_pair_model(xcos_ext.load_model()).name
    'xcos-slim'

    Raises:
        ValueError: a recogniser without its output block.
    """
    if isinstance(model, XCosModel):
        return XCosPairs(model)
    return EmbeddingCosine(model) if isinstance(model, Recogniser) else model
