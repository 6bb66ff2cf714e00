"""Learned attention over the cells of a pair (xCos, arXiv 2003.05383)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext.ops.templates import (
    EPS,
    AttentionParameters,
    AttentionState,
    Role,
    Templates,
    cell_norms,
    check_features,
    check_role,
    check_storage,
    exact_convolutions,
    in_chunks,
    result_dtype,
    unit_cells,
)
from xcos_ext.ops.xcos_head import HEAD_HIDDEN, HeadLayer, HeadParameters

__all__ = ["XCosAttention"]

Normalizer = Literal["softmax", "min-shift"]


def _min_shift(logits: Tensor) -> Tensor:
    """(x - min x) / sum(x - min x) over the cells [N, H, W]; a map of equal values becomes uniform."""
    flat = logits.flatten(1)
    shifted = flat - flat.amin(1, keepdim=True)
    total = shifted.sum(1, keepdim=True)
    # Divide by 1 where the sum is 0, so that the unused branch of `where` has no NaN gradient.
    weights = shifted / torch.where(total > 0, total, torch.ones_like(total))
    weights = torch.where(total > 0, weights, torch.full_like(weights, 1.0 / flat.shape[1]))
    return weights.view_as(logits)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch norm behind it, as it is in evaluation mode."""
    if norm is None:
        assert conv.bias is not None
        return conv.weight.to(dtype), conv.bias.to(dtype)
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise RuntimeError("templates: expected batch norms with running statistics, got track_running_stats=False")
    scale = (variance.to(dtype) + norm.eps).rsqrt()
    shift = -mean.to(dtype) if conv.bias is None else conv.bias.to(dtype) - mean.to(dtype)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    return conv.weight.to(dtype) * scale.view(-1, 1, 1, 1), shift


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its class says: no subclass, no parametrisation, no hook waiting for the call."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def _head_layer(conv: nn.Module, norm: nn.Module, activation: nn.Module) -> HeadLayer | None:
    """A layer as xcos_head reads it; None where it is not as the constructor made it, or in training mode."""
    if not (is_plain(conv, nn.Conv2d) and is_plain(norm, nn.BatchNorm2d) and is_plain(activation, nn.PReLU)):
        return None
    # Straight from the dictionaries: a dozen look-ups by attribute would cost as much as a pair.
    convolved, normed, running = conv._parameters, norm._parameters, norm._buffers
    tensors = (
        convolved["weight"],
        convolved["bias"],
        normed["weight"],
        normed["bias"],
        running["running_mean"],
        running["running_var"],
        activation._parameters["weight"],
    )
    if norm.training or any(t is None for t in tensors) or normed["weight"].dtype != convolved["weight"].dtype:  # type: ignore[union-attr]
        return None
    return HeadLayer(*tensors, norm.eps)  # type: ignore[arg-type]


class XCosAttention(nn.Module):
    """Cell weights W computed from the two grid features of a pair.

    With E the shared embedding (3x3 convolution, batch norm, PReLU) and G the attention network (3x3
    convolution, batch norm, PReLU, twice, down to one channel)::

        logits(A, B) = G(cat(E(A), E(B)))          [N, H, W]
        W(A, B)      = normalise(logits / T)       sums to 1 over the cells

    Parameter names (``embedding_net.*``, ``attention.*``) are those of the public xCos weights. This form depends on
    the order of the two faces, so (W(A, B) + W(B, A)) / 2 is used; ``symmetric=False`` is the published form.

    With ``residual=True`` the network corrects norm attention instead of standing alone::

        logits(A, B) = T (log |F(A)| + log |F(B)|) + G(cat(E(A), E(B)))

    Without G that is W_ij = |F_ij(A)| |F_ij(B)| / sum |F(A)| |F(B)|. G then ends in its second convolution, which
    starts at zero, so that training starts from norm attention exactly. Norms below 1e-6 count as 1e-6.

    Args:
        channels: channels of the grid feature.
        hidden: channels inside.
        normalize: ``"softmax"`` over the cells, or ``"min-shift"``: subtract the smallest value and divide by
            the sum (a map of equal values becomes uniform). The temperature has no effect on min-shift.
        temperature: T > 0; large values flatten W.
        symmetric: average both orders; False: the published form, which depends on the order.
        residual: a correction of norm attention; softmax only.

    Raises:
        ValueError: unknown normaliser, a temperature that is not a positive finite number, or min-shift with
            ``residual``.

    >>> weights = XCosAttention().eval()(torch.randn(2, 32, 7, 7), torch.randn(2, 32, 7, 7))
    >>> weights.shape, bool(weights.sum((1, 2)).allclose(torch.ones(2)))
    (torch.Size([2, 7, 7]), True)
    """

    def __init__(
        self,
        channels: int = 32,
        hidden: int = 16,
        *,
        normalize: Normalizer = "softmax",
        temperature: float = 1.0,
        symmetric: bool = True,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if normalize not in ("softmax", "min-shift"):
            raise ValueError(f"normalize: expected 'softmax' or 'min-shift', got {normalize!r}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
        if residual and normalize != "softmax":
            raise ValueError(f"residual: expected normalize='softmax', got {normalize!r}")
        self.channels = channels
        self.hidden = hidden
        self.normalize: Normalizer = normalize
        self.temperature = float(temperature)
        self.symmetric = bool(symmetric)
        self.residual = bool(residual)
        self.embedding_net = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.PReLU()
        )
        last = nn.Conv2d(hidden, 1, 3, padding=1)
        if self.residual:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(cast(Tensor, last.bias))
        self.attention = nn.Sequential(
            nn.Conv2d(2 * hidden, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.PReLU(),
            last,
            *(() if self.residual else (nn.BatchNorm2d(1), nn.PReLU())),
        )

    @property
    def fusable(self) -> bool:
        """Whether W is softmax(logits / T), which ``xcos_score(..., logits=True)`` computes itself."""
        return self.normalize == "softmax" and not self.symmetric

    def head_parameters(self) -> HeadParameters | None:
        """The network's tensors as :func:`xcos_ext.xcos_head` reads them, not copied.

        Returns:
            None where that operator cannot stand for this module: another normaliser or hidden width, batch norms in
            training mode or in another precision than the convolutions, modules that were replaced or carry hooks.
        """
        if self.normalize != "softmax" or self.hidden != HEAD_HIDDEN:
            return None
        embedding, attention = self._modules["embedding_net"], self._modules["attention"]
        if not (is_plain(embedding, nn.Sequential) and is_plain(attention, nn.Sequential)):  # type: ignore[arg-type]
            return None
        behind = list(attention._modules.values())  # type: ignore[union-attr]
        embed, first = _head_layer(*embedding._modules.values()), _head_layer(*behind[:3])  # type: ignore
        if embed is None or first is None:
            return None
        if not self.residual:
            last = _head_layer(*behind[3:])  # type: ignore[arg-type]
            return None if last is None else HeadParameters(embed, first, last)
        conv = behind[3]
        if not is_plain(conv, nn.Conv2d):  # type: ignore[arg-type]
            return None
        return HeadParameters(embed, first, (conv._parameters["weight"], conv._parameters["bias"]))  # type: ignore

    def config(self) -> dict[str, int | float | bool | str]:
        """The constructor's arguments, as plain values."""
        return {
            "channels": self.channels,
            "hidden": self.hidden,
            "normalize": self.normalize,
            "temperature": self.temperature,
            "symmetric": self.symmetric,
            "residual": self.residual,
        }

    def embed(self, features: Tensor) -> Tensor:
        """The shared embedding E: grid features [N, C, H, W] -> [N, hidden, H, W]."""
        if features.dim() != 4 or features.shape[1] != self.channels:
            raise ValueError(
                f"features: expected [N, {self.channels}, H, W], got {list(features.shape)} (XCosAttention)"
            )
        return self.embedding_net(features)

    def _norm_logits(self, norms_a: Tensor, norms_b: Tensor | None = None) -> Tensor:
        """T (log |F(A)| + log |F(B)|), or one face's share, from the cells' norms."""
        logs = norms_a.clamp_min(EPS).log()
        return self.temperature * (logs if norms_b is None else logs + norms_b.clamp_min(EPS).log())

    def _orders(self, features_a: Tensor, features_b: Tensor, both: bool) -> list[Tensor]:
        """The raw maps [N, H, W] of the pairs (A, B) and, where ``both``, (B, A)."""
        embedded = [self.embed(features_a), self.embed(features_b)]
        found = []
        for pair in (embedded, embedded[::-1]) if both else (embedded,):
            logits = self.attention(torch.cat(pair, 1)).squeeze(1)
            # Weights stay in fp32 under autocast; fp64 stays fp64.
            found.append(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        if self.residual:
            wide = torch.promote_types(features_a.dtype, torch.float32)
            with torch.autocast(features_a.device.type, enabled=False):
                norms = [cell_norms(features.to(wide), 1) for features in (features_a, features_b)]
                share = self._norm_logits(*norms)
            found = [logits + share for logits in found]
        return found

    def _weights(self, logits: Tensor) -> Tensor:
        if self.normalize == "min-shift":
            return _min_shift(logits)
        return (logits.flatten(1) / self.temperature).softmax(1).view_as(logits)

    def logits(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """The raw maps of the ordered pair (A, B), before temperature and normalisation.

        Args:
            features_a: grid features [N, C, H, W].
            features_b: grid features of the same shape.

        Returns:
            [N, H, W], fp32 (fp64 for fp64 features).
        """
        return self._orders(features_a, features_b, both=False)[0]

    def forward(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """Cell weights W.

        Args:
            features_a: grid features [N, C, H, W].
            features_b: grid features of the same shape.

        Returns:
            [N, H, W], fp32 (fp64 for fp64 features), non-negative, summing to 1 over the cells.
        """
        weights = [self._weights(logits) for logits in self._orders(features_a, features_b, self.symmetric)]
        return (weights[0] + weights[1]) / 2 if self.symmetric else weights[0]

    def templates(self, features: Tensor, role: Role = "probe", dtype: torch.dtype | None = None) -> Templates:
        """What all-pairs scoring needs of each face: unit features and this network's share of that face.

        Exact: ``xcos_matrix`` of templates gives the scores of :meth:`forward` in evaluation mode. Computed in fp32
        (fp64 for fp64 features or parameters) and, where nothing is differentiated, in bounded memory; otherwise
        differentiable to the features and to every parameter, so wrap a gallery that is not trained in
        ``torch.no_grad()``. Autocast has no effect.

        Args:
            features: grid features [N, C, H, W], floating-point.
            role: ``"probe"`` for the first face of the pairs, ``"gallery"`` for the second, ``"both"`` for either.
            dtype: how to store features and half-projections: float16, bfloat16, float32 or float64; None: as
                ``features``.

        Returns:
            :class:`xcos_ext.Templates`.

        Raises:
            RuntimeError: a batch norm is in training mode, so there are no fixed statistics to fold.
            ValueError: a wrong shape or role.
            TypeError: not a tensor, or a dtype that is not floating-point.
        """
        where = "templates"
        check_features(features, self.channels, where)
        check_role(role, where)
        storage = features.dtype if dtype is None else dtype
        check_storage(storage, "dtype", where)
        if any(norm.training for norm in self._norms()):
            raise RuntimeError(
                "templates: expected batch norms in evaluation mode, got training mode: a template folds their "
                "statistics, which change with every batch there; call .eval() first, which fixes the statistics and "
                "leaves all parameters trainable"
            )
        exact = torch.promote_types(torch.promote_types(features.dtype, storage), torch.float32)
        for parameter in self.parameters():
            exact = torch.promote_types(exact, parameter.dtype)
        wide = result_dtype(storage)
        with exact_convolutions(features.device):
            parts, weight = self._face_parts(role, storage, exact)
            unit, norms, projection, bias = in_chunks(parts, features, *self.parameters())
        parameters = AttentionParameters(
            weight=weight.to(wide),
            slope=weight.new_ones(1, dtype=wide)
            if self.residual
            else cast(nn.PReLU, self.attention[5]).weight.to(wide, copy=True),  # not the live parameter
            temperature=self.temperature,
            normalize=self.normalize,
            symmetric=self.symmetric,
            state=AttentionState.of(self, self.config() | {"eps": [norm.eps for norm in self._norms()]}),
        )
        grid = (features.shape[2], features.shape[3])
        return Templates(unit, norms, grid, parameters, role, projection, bias)

    def _norms(self) -> list[nn.BatchNorm2d]:
        norms = [self.embedding_net[1], self.attention[1], *(() if self.residual else (self.attention[4],))]
        return [cast(nn.BatchNorm2d, norm) for norm in norms]

    def _face_parts(
        self, role: Role, storage: torch.dtype, exact: torch.dtype
    ) -> tuple[Callable[[Tensor], Sequence[Tensor]], Tensor]:
        """The function from features to a template's tensors, and the pairs' weight [hidden, 3, 3]."""
        convolutions = (cast(nn.Conv2d, conv) for conv in (self.embedding_net[0], self.attention[0], self.attention[3]))
        behind = (*self._norms(), None)[:3]
        folded = [_folded(conv, norm, exact) for conv, norm in zip(convolutions, behind, strict=True)]
        (embed_weight, embed_bias), (weight, shift), (last_weight, last_shift) = folded
        embed_slope = cast(nn.PReLU, self.embedding_net[2]).weight.to(exact)
        slope = cast(nn.PReLU, self.attention[2]).weight.to(exact).view(1, -1, 1, 1)
        if self.symmetric:
            layers = {"probe": "uv", "gallery": "vu", "both": "uvu"}[role]
        else:
            layers = {"probe": "u", "gallery": "v", "both": "uv"}[role]

        def compute(part: Tensor) -> Sequence[Tensor]:
            part = part.to(exact)
            unit, norms = unit_cells(part)
            embedded = F.prelu(F.conv2d(part, embed_weight, embed_bias, padding=1), embed_slope)
            made: dict[str, tuple[Tensor, Tensor]] = {}
            if "u" in layers:
                u = F.conv2d(embedded, weight[:, : self.hidden], shift, padding=1)
                made["u"] = u, F.conv2d(slope * u, last_weight, last_shift, padding=1)
            if "v" in layers:
                v = F.conv2d(embedded, weight[:, self.hidden :], None, padding=1)
                made["v"] = -v, F.conv2d(v, last_weight, None, padding=1)
            projection = torch.stack([made[name][0].flatten(2).to(storage) for name in layers], 1)
            biases = [made[name][1].flatten(1) for name in layers]
            if self.residual:
                share = self._norm_logits(norms)
                biases = [bias + share for bias in biases]
            bias = torch.stack(biases, 1).to(result_dtype(storage))
            return unit.to(storage), norms.to(result_dtype(storage)), projection, bias

        return compute, (1 - slope.view(-1, 1, 1)) * last_weight[0]

    def extra_repr(self) -> str:
        return (
            f"normalize={self.normalize!r}, temperature={self.temperature}, symmetric={self.symmetric}, "
            f"residual={self.residual}"
        )
