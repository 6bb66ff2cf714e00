"""grid_match: cell cosines of two feature maps in which each cell may find its partner nearby."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _checks
from ._kept import kept
from ._library import apply, library, promote_under_autocast
from ._two_maps import two_map_operator

__all__ = ["MATCHES", "MATCH_TEMPERATURE", "MOST_RADIUS", "GridMatch", "Match", "check_matching", "grid_match"]

_OP = "grid_match"

Match = Literal["best", "soft"]

# Values of the operators' `match` argument (Match in csrc/core/grid_match.h).
MATCHES = ("best", "soft")
MOST_RADIUS = 7
MATCH_TEMPERATURE = 0.1

_forward = torch.ops.xcos_ext.grid_match.default
_forward_offsets = torch.ops.xcos_ext.grid_match.offsets
_backward = torch.ops.xcos_ext.grid_match_backward.default


@kept
class GridMatch(NamedTuple):
    """Matched cosines with the neighbours that gave them.

    Attributes:
        similarity: S [N, H, W].
        offsets: int8 [N, D, 2, H, W], rows down and columns right from a cell to its chosen neighbour. Direction 0
            leads from cells of ``a`` to cells of ``b``, direction 1 (D = 2: symmetric matching) from ``b`` to ``a``.

    >>> a = torch.eye(9).view(1, 9, 3, 3)
    >>> GridMatch._fields == tuple(grid_match(a, a, return_offsets=True)._asdict())
    True
    """

    similarity: Tensor
    offsets: Tensor


def _check(op: str, a: Tensor, b: Tensor, radius: int, match: int, temperature: float, eps: float) -> None:
    _checks.check_features(op, a, b)
    _checks.check_match(op, radius, match, temperature)
    _checks.check_positive(op, "eps", eps)


@torch.library.register_fake("xcos_ext::grid_match", lib=library)
def _fake(a: Tensor, b: Tensor, radius: int, match: int, temperature: float, symmetric: bool, eps: float) -> Tensor:
    _check(_OP, a, b, radius, match, temperature, eps)
    n, _, h, w = a.shape
    return torch.empty((n, h, w), dtype=_checks.result_dtype(a.dtype), device=a.device)


@torch.library.register_fake("xcos_ext::grid_match.offsets", lib=library)
def _fake_offsets(
    a: Tensor, b: Tensor, radius: int, match: int, temperature: float, symmetric: bool, eps: float
) -> tuple[Tensor, Tensor]:
    similarity = _fake(a, b, radius, match, temperature, symmetric, eps)
    if match != 0:
        raise RuntimeError(f"{_OP}: match: expected 0 (best) with offsets, got {match}")
    n, h, w = similarity.shape
    return similarity, similarity.new_empty((n, 2 if symmetric else 1, 2, h, w), dtype=torch.int8)


@torch.library.register_fake("xcos_ext::grid_match_backward", lib=library)
def _fake_backward(
    grad_similarity: Tensor,
    a: Tensor,
    b: Tensor,
    radius: int,
    match: int,
    temperature: float,
    symmetric: bool,
    eps: float,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    op = "grid_match_backward"
    _check(op, a, b, radius, match, temperature, eps)
    _checks.check_gradient(op, "grad_similarity", grad_similarity, a, True)
    return _checks.gradient_map(a, need_a), _checks.gradient_map(b, need_b)


_GridMatch, _GridMatchOffsets = two_map_operator(_OP, _backward, default=_forward, offsets=_forward_offsets)


def check_matching(op: str, radius: int, match: str, temperature: float, *, name: str = "temperature") -> int:
    """The operators' value of ``match``, after a look at the arguments that only Python has.

    Raises:
        TypeError: a number in a tensor, or a radius that is not an integer.
        RuntimeError: an unknown kind of match, or a temperature for one that has none.
    """
    for argument, value in (("radius", radius), (name, temperature)):
        if isinstance(value, Tensor):
            raise TypeError(
                f"{op}: {argument}: expected a number, got a tensor, whose value would have to be waited for"
            )
    if isinstance(radius, bool) or not isinstance(radius, int):
        raise TypeError(f"{op}: radius: expected an integer, got {type(radius).__name__}")
    if match not in MATCHES:
        raise RuntimeError(f"{op}: match: expected 'best' or 'soft', got {match!r}")
    if match == "best" and temperature != MATCH_TEMPERATURE:
        temperature = _checks.checked_number(op, name, temperature)
        raise RuntimeError(
            f"{op}: {name}: expected the default with match='best', as it belongs to match='soft', got {temperature:g}"
        )
    return MATCHES.index(match)


@overload
def grid_match(
    a: Tensor,
    b: Tensor,
    *,
    radius: int = ...,
    match: Match = ...,
    temperature: float = ...,
    symmetric: bool = ...,
    eps: float = ...,
    return_offsets: Literal[False] = ...,
) -> Tensor: ...
@overload
def grid_match(
    a: Tensor,
    b: Tensor,
    *,
    radius: int = ...,
    match: Match = ...,
    temperature: float = ...,
    symmetric: bool = ...,
    eps: float = ...,
    return_offsets: Literal[True],
) -> GridMatch: ...
def grid_match(
    a: Tensor,
    b: Tensor,
    *,
    radius: int = 1,
    match: Match = "best",
    temperature: float = MATCH_TEMPERATURE,
    symmetric: bool = True,
    eps: float = 1e-6,
    return_offsets: bool = False,
) -> Tensor | GridMatch:
    """Cell cosines that tolerate faces out of alignment: each cell is matched with its neighbourhood in the other map.

    With ``c_ij`` the cosine of :func:`grid_cosine` between cell i of ``a`` and cell j of ``b``, and j over the cells
    inside the grid at most ``radius`` rows and columns from i: ``S_i = max_j c_ij`` ("best"), or
    ``S_i = sum_j p_j c_ij`` with ``p = softmax_j(c_ij / temperature)`` ("soft"). One pass over both maps; nothing but
    the outputs is allocated.

    Args:
        a: Feature maps [N, C, H, W], float16, bfloat16, float32 or float64; contiguous or channels_last, any
            batch stride (``expand`` broadcasts without a copy).
        b: Feature maps of the same shape, dtype and device.
        radius: How many rows and columns away a partner may be, 0 to 7. 0 gives :func:`grid_cosine` to the bit.
        match: "best" or "soft".
        temperature: Of the soft choice, in units of the cosine, above 0: small is nearly the best, large the mean.
            Given with ``match="soft"`` only.
        symmetric: The mean of matching ``a``'s cells in ``b`` and ``b``'s cells in ``a``, so that faces may change
            places; else the former alone.
        eps: Lower bound of a cell's norm, above 0.
        return_offsets: Return the chosen neighbours too ("best" only).

    Returns:
        S [N, H, W], float64 for float64 features, else float32; with ``return_offsets`` a :class:`GridMatch`. Among
        equal cosines the first in row-major order is chosen. Differentiable once, in a and b; "best" passes the
        gradient to the chosen neighbour. A zero cell has cosine and gradient 0; NaN reaches the cells whose
        neighbourhood it is in.

    Raises:
        RuntimeError: An argument has the wrong rank, shape, dtype, device or value.
        TypeError: a or b is not a tensor, radius not an integer, a flag not True or False, or a number is in a tensor.

    >>> a = torch.eye(9).view(1, 9, 3, 3)  # every cell another direction
    >>> moved = a.roll(1, dims=3)
    >>> grid_match(a, moved, radius=0).sum().item(), grid_match(a, moved, radius=1, symmetric=False).sum().item()
    (0.0, 6.0)
    """
    mode = check_matching(_OP, radius, match, temperature)
    symmetric = _checks.checked_flag(_OP, "symmetric", symmetric)
    return_offsets = _checks.checked_flag(_OP, "return_offsets", return_offsets)
    _checks.refuse_tensor(_OP, "eps", eps)
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{_OP}: {name}: expected a torch.Tensor, got {type(value).__name__}")
    if return_offsets and match != "best":
        raise RuntimeError(f"{_OP}: return_offsets: expected False with match='soft', which chooses none, got True")
    if a.dtype != b.dtype:
        a, b = promote_under_autocast(a, b)
    needs_grad = a.requires_grad or b.requires_grad
    options = (radius, mode, temperature, symmetric, eps)
    if return_offsets:
        return GridMatch(*apply(_GridMatchOffsets, _forward_offsets, needs_grad, a, b, *options))
    return apply(_GridMatch, _forward, needs_grad, a, b, *options)
