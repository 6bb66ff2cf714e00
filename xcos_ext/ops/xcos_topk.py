"""xcos_topk: the best gallery faces of every probe, without a matrix of all pairs."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xcos_ext.ops import _checks
from xcos_ext.ops._library import library
from xcos_ext.ops.xcos_matrix import AllPairs
from xcos_ext.templates import Templates

__all__ = ["XCosTopk", "xcos_topk"]

_OP = "xcos_topk"
_update = torch.ops.xcos_ext.xcos_topk_update.default

MOST_K = 2048

# Scores that exist at a time, and probes they may belong to: they stay in the cache between their making and their
# sifting.
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
_BLOCK_PROBES = 1024


class XCosTopk(NamedTuple):
    """The best gallery faces of P probes, best first; the lower index first where scores are equal.

    Attributes:
        values: scores [P, k], float32 (float64 for float64 templates); -inf where there are fewer than k hits.
        indices: positions in the gallery [P, k], int64; -1 where there are fewer than k hits.
    """

    values: Tensor
    indices: Tensor


@torch.library.register_fake("xcos_ext::xcos_topk_update", lib=library)
def _fake(*args: Any) -> None:
    return None


def _checked_k(k: Any) -> int:
    _checks.refuse_tensor(_OP, "k", k)
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"{_OP}: k: expected an int, got {type(k).__name__}")
    k = operator.index(k)
    if not 1 <= k <= MOST_K:
        raise RuntimeError(f"{_OP}: k: expected 1 to {MOST_K}, got {k}")
    return k


def _checked_exclude(exclude: Any, probes: Templates, gallery: Templates) -> tuple[Tensor | None, Tensor | None]:
    """Indices [P, E] and mask [P or 1, G], at most one of them."""
    if exclude is None:
        return None, None
    if not isinstance(exclude, Tensor):
        raise TypeError(f"{_OP}: exclude: expected a tensor or None, got {type(exclude).__name__}")
    p, g = len(probes), len(gallery)
    shape = tuple(exclude.shape)
    if exclude.dtype == torch.bool:
        if shape not in ((g,), (p, g)):
            raise RuntimeError(
                f"{_OP}: exclude: expected bool of shape [{g}] or [{p}, {g}], got {_checks.shape_string(exclude.shape)}"
            )
        mask, indices = exclude.reshape(-1, g) if g else exclude.new_empty((1, 0)), None
    elif exclude.dtype == torch.int64:
        if not (1 <= exclude.dim() <= 2 and shape[0] == p):
            raise RuntimeError(
                f"{_OP}: exclude: expected int64 of shape [{p}] or [{p}, E], got {_checks.shape_string(exclude.shape)}"
            )
        mask, indices = None, exclude if exclude.dim() == 2 else exclude.unsqueeze(1)
    else:
        raise RuntimeError(
            f"{_OP}: exclude: expected dtype int64 (gallery indices) or bool (a mask), "
            f"got {_checks.dtype_name(exclude.dtype)}"
        )
    if exclude.device != probes.device:
        raise RuntimeError(f"{_OP}: exclude: expected device {probes.device} like probes, got {exclude.device}")
    return indices, mask


def _checked_score(min_score: Any) -> float:
    if min_score is None:
        return -math.inf
    _checks.refuse_tensor(_OP, "min_score", min_score)
    min_score = float(min_score)
    if math.isnan(min_score):
        raise RuntimeError(f"{_OP}: min_score: expected a number or None, got nan")
    return min_score


@torch.no_grad()
def xcos_topk(
    probes: Templates,
    gallery: Templates,
    k: int,
    attention: Tensor | str = "own",
    *,
    min_score: float | None = None,
    exclude: Tensor | None = None,
    first_index: int = 0,
) -> XCosTopk:
    """The k best gallery faces of every probe, exactly, in bounded memory: scores exist a block at a time.

    Not differentiable; :func:`xcos_matrix` and :func:`xcos_maps` are.

    Args:
        probes: :class:`xcos_ext.Templates`, P of them.
        gallery: templates, G of them (0 is fine); same channels, grid, dtype, device and head.
        k: hits per probe, 1 to 2048; may be larger than G.
        attention: as in :func:`xcos_matrix`.
        min_score: only scores from here on are hits; None: all.
        exclude: gallery faces that a probe must not get: their indices, int64 [P] or [P, E] (-1: none), such as the
            probe's own index to leave it out; or a mask, bool [G] or [P, G], True where excluded.
        first_index: index of the gallery's first face, 0 or more; for a gallery that is one part of a larger one.
            ``exclude`` indices count from the larger one's beginning, masks from this part's.

    Returns:
        :class:`XCosTopk`: values [P, k], indices [P, k], best first, ties to the lower index; -inf and -1 where there
        are fewer hits. A NaN score is no hit.

    Raises:
        TypeError: an argument of another type.
        RuntimeError: templates that do not fit each other, or an argument of a wrong shape, dtype, device or value.
    """
    pairs = AllPairs(_OP, probes, gallery, attention)
    k = _checked_k(k)
    floor = _checked_score(min_score)
    indices, mask = _checked_exclude(exclude, probes, gallery)
    first_index = operator.index(first_index)
    if first_index < 0:
        raise RuntimeError(f"{_OP}: first_index: expected 0 or more, got {first_index}")
    faces = len(gallery)
    best = torch.full((len(probes), k), -math.inf, dtype=pairs.dtype, device=probes.device)
    hits = torch.full((len(probes), k), -1, dtype=torch.int64, device=probes.device)
    for top in range(0, len(probes), _BLOCK_PROBES):
        rows = slice(top, min(top + _BLOCK_PROBES, len(probes)))
        count = rows.stop - rows.start
        room = _BLOCK_BYTES.get(probes.device.type, 8 << 20) // (count * pairs.dtype.itemsize)
        block = max(1024, room // 1024 * 1024)
        excluded = None if indices is None else indices[rows]
        masked = mask if mask is None or mask.shape[0] == 1 else mask[rows]
        for start in range(0, faces, block):
            part = slice(start, min(start + block, faces))
            columns = None if masked is None else masked[:, part]
            scores = pairs.scores(rows, part)
            _update(best[rows], hits[rows], scores, first_index + start, floor, excluded, columns)
    return XCosTopk(best, hits)
