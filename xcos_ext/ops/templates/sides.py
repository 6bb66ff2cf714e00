"""Two sides that are to be scored in all pairs: whether they fit, and how their cells are weighed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .._checks import dtype_name, result_dtype
from .cells import STORAGE_DTYPES
from .parameters import AttentionParameters
from .templates import Templates, differentiable, other_attention

__all__ = ["Attention", "check_sides", "resolve_attention"]


class Attention(NamedTuple):
    """How a call weighs the cells: one of three ways.

    Attributes:
        kind: ``"learned"``: from both faces' projections; ``"weights"``: known before the gallery is; ``"norm"``: by
            the product of the cells' norms.
        parameters: of learned attention, else None.
        weights: [1, H * W] for all pairs or [P, H * W] for every probe its own, float32 (float64 for float64
            templates), else None.
    """

    kind: Literal["learned", "weights", "norm"]
    parameters: AttentionParameters | None
    weights: Tensor | None


def check_sides(op: str, probes: Templates, gallery: Templates, attention: Any = "own") -> None:
    """Whether two templates can be scored against each other.

    The role counts only where the templates' own learned attention is used; with any other one only their features
    are.

    Raises:
        TypeError: one of them is not Templates.
        RuntimeError: a wrong role, other channels, grid, dtype or device, or templates of different heads.
    """
    for name, side in (("probes", probes), ("gallery", gallery)):
        if not isinstance(side, Templates):
            hint = "; make them with head.templates(features, role)" if isinstance(side, Tensor) else ""
            raise TypeError(f"{op}: {name}: expected Templates, got {type(side).__name__}{hint}")
    # Compared before they are put into words: traced sizes have none.
    compared: tuple[tuple[str, Any, Any, Callable[[Any], str]], ...] = (
        ("channels", probes.channels, gallery.channels, str),
        ("grid", probes.grid, gallery.grid, lambda grid: "{}x{}".format(*grid)),
        ("dtype", probes.dtype, gallery.dtype, dtype_name),
        ("device", probes.device, gallery.device, str),
    )
    for what, expected, got, words in compared:
        if expected != got:
            raise RuntimeError(f"{op}: gallery: expected {what} {words(expected)} like probes, got {words(got)}")
    own = isinstance(attention, str) and attention == "own"
    if own or (probes.learned and gallery.learned):
        problem = other_attention(probes, gallery)
        if problem is not None:
            raise RuntimeError(f"{op}: gallery: {problem.format(first='probes')}")
    if own and probes.learned:
        for name, side, role in (("probes", probes, "probe"), ("gallery", gallery, "gallery")):
            if side.role not in (role, "both"):
                raise RuntimeError(
                    f"{op}: {name}: expected templates of role {role!r} or 'both', got role {side.role!r}; "
                    f"make them with templates(features, role={role!r})"
                )


def resolve_attention(op: str, attention: Any, probes: Templates, gallery: Templates) -> Attention:
    """The ``attention`` argument of the all-pairs functions, checked and brought to one of three forms.

    Args:
        op: for messages.
        attention: ``"own"``, ``"uniform"``, ``"norm"``, or weights [H, W] or [P, H, W], used as they are.
        probes: checked by :func:`check_sides`.
        gallery: likewise.

    Raises:
        TypeError: neither a text nor a tensor.
        RuntimeError: an unknown name, or weights of another shape, dtype or device.
    """
    if isinstance(attention, str):
        if attention not in ("own", "uniform", "norm"):
            raise RuntimeError(
                f"{op}: attention: expected 'own', 'uniform', 'norm' or a tensor [H, W] or [P, H, W], got {attention!r}"
            )
        chosen: Any = probes.attention if attention == "own" else attention
        if isinstance(chosen, AttentionParameters):
            # Both sides' parameters are equal; those that are being learned get the gradient.
            if not differentiable(chosen) and differentiable(gallery.attention):
                chosen = gallery.attention
            return Attention("learned", chosen, None)
        if chosen == "norm":
            return Attention("norm", None, None)
        cells = probes.features.shape[1]
        uniform = probes.norms.new_full((1, cells), 1.0 / cells)
        return Attention("weights", None, uniform)
    if not isinstance(attention, Tensor):
        raise TypeError(f"{op}: attention: expected a text or a tensor, got {type(attention).__name__}")
    height, width = probes.grid
    shapes = ((height, width), (probes.faces, height, width))
    if tuple(attention.shape) not in shapes:
        raise RuntimeError(
            f"{op}: attention: expected shape {list(shapes[0])} or {list(shapes[1])}, got {list(attention.shape)}"
        )
    if attention.dtype not in STORAGE_DTYPES:
        raise RuntimeError(
            f"{op}: attention: expected dtype float16, bfloat16, float32 or float64, got {dtype_name(attention.dtype)}"
        )
    if attention.device != probes.device:
        raise RuntimeError(f"{op}: attention: expected device {probes.device} like probes, got {attention.device}")
    weights = attention.to(result_dtype(probes.dtype)).reshape(-1, height * width)
    return Attention("weights", None, weights)
