"""Heads: from a backbone's map to the grid feature F, and from two F to the score with its maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # also of several processes

from xcos_ext.backbones.plain import altered, hooked_globally
from xcos_ext.ops import XCosScore, xcos_score
from xcos_ext.ops._library import forward_mode
from xcos_ext.ops.grid_match import MATCH_TEMPERATURE, MATCHES, MOST_RADIUS, Match
from xcos_ext.ops.templates import FixedAttention, Role, Templates, check_features, check_role
from xcos_ext.ops.xcos_head import HEAD_MOST_CELLS, HeadParameters, xcos_head

from .attention import XCosAttention
from .projection import CellProjection, Cells

__all__ = ["ClosedFormHead", "Head", "XCosHead"]


class Head(nn.Module):
    """What all heads have in common: the score of grid features, templates, and how cells are compared.

    Cells are compared in their places (the default) or matched with their neighbourhoods (:meth:`set_matching`).
    """

    kind: ClassVar[str]
    in_channels: int
    channels: int
    attention: XCosAttention | None
    fixed_attention: FixedAttention | None
    radius: int = 0
    match: Match = "best"
    match_temperature: float = MATCH_TEMPERATURE

    def set_matching(self, radius: int, match: Match = "best", temperature: float = MATCH_TEMPERATURE) -> None:
        """Tolerate faces out of alignment: S becomes that of :func:`xcos_ext.grid_match`; W stays as it is.

        Scores rise, those of impostors too: what a model knew of thresholds and false match rates is unknown until it
        is calibrated again (:func:`xcos_ext.evaluation.calibrate`).
        All-pairs scoring compares cells in their places only; :meth:`templates` of such a head raises an error.

        Args:
            radius: how many rows and columns away a cell's partner may be, 0 (in its place only) to 7.
            match: ``"best"`` neighbour, or ``"soft"``: their mean by a softmax of the cosines.
            temperature: of the softmax.

        Raises:
            ValueError: a value out of range.
        """
        if isinstance(radius, bool) or not isinstance(radius, int) or not 0 <= radius <= MOST_RADIUS:
            raise ValueError(f"radius: expected an integer from 0 to {MOST_RADIUS}, got {radius!r}")
        if match not in MATCHES:
            raise ValueError(f"match: expected 'best' or 'soft', got {match!r}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature: expected a finite number above 0, got {temperature!r}")
        self.radius, self.match, self.match_temperature = radius, match, float(temperature)

    @property
    def matching(self) -> dict[str, Any] | None:
        """How cells are matched, the arguments of :meth:`set_matching`; None: they are compared in their places."""
        if self.radius == 0:
            return None
        return {"radius": self.radius, "match": self.match, "temperature": self.match_temperature}

    def config(self) -> dict[str, Any]:
        """What is needed to build the same head again beside its tensors, as plain values."""
        return {} if self.matching is None else {"matching": self.matching}

    def features(self, grid: Tensor) -> Tensor:
        """The backbone's map [N, in_channels, H, W] -> grid feature F [N, channels, H, W]."""
        raise NotImplementedError

    @overload
    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: Literal[False] = ...) -> Tensor: ...

    @overload
    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: Literal[True]) -> XCosScore: ...

    @overload
    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: bool) -> Tensor | XCosScore: ...

    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: bool = False) -> Tensor | XCosScore:
        """xCos of two batches of grid features.

        Without gradients and in evaluation mode, learned attention (softmax, 16 hidden channels, at most 64 cells) goes
        through :func:`xcos_ext.xcos_head`, up to rounding the same. Where its layers have hooks or are not those that
        were built (:meth:`XCosAttention.altered`), they are called.

        Args:
            features_a: F of the first faces [N, C, H, W].
            features_b: F of the second faces, same shape.
            return_maps: also return S and W.

        Returns:
            Scores [N], or ``XCosScore(score [N], similarity [N, H, W], attention [N, H, W])``.

        Raises:
            TypeError: not tensors, or ``return_maps`` is not True or False.
            ValueError: other shapes; also a map of the backbone, which :meth:`features` makes F of.
        """
        attention, a, b = self.attention, features_a, features_b
        if not (hasattr(a, "dim") and hasattr(b, "dim")):
            kinds = f"{type(a).__name__} and {type(b).__name__}"
            raise TypeError(f"features_a, features_b: expected tensors [N, C, H, W], got {kinds}")
        if isinstance(a, Tensor):
            self._check_channels(a, "features_a")
            if a.shape != b.shape:
                raise ValueError(f"features_b: expected shape {list(a.shape)} like features_a, got {list(b.shape)}")
        options: dict[str, Any] = {"return_maps": return_maps}
        weights: Tensor | Literal["norm"] | None
        if attention is None:
            weights = "norm" if self.fixed_attention == "norm" else None
        elif (parameters := self._fused(attention, a, b)) is not None:
            return xcos_head(
                a, b, parameters, temperature=attention.temperature, symmetric=attention.symmetric, **options
            )
        elif attention.fusable:
            weights = attention.logits(a, b)
            options |= {"logits": True, "temperature": attention.temperature}
        else:
            weights = attention(a, b)
        if self.radius:
            options |= {"radius": self.radius, "match": self.match}
            if self.match == "soft":
                options["match_temperature"] = self.match_temperature
        result: Tensor | XCosScore = xcos_score(a, b, weights, **options)
        return result

    def templates(self, features: Tensor, role: Role = "probe", dtype: torch.dtype | None = None) -> Templates:
        """Templates of faces, for scoring all pairs of them; see :meth:`XCosAttention.templates`.

        Args:
            features: F [N, C, H, W].
            role: ``"probe"``, ``"gallery"`` or ``"both"``. With uniform or norm attention templates serve both sides
                whatever is asked for.
            dtype: how to store them; None: as ``features``.

        Returns:
            :class:`xcos_ext.Templates`, differentiable to ``features``.

        Raises:
            RuntimeError: the head is in training mode, where batch norms have no fixed statistics to fold; it matches
                cells with their neighbourhoods; or it, or its attention, has hooks, methods or layers of the user's
                own, which all-pairs scoring would pass over.
            ValueError: a wrong shape or role.
            TypeError: not a tensor, or a dtype that is not floating-point.
        """
        if self.radius:
            raise RuntimeError(
                f"templates: expected a head that compares cells in their places, got radius {self.radius}: all-pairs "
                "scoring does not match cells with their neighbourhoods; score pairs with head.score, or call "
                "head.set_matching(0) first"
            )
        if found := self._other_score():
            raise RuntimeError(
                f"templates: expected a head whose pairs are scored by Head.score, got {found}: scores of templates "
                "would not be those of the head; undo this first, or score pairs with the head itself"
            )
        if isinstance(features, Tensor):
            self._check_channels(features, "templates: features")
        if any(isinstance(module, _BatchNorm) and module.training for module in self.modules()):
            raise RuntimeError(
                "templates: expected a head in evaluation mode, got training mode: templates fold the statistics of "
                "batch norm, which change with every batch there; call .eval() on the head first, which fixes the "
                "statistics and leaves all parameters trainable"
            )
        if self.attention is None:
            assert self.fixed_attention is not None
            check_features(features, self.channels, "templates")
            check_role(role, "templates")
            return Templates.from_features(features, dtype, self.fixed_attention)
        return self.attention.templates(features, role, dtype)

    def _check_channels(self, features: Tensor, argument: str) -> None:
        """Refuse what is not [N, channels, H, W], above all the map that F has yet to be made of."""
        shape = features.shape
        if len(shape) != 4 or shape[1] != self.channels:
            is_map = len(shape) == 4 and shape[1] == self.in_channels
            hint = "; of the backbone's map, head.features(map) makes the grid feature" if is_map else ""
            raise ValueError(f"{argument}: expected [N, {self.channels}, H, W], got {list(shape)}{hint}")

    def _other_score(self) -> str | None:
        """What makes this head score pairs otherwise than :meth:`score` of this class does, in words; or None."""
        if found := hooked_globally() or altered(self):
            return found
        for name in ("score", "forward"):
            if name in self.__dict__ or getattr(type(self), name) is not getattr(Head, name):
                return f"a {name} of its own ({type(self).__name__})"
        return None

    def _fused(self, attention: XCosAttention, a: Tensor, b: Tensor) -> HeadParameters | None:
        """The attention's tensors where the operator xcos_head can do all of :meth:`score`; else None.

        That is inference: no gradient, batch norms in evaluation mode. A graph to be exported, by torch.export or by
        tracing, gets standard operators, and so do function transforms; what is wrong with the features is left to the
        composition to say.
        """
        if (
            torch.is_grad_enabled()
            or self.training
            or self.radius
            or a.dim() != 4
            or _exporting()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
            or forward_mode(a, b)
        ):
            return None
        shape, dtype = a.shape, a.dtype
        if (
            shape[1] != self.channels
            or shape != b.shape
            or shape[2] * shape[3] > HEAD_MOST_CELLS
            or dtype == torch.float64
            or dtype != b.dtype
            or a.device != b.device
            or not isinstance(attention, XCosAttention)
        ):
            return None
        return attention.head_parameters()

    def forward(self, grid_a: Tensor, grid_b: Tensor) -> XCosScore:
        """Two maps [N, in_channels, H, W] -> score, similarity and attention."""
        return self.score(self.features(grid_a), self.features(grid_b), return_maps=True)


def _exporting() -> bool:
    """Whether a graph is made for torch.export; asked for real, where Dynamo of torch 2.11 answers True always."""
    return torch.compiler.is_exporting()


# What torch.compiler.assume_constant_result does, which imports the whole compiler: over a second of every start.
_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


class XCosHead(Head):
    """The trained xCos head: a projection to the grid feature F, attention W, and the score sum W * S.

    As published, F = PReLU(BN(Conv1x1(map))); S = cell-wise cosine of two F, W from :class:`XCosAttention`
    (arXiv 2003.05383).

    Args:
        in_channels: channels of the backbone's map.
        channels: channels of F.
        attention: an :class:`XCosAttention` for ``channels`` channels; None builds the published one;
            ``"uniform"`` (1 / cells) and ``"norm"`` (proportional to the cells' norms) have no parameters.
        projection: ``"shared"`` is the published 1x1 block, alike for all cells; a :class:`CellProjection` has a matrix
            for each; ``"none"`` takes the map as F, for backbones that end in it (``in_channels == channels``).

    Raises:
        ValueError: an attention or projection for another number of channels, or an unknown name.

    >>> head = XCosHead(512, 32).eval()
    >>> a, b = head.features(torch.randn(2, 512, 7, 7)), head.features(torch.randn(2, 512, 7, 7))
    >>> score, similarity, attention = head.score(a, b, return_maps=True)
    >>> bool(score.allclose((attention * similarity).sum((1, 2)), atol=1e-5))
    True
    """

    kind = "learned"

    def __init__(
        self,
        in_channels: int = 512,
        channels: int = 32,
        *,
        attention: XCosAttention | Literal["uniform", "norm"] | None = None,
        projection: CellProjection | Literal["shared", "none"] = "shared",
    ) -> None:
        super().__init__()
        if not all(isinstance(size, int) and size > 0 for size in (in_channels, channels)):
            raise ValueError(f"in_channels, channels: expected positive integers, got {in_channels!r} and {channels!r}")
        self.in_channels = in_channels
        self.channels = channels
        self.cells: CellProjection | None = None
        if isinstance(projection, CellProjection):
            if (projection.grid_shape[0], projection.channels) != (in_channels, channels):
                raise ValueError(
                    f"projection: expected one from {in_channels} to {channels} channels, got one from "
                    f"{projection.grid_shape[0]} to {projection.channels}"
                )
            self.cells = projection
        elif projection == "shared":
            block = (nn.Conv2d(in_channels, channels, 1), nn.BatchNorm2d(channels), nn.PReLU(channels))
            self.conv1x1 = nn.Sequential(*block)
        elif projection != "none":
            raise ValueError(f"projection: expected a CellProjection, 'shared' or 'none', got {projection!r}")
        elif in_channels != channels:
            raise ValueError(
                f"projection: expected {in_channels} channels, as the map has, with 'none', got {channels}"
            )
        self.attention: XCosAttention | None = None
        self.fixed_attention: FixedAttention | None = None
        if attention is None:
            self.attention = XCosAttention(channels)
        elif isinstance(attention, XCosAttention):
            if attention.channels != channels:
                raise ValueError(f"attention: expected {channels} channels, got one for {attention.channels}")
            self.attention = attention
        elif attention in ("uniform", "norm"):
            self.fixed_attention = attention
        else:
            raise ValueError(f"attention: expected an XCosAttention, 'uniform', 'norm' or None, got {attention!r}")

    @classmethod
    def from_closed_form(
        cls, head: ClosedFormHead, attention: XCosAttention | Literal["norm"] | None = None
    ) -> XCosHead:
        """A head to be trained that scores, as it starts, what a closed-form head scores.

        Args:
            head: from :func:`xcos_ext.model.plug`; its tensors are copied.
            attention: ``"norm"``, or an attention with ``residual=True``, which starts as norm attention; None: such
                a one, with 16 hidden channels.

        Raises:
            ValueError: an attention that does not start as norm attention, or for another number of channels.
        """
        if attention is None:
            attention = XCosAttention(head.channels, residual=True)
        if isinstance(attention, XCosAttention) and not attention.residual:
            raise ValueError("attention: expected 'norm' or an XCosAttention with residual=True, got one without")
        projection = CellProjection.from_tensors(dict(head.named_buffers()), head.grid_shape)
        return cls(head.grid_shape[0], head.channels, attention=attention, projection=projection)

    @property
    def projection(self) -> CellProjection | Literal["shared", "none"]:
        """The constructor's argument."""
        return self.cells if self.cells is not None else "shared" if hasattr(self, "conv1x1") else "none"

    def config(self) -> dict[str, Any]:
        """What is needed to build the same head again beside its tensors, as plain values."""
        projection = self.projection
        return {
            "in_channels": self.in_channels,
            "channels": self.channels,
            "attention": self.fixed_attention if self.attention is None else self.attention.config(),
            "projection": projection if isinstance(projection, str) else projection.config(),
            **super().config(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> XCosHead:
        """A new head from what :meth:`config` returned; ``projection`` and ``matching`` may be missing."""
        attention, projection = config["attention"], config.get("projection", "shared")
        head = cls(
            config["in_channels"],
            config["channels"],
            attention=attention if attention in ("uniform", "norm") else XCosAttention(**attention),
            projection=projection if isinstance(projection, str) else CellProjection(**projection),  # type: ignore[arg-type]
        )
        head.set_matching(**config.get("matching", {"radius": 0}))
        return head

    def features(self, grid: Tensor) -> Tensor:
        """The backbone's map [N, in_channels, H, W] -> grid feature F [N, channels, H, W]."""
        if not hasattr(grid, "dim"):
            raise TypeError(f"grid: expected a tensor [N, {self.in_channels}, H, W], got {type(grid).__name__}")
        if grid.dim() != 4 or grid.shape[1] != self.in_channels:
            raise ValueError(f"grid: expected [N, {self.in_channels}, H, W], got {list(grid.shape)} (XCosHead)")
        if self.cells is not None:
            return self.cells(grid)
        return self.conv1x1(grid) if hasattr(self, "conv1x1") else grid

    def identity(self, features: Tensor) -> Tensor:
        """F flattened to [N, channels * H * W], at unit length: what a margin head sees in training."""
        return F.normalize(features.flatten(1), dim=1)


class ClosedFormHead(Head, Cells):
    """Cells of a linear output block: F_ij = sum_kl G_ij,kl M_kl x_kl - mean_ij, scored with norm attention.

    Where a recogniser's output block is affine, its embedding is a sum over cells, emb = sum_kl M_kl x_kl +
    c: each summand is the cell's share of the identity. G hands part of every share to the neighbouring cells
    (columns sum to 1, so the sum over cells stays the embedding); without it F_ij is the cell's own share. S
    is the cosine of two F, W_ij is proportional to |F_ij(A)| |F_ij(B)|, so the score is sum F(A).F(B) / sum
    |F(A)| |F(B)|. Nothing is trained. Built by :func:`xcos_ext.model.plug`.

    Args:
        weight: M. Either one matrix for all cells [D, C], with the cell's own part in ``scale``, or one per
            cell [P, D, C] (P = H * W cells in row-major order).
        scale: [C, H, W] multiplied with the map first, or None. Required with the [D, C] form.
        spread: G [P, P] (to, from), or None for each cell on its own.
        mean: [D, H, W] subtracted from every cell after G, or None for cells that are not centred.
        basis: [P, K, D] axes onto which every cell is projected last, or None.
        constant: c [D], the embedding of an all-zero map.
        grid_shape: (C, H, W) of the map.

    Raises:
        ValueError: a tensor of another shape.

    >>> head = ClosedFormHead(torch.eye(3), scale=torch.ones(3, 7, 7), constant=torch.zeros(3), grid_shape=(3, 7, 7))
    >>> faces = torch.randn(2, 3, 7, 7)
    >>> bool(head.embedding(head.features(faces)).allclose(faces.sum((2, 3)), atol=1e-5))
    True
    """

    kind = "closed-form"
    constant: Tensor

    def __init__(
        self,
        weight: Tensor,
        *,
        scale: Tensor | None = None,
        spread: Tensor | None = None,
        mean: Tensor | None = None,
        basis: Tensor | None = None,
        constant: Tensor,
        grid_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        channels, height, width = grid_shape
        cells = height * width
        if weight.dim() < 2:
            raise ValueError(f"weight: expected [D, C] or [P, D, C], got {list(weight.shape)} (ClosedFormHead)")
        dim = weight.shape[-2]
        axes = dim if basis is None or basis.dim() != 3 else basis.shape[1]
        for name, tensor, shape in (
            ("weight", weight, (dim, channels) if scale is not None else (cells, dim, channels)),
            ("scale", scale, (channels, height, width)),
            ("spread", spread, (cells, cells)),
            ("mean", mean, (dim, height, width)),
            ("basis", basis, (cells, axes, dim)),
            ("constant", constant, (dim,)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)} (ClosedFormHead)")
            self.register_buffer(name, tensor)
        self.grid_shape = (channels, height, width)
        self.in_channels, self.channels = channels, axes
        self.attention, self.fixed_attention = None, "norm"

    def config(self) -> dict[str, Any]:
        """What is needed to build the same head again beside its tensors, as plain values."""
        return {"grid_shape": list(self.grid_shape), **super().config()}

    def features(self, grid: Tensor) -> Tensor:
        """The backbone's map [N, C, H, W] -> cell features F [N, D or K, H, W]."""
        return self.project(grid)

    def embedding(self, features: Tensor) -> Tensor:
        """The recogniser's own embedding [N, D] from cell features F [N, D, H, W]: their sum plus constants.

        Raises:
            ValueError: F was projected to fewer dimensions, so the embedding is lost.
        """
        if self.basis is not None:
            raise ValueError("features: these cells were projected, so their sum is not the embedding")
        total = features.sum((2, 3)) + self.constant
        return total if self.mean is None else total + self.mean.sum((1, 2))

    def extra_repr(self) -> str:
        return (
            f"{self.grid_shape[0]} -> {self.channels}, centred={self.mean is not None}, "
            f"spread={self.spread is not None}, projected={self.basis is not None}"
        )
