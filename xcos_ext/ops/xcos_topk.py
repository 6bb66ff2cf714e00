"""xcos_topk: the best gallery faces of every probe, without a matrix of all pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._kept import kept
from ._library import forward_mode, library
from .templates import Templates
from .xcos_matrix import AllPairs

__all__ = ["XCosTopk", "xcos_topk"]

_OP = "xcos_topk"
_update = torch.ops.xcos_ext.xcos_topk_update.default

MOST_K = 2048

# Scores that exist at a time, and probes they may belong to: they stay in the cache between their making and their
# sifting.
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
_BLOCK_PROBES = 1024


@kept
class XCosTopk(NamedTuple):
    """The best gallery faces of P probes, best first; the lower index first where scores are equal.

    Attributes:
        values: scores [P, k], float32 (float64 for float64 templates); -inf where there are fewer than k hits.
        indices: positions in the gallery [P, k], int64; -1 where there are fewer than k hits.

    >>> from xcos_ext import Templates
    >>> faces = Templates.from_features(torch.eye(2).view(2, 2, 1, 1))
    >>> xcos_topk(faces, faces, 3).indices[0].tolist()
    [0, 1, -1]
    """

    values: Tensor
    indices: Tensor


@torch.library.register_fake("xcos_ext::xcos_topk_update", lib=library)
def _fake(*args: Any) -> None:
    return None


def checked_k(k: Any, op: str = _OP) -> int:
    """The argument k of a search: an int from 1 to 2048."""
    k = _checks.checked_index(op, "k", k)
    if not 1 <= k <= MOST_K:
        raise RuntimeError(f"{op}: k: expected 1 to {MOST_K}, got {k}")
    return k


def _checked_exclude(exclude: Any, probes: Templates, gallery: Templates) -> tuple[Tensor | None, Tensor | None]:
    """Indices [P, E] and mask [P or 1, G], at most one of them."""
    if exclude is None:
        return None, None
    if not isinstance(exclude, Tensor):
        raise TypeError(f"{_OP}: exclude: expected a tensor or None, got {type(exclude).__name__}")
    if exclude.layout != torch.strided:
        raise RuntimeError(f"{_OP}: exclude: expected a dense tensor, got {exclude.layout}")
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


def checked_score(min_score: Any, op: str = _OP) -> float:
    """The argument min_score of a search; None is -inf."""
    if min_score is None:
        return -math.inf
    min_score = _checks.checked_number(op, "min_score", min_score)
    if math.isnan(min_score):
        raise RuntimeError(f"{op}: min_score: expected a number or None, got nan")
    return min_score


class TopkLists:
    """Running lists of the best gallery faces of P probes, fed part by part; their order does not depend on the parts.

    Args:
        probes: P.
        k: places per probe.
        dtype: of the scores: float32 or float64.
        device: where the scores are.
        min_score: scores below it are no hits.
    """

    def __init__(
        self, probes: int, k: int, dtype: torch.dtype, device: torch.device, min_score: float = -math.inf
    ) -> None:
        self.min_score = min_score
        self.values = torch.full((probes, k), -math.inf, dtype=dtype, device=device)
        self.indices = torch.full((probes, k), -1, dtype=torch.int64, device=device)

    @property
    def result(self) -> XCosTopk:
        """The lists as they are now."""
        return XCosTopk(self.values, self.indices)

    def add_scores(
        self,
        scores: Tensor,
        first_index: int,
        *,
        rows: slice = slice(None),
        exclude_indices: Tensor | None = None,
        exclude_mask: Tensor | None = None,
    ) -> None:
        """Sift scores [P', M] of the probes ``rows`` against the gallery faces from ``first_index`` on."""
        _update(
            self.values[rows], self.indices[rows], scores, first_index, self.min_score, exclude_indices, exclude_mask
        )

    def add_pairs(
        self,
        pairs: AllPairs,
        first_index: int,
        *,
        exclude_indices: Tensor | None = None,
        exclude_mask: Tensor | None = None,
    ) -> None:
        """Score all pairs, a block at a time, and sift them.

        Args:
            pairs: the probes against a part of the gallery.
            first_index: index of the part's first face.
            exclude_indices: int64 [P, E], counted from the whole gallery's beginning.
            exclude_mask: bool [1 or P, M], of the part.
        """
        count = len(pairs.probes)
        for rows, part in score_blocks(count, len(pairs.gallery), pairs.dtype, self.values.device):
            mask = exclude_mask
            if mask is not None:
                mask = mask[:, part] if mask.shape[0] == 1 else mask[rows, part]
            self.add_scores(
                pairs.scores(rows, part),
                first_index + part.start,
                rows=rows,
                exclude_indices=None if exclude_indices is None else exclude_indices[rows],
                exclude_mask=mask,
            )

    def add_lists(self, values: Tensor, indices: Tensor) -> None:
        """Merge other lists of the same probes, [P, m], in any order; index -1 marks an empty place."""
        self.values, self.indices = best_of(
            torch.cat((self.values, values), 1), torch.cat((self.indices, indices), 1), self.values.shape[1]
        )


def best_of(values: Tensor, indices: Tensor, k: int) -> XCosTopk:
    """The k best of lists [P, m], m >= k: higher values first, then lower indices; empty places last."""
    order = torch.where(indices < 0, torch.iinfo(torch.int64).max, indices).argsort(dim=1, stable=True)
    values, indices = values.gather(1, order), indices.gather(1, order)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return XCosTopk(values.gather(1, order), indices.gather(1, order))


def columns_at_a_time(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """Gallery faces whose scores with so many probes the cache holds, at least 1,024."""
    room = _BLOCK_BYTES.get(device.type, 8 << 20) // (max(rows, 1) * dtype.itemsize)
    return max(1024, room // 1024 * 1024)


def score_blocks(probes: int, faces: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix [probes, faces] small enough to be sifted while the cache holds them."""
    for top in range(0, probes, _BLOCK_PROBES):
        rows = slice(top, min(top + _BLOCK_PROBES, probes))
        block = columns_at_a_time(rows.stop - rows.start, dtype, device)
        for start in range(0, faces, block):
            yield rows, slice(start, min(start + block, faces))


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

    >>> from xcos_ext import Templates
    >>> faces = Templates.from_features(torch.eye(3).view(3, 3, 1, 1))
    >>> hits = xcos_topk(faces, faces, 1)
    >>> hits.indices.flatten().tolist(), hits.values.flatten().tolist()
    ([0, 1, 2], [1.0, 1.0, 1.0])
    """
    pairs = AllPairs(_OP, probes, gallery, attention)
    if forward_mode(*probes.tensors, *gallery.tensors, attention):
        raise RuntimeError(
            f"{_OP}: expected templates without tangents, got some with: a search has no derivatives; xcos_matrix has"
        )
    k = checked_k(k)
    floor = checked_score(min_score)
    indices, mask = _checked_exclude(exclude, probes, gallery)
    first_index = _checks.checked_index(_OP, "first_index", first_index)
    if not 0 <= first_index < 2**62:
        raise RuntimeError(f"{_OP}: first_index: expected 0 or more, below 2^62, got {first_index}")
    lists = TopkLists(len(probes), k, pairs.dtype, probes.device, floor)
    lists.add_pairs(pairs, first_index, exclude_indices=indices, exclude_mask=mask)
    return lists.result
