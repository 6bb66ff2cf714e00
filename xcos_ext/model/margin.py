"""Margin heads: classification logits that push identities apart, for training the grid feature."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ArcFaceHead", "CosFaceHead"]

# sin(theta) = sqrt(1 - cos^2) has an unbounded slope at cos = +-1; below this value of 1 - cos^2 it is held.
_MIN_SIN2 = 1e-6


class _MarginHead(nn.Module):
    """Shared by the margin heads: class directions, cosines in fp32, label checks."""

    def __init__(self, features: int, classes: int, scale: float, margin: float) -> None:
        super().__init__()
        if features < 1 or classes < 1:
            raise ValueError(f"features, classes: expected positive integers, got {features} and {classes}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale: expected a positive finite number, got {scale}")
        if not (math.isfinite(margin) and margin >= 0):
            raise ValueError(f"margin: expected a finite number >= 0, got {margin}")
        self.features = features
        self.classes = classes
        self.scale = float(scale)
        self.margin = float(margin)
        self.kernel = nn.Parameter(torch.empty(features, classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every class direction uniformly on the unit sphere."""
        with torch.no_grad():
            self.kernel.normal_()
            self.kernel.copy_(F.normalize(self.kernel, dim=0))

    def _check(self, embeddings: Tensor, labels: Tensor) -> None:
        if embeddings.dim() != 2 or embeddings.shape[1] != self.features:
            raise ValueError(f"embeddings: expected [N, {self.features}], got {list(embeddings.shape)}")
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels: expected int64 or int32, got {labels.dtype}")
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(f"labels: expected [{embeddings.shape[0]}], got {list(labels.shape)}")
        # On a GPU reading the values would wait for the device; there gather() asserts the range itself.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                raise ValueError(f"labels: expected values in [0, {self.classes - 1}], got {low}..{high}")

    def cosine(self, embeddings: Tensor, classes: Tensor | None = None) -> Tensor:
        """Cosines between embeddings and class directions, without margin and scale.

        Args:
            embeddings: [N, features], of any length (they are normalised here); a zero row has cosine 0.
            classes: int64 [K], the classes wanted; None: all.

        Returns:
            [N, K or classes], fp32 (fp64 for fp64 embeddings), in [-1, 1].
        """
        # A softmax over cosines scaled by 30..64 does not survive half precision.
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            kernel = self.kernel if classes is None else self.kernel[:, classes]
            directions = F.normalize(kernel.to(dtype), dim=0, eps=1e-6)
            return (F.normalize(embeddings.to(dtype), dim=1, eps=1e-6) @ directions).clamp(-1, 1)

    def _with_margin(self, cosine: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, embeddings: Tensor, labels: Tensor, classes: Tensor | None = None) -> Tensor:
        """Logits for a cross-entropy loss.

        Args:
            embeddings: [N, features], e.g. ``XCosHead.identity(features)``.
            labels: int64 or int32 [N], class of each row. The range is checked on the CPU; on a GPU, where
                that would stall the stream, only dtype and shape are.
            classes: int64 [K], ascending, for a softmax over a part of the classes (Partial FC, arXiv 2010.05222):
                column j belongs to class ``classes[j]``, and every label must be among them; None: all classes.

        Returns:
            [N, K or classes], fp32 (fp64 for fp64 embeddings): scale * cosine, with the margin at the true class.

        Raises:
            TypeError: labels of another dtype.
            ValueError: a wrong shape, or a label out of range.
        """
        self._check(embeddings, labels)
        cosine = self.cosine(embeddings, classes)
        column = labels.long().unsqueeze(1)
        if classes is not None:
            column = torch.searchsorted(classes, column)
        target = self._with_margin(cosine.gather(1, column))
        return self.scale * cosine.scatter(1, column, target)

    def extra_repr(self) -> str:
        return f"{self.features}, {self.classes}, scale={self.scale}, margin={self.margin}"


class ArcFaceHead(_MarginHead):
    """Additive angular margin (Deng et al., ArcFace, arXiv 1801.07698).

    The true class's logit is s * cos(theta + m) for theta <= pi - m, and s * (cos(theta) - m sin(m)) beyond,
    which keeps it decreasing in theta. Gradients are finite everywhere, also at cos(theta) = +-1.

    Args:
        features: length of the embedding; 32 * 7 * 7 = 1568 for the flattened grid feature.
        classes: number of identities.
        scale: s > 0.
        margin: m in radians, 0 <= m < pi.

    The class directions are the columns of ``kernel`` [features, classes], as in the public weights.

    >>> head = ArcFaceHead(8, 5)
    >>> head(torch.randn(3, 8), torch.tensor([0, 4, 2])).shape
    torch.Size([3, 5])
    """

    def __init__(self, features: int, classes: int, *, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__(features, classes, scale, margin)
        if margin >= math.pi:
            raise ValueError(f"margin: expected an angle below pi, got {margin}")

    def _with_margin(self, cosine: Tensor) -> Tensor:
        sine = (1 - cosine.square()).clamp_min(_MIN_SIN2).sqrt()
        inside = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        beyond = cosine - self.margin * math.sin(self.margin)
        return torch.where(cosine > -math.cos(self.margin), inside, beyond)


class CosFaceHead(_MarginHead):
    """Additive cosine margin (Wang et al., CosFace, arXiv 1801.09414): s * (cos(theta) - m) at the true
    class.

    Args:
        features: length of the embedding; 32 * 7 * 7 = 1568 for the flattened grid feature.
        classes: number of identities.
        scale: s > 0.
        margin: m >= 0, in units of the cosine.

    The class directions are the columns of ``kernel`` [features, classes], as in the public weights.

    >>> head = CosFaceHead(2, 2, scale=10.0, margin=0.2)
    >>> head.kernel.data = torch.eye(2)
    >>> head(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).tolist()
    [[8.0, 0.0]]
    """

    def __init__(self, features: int, classes: int, *, scale: float = 30.0, margin: float = 0.35) -> None:
        super().__init__(features, classes, scale, margin)

    def _with_margin(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin
