"""Learned attention over the cells of a pair (xCos, arXiv 2003.05383)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from xcos_ext.backbones.plain import Kinds, altered, backward_hook, hooked_globally
from xcos_ext.ops._checks import checked_flag
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
        return conv.weight.to(dtype), (conv.weight.new_zeros(1) if conv.bias is None else conv.bias).to(dtype)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = (variance.to(dtype) + norm.eps).rsqrt()
    shift = -mean.to(dtype) if conv.bias is None else conv.bias.to(dtype) - mean.to(dtype)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    return conv.weight.to(dtype) * scale.view(-1, 1, 1, 1), shift


_CONV, _SEQUENTIAL = (nn.Conv2d,), (nn.Sequential,)
_BLOCK = (_CONV, (nn.BatchNorm2d, nn.SyncBatchNorm), (nn.PReLU,))
#: The layers of both networks, without and with ``residual``.
_NETWORKS = (
    (("embedding_net", _BLOCK), ("attention", _BLOCK * 2)),
    (("embedding_net", _BLOCK), ("attention", (*_BLOCK, _CONV))),
)
#: How a convolution goes over the map.
_GEOMETRY = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
#: Methods that make W; templates and the fused head stand for these.
_METHODS = ("_norm_logits", "_orders", "_weights", "embed", "forward", "logits")


def _other_geometry(conv: nn.Module, shape: tuple[int, ...]) -> str | None:
    """What a convolution is or does other than one of the attention network, in words, or None."""
    own = conv.__dict__
    weight = own["_parameters"].get("weight")
    weight = conv.weight if weight is None else weight  # parametrised: made when it is asked for
    if (
        weight.shape == shape  # type: ignore[union-attr]
        and own["padding"] == own["stride"] == own["dilation"] == (1, 1)
        and own["groups"] == 1
        and own["padding_mode"] == "zeros"
    ):
        return None
    for name, expected in _GEOMETRY.items():
        if own[name] != expected:
            return f"expected {name} {expected!r}, got {own[name]!r}"
    return f"expected a weight {list(shape)}, got {list(weight.shape)}"  # type: ignore[union-attr, arg-type]


def _parametrised(layer: nn.Module, kinds: Kinds) -> bool:
    """Whether a layer is one of the kinds but for what :mod:`torch.nn.utils.parametrize` makes of its tensors."""
    kind = type(layer)
    return parametrize.type_before_parametrizations(layer) in kinds and altered(layer, (kind,)) is None


def _head_layer(conv: nn.Module, norm: nn.Module, activation: nn.Module) -> HeadLayer | None:
    """A layer as xcos_head reads it; None where that operator has no place for what it holds, or in training mode."""
    # Straight from the dictionaries: a dozen look-ups by attribute would cost as much as a pair.
    convolved, normed, running = conv._parameters, norm._parameters, norm._buffers
    slope = activation._parameters["weight"]
    tensors = (
        convolved["weight"],
        convolved["bias"],
        normed["weight"],
        normed["bias"],
        running["running_mean"],
        running["running_var"],
        slope,
    )
    if norm.training or any(t is None for t in tensors) or normed["weight"].dtype != convolved["weight"].dtype:  # type: ignore[union-attr]
        return None
    if slope.numel() != 1:  # type: ignore[union-attr]
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
        TypeError: ``symmetric`` or ``residual`` is not True or False.

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
        symmetric = checked_flag("XCosAttention", "symmetric", symmetric)
        residual = checked_flag("XCosAttention", "residual", residual)
        if residual and normalize != "softmax":
            raise ValueError(f"residual: expected normalize='softmax', got {normalize!r}")
        self.channels = channels
        self.hidden = hidden
        self.normalize: Normalizer = normalize
        self.temperature = float(temperature)
        self.symmetric = symmetric
        self.residual = residual
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
        return self.normalize == "softmax" and not self.symmetric and self._altered_itself() is None

    def head_parameters(self) -> HeadParameters | None:
        """The network's tensors as :func:`xcos_ext.xcos_head` reads them, not copied.

        Returns:
            None where that operator cannot stand for this module: another normaliser or hidden width, batch norms in
            training mode or in another precision than the convolutions, or anything that :meth:`altered` finds.
        """
        if self.normalize != "softmax" or self.hidden != HEAD_HIDDEN or self.altered() is not None:
            return None
        embedding, attention = self._modules["embedding_net"], self._modules["attention"]
        behind = list(attention._modules.values())  # type: ignore[union-attr]
        embed, first = _head_layer(*embedding._modules.values()), _head_layer(*behind[:3])  # type: ignore
        if embed is None or first is None:
            return None
        if not self.residual:
            last = _head_layer(*behind[3:])  # type: ignore[arg-type]
            return None if last is None else HeadParameters(embed, first, last)
        tensors = behind[3]._parameters  # type: ignore[union-attr]
        bias = tensors["bias"]
        return None if bias is None else HeadParameters(embed, first, (tensors["weight"], bias))  # type: ignore[arg-type]

    def altered(self, *, folding: bool = False) -> str | None:
        """What was done to the network so that it computes something else than its tensors, folded, would: the layer
        and what was found there. Whatever stands for the network (the fused head, templates, exported graphs) asks.

        Hooks, also those of all modules, methods and classes of the user's own, layers replaced or added, and
        convolutions of another geometry or size count; values of tensors and the settings of :meth:`config` do not.

        Args:
            folding: for those who read weights as attributes, which serves :mod:`torch.nn.utils.parametrize` too, and
                let gradients through, so that backward hooks count.

        >>> attention = XCosAttention()
        >>> attention.embedding_net[0].dilation = 2, 2
        >>> attention.altered()
        'embedding_net.0: expected dilation (1, 1), got (2, 2)'
        """
        if found := hooked_globally() or self._altered_itself():
            return found
        modules, hidden = self._modules, self.hidden
        inputs = self.channels
        for net, expected in _NETWORKS[self.residual]:
            sequence = modules[net]
            if found := altered(sequence, _SEQUENTIAL):  # type: ignore[arg-type]
                return f"{net}: expected Sequential as it was built, got {found}"
            layers = sequence._modules  # type: ignore[union-attr]
            if len(layers) != len(expected):
                return f"{net}: expected {len(expected)} layers, got {len(layers)}"
            outputs = hidden
            for (name, layer), kinds in zip(layers.items(), expected, strict=True):
                found = altered(layer, kinds)  # type: ignore[arg-type]
                if found is not None and not (folding and _parametrised(layer, kinds)):  # type: ignore[arg-type]
                    return f"{net}.{name}: expected {kinds[0].__name__} as it was built, got {found}"
                if kinds is _CONV:
                    if found := _other_geometry(layer, (outputs, inputs, 3, 3)):  # type: ignore[arg-type]
                        return f"{net}.{name}: {found}"
                    inputs, outputs = hidden, 1
            inputs = 2 * hidden
        if folding:
            for name, part in self.named_modules():
                if found := backward_hook(part):
                    return f"{name or 'attention'}: expected as it was built, got {found}"
        return None

    def _altered_itself(self) -> str | None:
        """Of :meth:`altered`, what concerns this module without its layers."""
        if found := altered(self):
            return f"attention: expected as it was built, got {found}"
        kind, own = type(self), self.__dict__
        for name in _METHODS:
            if name in own or (kind is not XCosAttention and getattr(kind, name) is not getattr(XCosAttention, name)):
                return f"attention: expected XCosAttention's {name}, got another one ({kind.__name__})"
        return None

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
            RuntimeError: a batch norm is in training mode, so there are no fixed statistics to fold; or the network
                computes more than its tensors say, through a hook or a layer of another kind (:meth:`altered`).
            ValueError: a wrong shape or role.
            TypeError: not a tensor, or a dtype that is not floating-point.
        """
        where = "templates"
        check_features(features, self.channels, where)
        check_role(role, where)
        storage = features.dtype if dtype is None else dtype
        check_storage(storage, "dtype", where)
        self._check_foldable(where)
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

    def _check_foldable(self, where: str) -> None:
        """Refuse a network that templates and graphs, which fold its tensors, would not compute as it does.

        Raises:
            RuntimeError: it was altered, or a batch norm is in training mode or without running statistics.
        """
        if found := self.altered(folding=True):
            raise RuntimeError(
                f"{where}: {found}: a template folds the attention network's tensors and does not call its layers; "
                "undo this first, or score pairs with head.score, which calls them"
            )
        for norm in self._norms():
            if norm.training:
                raise RuntimeError(
                    f"{where}: expected batch norms in evaluation mode, got training mode: a template folds their "
                    "statistics, which change with every batch there; call .eval() first, which fixes the statistics "
                    "and leaves all parameters trainable"
                )
            if norm.running_mean is None or norm.running_var is None:
                raise RuntimeError(
                    f"{where}: expected batch norms with running statistics, got track_running_stats=False: a template "
                    "folds their statistics, which are those of every batch there"
                )

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
