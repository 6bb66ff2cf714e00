"""xcos_score: the attention-weighted sum of cell cosines, with its maps on request."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from . import _checks
from ._kept import kept
from ._library import apply, backward_function, compiled, differentiable, library, promote_under_autocast
from ._vmap import fold, fold_shared, unfold
from .grid_match import MATCH_TEMPERATURE, Match, check_matching, grid_match

__all__ = ["XCosScore", "xcos_score"]

# Values of the operators' `mode` argument (Attention in csrc/core/types.h).
UNIFORM, NORM, WEIGHTS, LOGITS = range(4)

_forward = torch.ops.xcos_ext.xcos_score.default
_forward_maps = torch.ops.xcos_ext.xcos_score.maps
_backward = torch.ops.xcos_ext.xcos_score_backward.default


@kept
class XCosScore(NamedTuple):
    """Score of N pairs with the maps that make it: ``score = (attention * similarity).sum((1, 2))``.

    Attributes:
        score: [N].
        similarity: S [N, H, W], the cell cosines.
        attention: W [N, H, W], the weights as used (after the softmax, where there is one).

    >>> found = xcos_score(torch.ones(1, 8, 7, 7), torch.ones(1, 8, 7, 7), return_maps=True)
    >>> torch.allclose(found.score, (found.attention * found.similarity).sum((1, 2)))
    True
    """

    score: Tensor
    similarity: Tensor
    attention: Tensor


@torch.library.register_fake("xcos_ext::xcos_score", lib=library)
def _fake(a: Tensor, b: Tensor, attention: Tensor | None, mode: int, temperature: float, eps: float) -> Tensor:
    _checks.check_score("xcos_score", a, b, attention, mode, temperature, eps)
    return torch.empty((a.shape[0],), dtype=_checks.result_dtype(a.dtype), device=a.device)


@torch.library.register_fake("xcos_ext::xcos_score.maps", lib=library)
def _fake_maps(
    a: Tensor, b: Tensor, attention: Tensor | None, mode: int, temperature: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    score = _fake(a, b, attention, mode, temperature, eps)
    n, _, h, w = a.shape
    return score, score.new_empty((n, h, w)), score.new_empty((n, h, w))


@torch.library.register_fake("xcos_ext::xcos_score_backward", lib=library)
def _fake_backward(
    grad_score: Tensor | None,
    grad_similarity: Tensor | None,
    grad_attention: Tensor | None,
    a: Tensor,
    b: Tensor,
    attention: Tensor | None,
    mode: int,
    temperature: float,
    eps: float,
    need_a: bool,
    need_b: bool,
    need_attention: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "xcos_score_backward"
    _checks.check_score(op, a, b, attention, mode, temperature, eps)
    for name, grad in (
        ("grad_score", grad_score),
        ("grad_similarity", grad_similarity),
        ("grad_attention", grad_attention),
    ):
        if grad is not None:
            _checks.check_gradient(op, name, grad, a, per_cell=name != "grad_score")
    if attention is not None and need_attention:
        grad_given = attention.new_empty(attention.shape)
    else:
        grad_given = a.new_empty((0,), dtype=_checks.result_dtype(a.dtype))
    return _checks.gradient_map(a, need_a), _checks.gradient_map(b, need_b), grad_given


def _fold_arguments(
    size: int, in_dims: tuple[Any, ...], a: Tensor, b: Tensor, attention: Tensor | None, *options: Any
) -> tuple[Any, ...]:
    n = (a if in_dims[0] is None else a.movedim(in_dims[0], 0)[0]).shape[0]
    a, b = fold(a, in_dims[0], size), fold(b, in_dims[1], size)
    if attention is None:
        return a, b, None, *options
    dim = in_dims[2]
    if attention.dim() - (dim is not None) == 3:
        return a, b, fold(attention, dim, size), *options
    return a, b, fold_shared(attention, dim, size, n), *options


def _vmap_backward(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    grads = (None if g is None else fold(g, d, size) for g, d in zip(args[:3], in_dims, strict=False))
    attention, dim = args[5], in_dims[5]
    shared = attention is not None and attention.dim() - (dim is not None) == 2
    n = (args[3] if in_dims[3] is None else args[3].movedim(in_dims[3], 0)[0]).shape[0]
    a, b, _ = _fold_arguments(size, in_dims[3:5], args[3], args[4], None)
    if shared:
        # Every pair gets its own row, and each example's map the sum over its rows.
        attention = fold_shared(attention, dim, size, n) if dim is not None else attention.expand(size * n, -1, -1)
    elif attention is not None:
        attention = fold(attention, dim, size)
    grad_a, grad_b, grad_attention = _backward(*grads, a, b, attention, *args[6:])
    if grad_attention.numel() == 0:
        attention_result, attention_dim = grad_attention, None
    else:
        attention_result, attention_dim = unfold(grad_attention, size), 0
        if shared:
            attention_result = attention_result.sum(1)
    results: list[tuple[Tensor, int | None]] = [
        (unfold(g, size), 0) if g.numel() else (g, None) for g in (grad_a, grad_b)
    ]
    results.append((attention_result, attention_dim))
    return tuple(r for r, _ in results), tuple(d for _, d in results)


_Backward = backward_function("xcos_score", _backward, _vmap_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, attention, ctx.mode, ctx.temperature, ctx.eps = inputs
    ctx.save_for_backward(a, b, attention)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, score: Tensor | None, similarity: Tensor | None = None, attention_map: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    if score is None and similarity is None and attention_map is None:
        return (None,) * 6
    a, b, attention = ctx.saved_tensors
    need_a, need_b, need_attention = ctx.needs_input_grad[:3]
    wanted = (need_a, need_b, need_attention)
    options = (ctx.mode, ctx.temperature, ctx.eps, *wanted)
    grads = apply(_Backward, _backward, True, score, similarity, attention_map, a, b, attention, *options)
    return (*(grad if need else None for grad, need in zip(grads, wanted, strict=True)), None, None, None)


_XCosScore = differentiable("xcos_score", _forward, _setup_context, _gradients, _fold_arguments)
_XCosScoreMaps = differentiable("xcos_score.maps", _forward_maps, _setup_context, _gradients, _fold_arguments)


def _needs_grad(a: Tensor, b: Tensor, attention: Tensor | None) -> bool:
    return a.requires_grad or b.requires_grad or (attention is not None and attention.requires_grad)


@overload
def xcos_score(
    a: Tensor,
    b: Tensor,
    attention: Tensor | Literal["norm"] | None = ...,
    *,
    logits: bool = ...,
    temperature: float = ...,
    eps: float = ...,
    radius: int = ...,
    match: Match = ...,
    match_temperature: float = ...,
    return_maps: Literal[False] = ...,
) -> Tensor: ...
@overload
def xcos_score(
    a: Tensor,
    b: Tensor,
    attention: Tensor | Literal["norm"] | None = ...,
    *,
    logits: bool = ...,
    temperature: float = ...,
    eps: float = ...,
    radius: int = ...,
    match: Match = ...,
    match_temperature: float = ...,
    return_maps: Literal[True],
) -> XCosScore: ...
@overload
def xcos_score(
    a: np.ndarray,
    b: np.ndarray,
    attention: np.ndarray | Literal["norm"] | None = ...,
    *,
    logits: bool = ...,
    temperature: float = ...,
    eps: float = ...,
    radius: int = ...,
    match: Match = ...,
    match_temperature: float = ...,
    return_maps: bool = ...,
) -> Any: ...
def xcos_score(
    a: Any,
    b: Any,
    attention: Any = None,
    *,
    logits: bool = False,
    temperature: float = 1.0,
    eps: float = 1e-6,
    radius: int = 0,
    match: Match = "best",
    match_temperature: float = MATCH_TEMPERATURE,
    return_maps: bool = False,
) -> Any:
    """Similarity of N pairs of faces as a weighted sum of cell cosines: xCos (arXiv 2003.05383).

    ``score[n] = sum_ij W[n,i,j] S[n,i,j]`` with S from :func:`grid_cosine`. One pass over both maps; nothing but the
    outputs is allocated.

    Args:
        a: Feature maps [N, C, H, W], float16, bfloat16, float32 or float64; contiguous or channels_last, any
            batch stride (``expand`` broadcasts without a copy). NumPy arrays are taken as well (no bfloat16).
        b: Feature maps of the same shape, dtype and device.
        attention: Where to look. None: every cell alike, W = 1/(H*W). "norm": W proportional to the product of the
            two cells' norms (needs no training; a pair without any signal gets uniform W). A tensor [H, W] or
            [N, H, W] of any floating dtype: W itself, used as it is, or with ``logits`` the logits of a softmax over
            the cells of a pair.
        logits: ``attention`` holds logits; the softmax is fused in. -inf masks a cell.
        temperature: Divides the logits, above 0; without ``logits`` there is nothing to divide, and it must stay 1.
        eps: Lower bound of a cell's norm, above 0.
        radius: Match each cell with its neighbourhood of that many cells, 0 to 7, instead of with the one cell in its
            place: S is then that of :func:`grid_match`, symmetric. Tensors only. W is the same for every radius.
        match: "best" neighbour or "soft" choice, see :func:`grid_match`.
        match_temperature: Of the soft choice; given with ``match="soft"`` only.
        return_maps: Return S and W with the score.

    Returns:
        score [N], float64 for float64 features, else float32; with ``return_maps`` an :class:`XCosScore` (for arrays
        too). All three are differentiable once, in a, b and attention, and any number of times in forward mode
        (``torch.func.jvp``), where the score is computed in plain torch.

    Raises:
        RuntimeError: An argument has the wrong rank, shape, dtype, device or value (ValueError for NumPy arrays).
        TypeError: a, b and attention are not of one kind, tensors or arrays, an array has a mask, a number is in a
            tensor, or a flag is not True or False.

    >>> a = torch.ones(2, 32, 7, 7)
    >>> score, similarity, attention = xcos_score(a, -a, "norm", return_maps=True)
    >>> [round(x, 4) for x in score.tolist()], tuple(attention.shape)
    ([-1.0, -1.0], (2, 7, 7))
    """
    logits = _checks.checked_flag("xcos_score", "logits", logits)
    return_maps = _checks.checked_flag("xcos_score", "return_maps", return_maps)
    _checks.refuse_tensor("xcos_score", "temperature", temperature)
    _checks.refuse_tensor("xcos_score", "eps", eps)
    wrong = ValueError if isinstance(a, np.ndarray) else RuntimeError
    if attention is None:
        mode, given = UNIFORM, None
    elif isinstance(attention, str):
        if attention != "norm":
            raise wrong(f"xcos_score: attention: expected None, 'norm' or a tensor, got {attention!r}")
        mode, given = NORM, None
    else:
        mode, given = (LOGITS if logits else WEIGHTS), attention
    if logits and given is None:
        raise wrong(f"xcos_score: logits: expected False when attention is {attention!r}, got True")
    if not logits and temperature != 1.0:
        temperature = _checks.checked_number("xcos_score", "temperature", temperature)
        raise wrong(
            f"xcos_score: temperature: expected 1 without logits=True, as it divides logits alone, got {temperature:g}"
        )
    if match != "best" or type(radius) is not int or radius != 0 or match_temperature != MATCH_TEMPERATURE:
        check_matching("xcos_score", radius, match, match_temperature, name="match_temperature")
    if radius != 0:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            raise TypeError(
                f"xcos_score: radius: expected 0 for arrays, got {radius}; torch.from_numpy makes tensors of them"
            )
        maps = xcos_score(a, b, attention, logits=logits, temperature=temperature, eps=eps, return_maps=True)
        similarity = grid_match(a, b, radius=radius, match=match, temperature=match_temperature, eps=eps)
        score = (maps.attention * similarity).sum((1, 2))
        return XCosScore(score, similarity, maps.attention) if return_maps else score

    if isinstance(a, Tensor) and isinstance(b, Tensor) and (given is None or isinstance(given, Tensor)):
        if a.dtype != b.dtype:
            a, b = promote_under_autocast(a, b)
        needs_grad = _needs_grad(a, b, given)
        if not return_maps:
            return apply(_XCosScore, _forward, needs_grad, a, b, given, mode, temperature, eps)
        return XCosScore(*apply(_XCosScoreMaps, _forward_maps, needs_grad, a, b, given, mode, temperature, eps))
    if _checks.are_arrays("xcos_score", a, b, given):
        result = compiled.xcos_score_numpy(a, b, given, mode, temperature, eps, return_maps)
        return XCosScore(*result) if return_maps else result
    raise _checks.kind_error("xcos_score", a, b, given)
