"""xcos_matrix: the scores of all pairs of probes and gallery faces, with learned or fixed attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xcos_ext.io.text import byte_size

from . import _checks
from ._library import apply, backward_function, differentiable, inference_only, library, tracked
from .templates import Attention, Templates, check_sides, resolve_attention, result_dtype

__all__ = ["xcos_matrix"]

_OP = "xcos_matrix"
_forward = torch.ops.xcos_ext.xcos_matrix.default
_backward = torch.ops.xcos_ext.xcos_matrix_backward.default
_fixed = torch.ops.xcos_ext.xcos_matrix_fixed.default

# Values of the operators' `normalize` argument (Normalize in csrc/core/xcos_matrix.h).
NORMALIZE = {"softmax": 0, "min-shift": 1}
_TENSORS = 8  # both sides' features, projection and bias; weight, slope

# A smaller matrix is allocated without a look at what is free.
_LARGE_BYTES = 256 << 20


@torch.library.register_fake("xcos_ext::xcos_matrix", lib=library)
def _fake(probe_features: Tensor, *rest: Any) -> Tensor:
    _check(_OP, probe_features, *rest)
    return probe_features.new_empty(
        (probe_features.shape[0], rest[2].shape[0]), dtype=result_dtype(probe_features.dtype)
    )


@torch.library.register_fake("xcos_ext::xcos_matrix_backward", lib=library)
def _fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    op = "xcos_matrix_backward"
    tensors, need_mask = rest[:_TENSORS], rest[-1]
    _check(op, *rest[:-1])
    _checks.check_shape(op, "grad", grad, (tensors[0].shape[0], tensors[3].shape[0]))
    _check_like(op, "grad", grad, result_dtype(tensors[0].dtype), tensors[0])
    return tuple(t.new_empty(t.shape if need_mask >> i & 1 else (0,)) for i, t in enumerate(tensors))


@torch.library.register_fake("xcos_ext::xcos_matrix_fixed", lib=library)
def _fake_fixed(
    probe_rows: Tensor, gallery_features: Tensor, probe_norms: Tensor | None, gallery_norms: Tensor | None
) -> Tensor:
    return probe_rows.new_empty((probe_rows.shape[0], gallery_features.shape[0]))


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if tracked(*tensors):
        raise RuntimeError(
            f"{_OP}_fixed: expected tensors without gradients, got some with: it is for inference; {_OP} has them"
        )


inference_only(f"{_OP}_fixed", _fixed, _refuse_gradients)


def _check_like(op: str, name: str, tensor: Tensor, dtype: torch.dtype, first: Tensor) -> None:
    if tensor.dtype != dtype:
        raise RuntimeError(
            f"{op}: {name}: expected dtype {_checks.dtype_name(dtype)}, got {_checks.dtype_name(tensor.dtype)}"
        )
    if tensor.device != first.device:
        raise RuntimeError(f"{op}: {name}: expected device {first.device} like probe_features, got {tensor.device}")


def _check(
    op: str,
    probe_features: Tensor,
    probe_projection: Tensor,
    probe_bias: Tensor,
    gallery_features: Tensor,
    gallery_projection: Tensor,
    gallery_bias: Tensor,
    weight: Tensor,
    slope: Tensor,
    height: int,
    width: int,
    normalize: int,
    temperature: float,
) -> None:
    """Word for word the checks of csrc/ops/xcos_matrix.cpp."""
    shape = _checks.shape_string
    first = probe_features
    if first.dim() != 3:
        raise RuntimeError(f"{op}: probe_features: expected shape [P, cells, C], got {shape(first.shape)}")
    _checks.check_dtype(op, "probe_features", first)
    if not (height >= 1 and width >= 1 and first.shape[1] == height * width and first.shape[2] >= 1):
        raise RuntimeError(
            f"{op}: probe_features: expected shape [P, {height * width}, C] for a grid of {height} x {width}, "
            f"got {shape(first.shape)}"
        )
    if not (probe_projection.dim() == 4 and probe_projection.shape[1] in (1, 2) and probe_projection.shape[2] >= 1):
        raise RuntimeError(
            f"{op}: probe_projection: expected shape [P, 1 or 2, hidden, cells], got {shape(probe_projection.shape)}"
        )
    dtype, wide = first.dtype, result_dtype(first.dtype)
    cells, orders, hidden = first.shape[1], probe_projection.shape[1], probe_projection.shape[2]
    for side, features, projection, bias in (
        ("probe", probe_features, probe_projection, probe_bias),
        ("gallery", gallery_features, gallery_projection, gallery_bias),
    ):
        faces = features.shape[0] if features.dim() else 0
        for name, tensor, sizes, kind in (
            (f"{side}_features", features, (faces, cells, first.shape[2]), dtype),
            (f"{side}_projection", projection, (faces, orders, hidden, cells), dtype),
            (f"{side}_bias", bias, (faces, orders, cells), wide),
        ):
            _checks.check_shape(op, name, tensor, sizes)
            _check_like(op, name, tensor, kind, first)
    _checks.check_shape(op, "weight", weight, (hidden, 3, 3))
    _checks.check_shape(op, "slope", slope, (1,))
    _check_like(op, "weight", weight, wide, first)
    _check_like(op, "slope", slope, wide, first)
    if normalize not in (0, 1):
        raise RuntimeError(f"{op}: normalize: expected 0 (softmax) or 1 (min-shift), got {normalize}")
    _checks.check_positive(op, "temperature", temperature)


_Backward = backward_function(_OP, _backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # What is saved are the templates themselves: nothing of the size of the pairs.
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:_TENSORS]
    mask = sum(1 << i for i, need in enumerate(needed) if need)
    grads = apply(_Backward, _backward, True, grad, *ctx.saved_tensors, *ctx.options, mask)
    return (*(g if need else None for g, need in zip(grads, needed, strict=True)), *(None,) * len(ctx.options))


_XCosMatrix = differentiable(_OP, _forward, _setup_context, _gradients)


class AllPairs:
    """Two sides and an attention, checked and ready: scores of the probes against any part of the gallery.

    Args:
        op: for messages.
        probes: :class:`xcos_ext.Templates`.
        gallery: the same.
        attention: as in :func:`xcos_matrix`.
    """

    def __init__(self, op: str, probes: Templates, gallery: Templates, attention: Tensor | str) -> None:
        check_sides(op, probes, gallery, attention)
        self.how: Attention = resolve_attention(op, attention, probes, gallery)
        self.dtype = result_dtype(probes.dtype)
        self.probes, self.gallery = probes, gallery
        if self.how.parameters is not None:
            self.probes, self.gallery = probes.as_probe(), gallery.as_gallery()
            return
        # A face's norms count up to a factor; on a GPU, which multiplies halves, it keeps them from overflowing.
        self.norms = _as_they_are if probes.device.type == "cpu" else _up_to_one
        self.probe_norms = self.norms(probes.norms)
        # What of the probes does not depend on the gallery is multiplied once.
        scale = self.probe_norms if self.how.weights is None else self.how.weights
        self.rows = probes.features.to(self.dtype) * scale.unsqueeze(2)

    def scores(self, probes: slice | None = None, gallery: slice | None = None) -> Tensor:
        """Scores [P', G'] of a part of the probes against a part of the gallery; None: all of them."""
        # Not as the parameters' defaults, where Dynamo of torch 2.11 cannot take a slice.
        probes = slice(None) if probes is None else probes
        gallery = slice(None) if gallery is None else gallery
        if self.how.parameters is not None:
            return self._learned(probes, gallery)
        rows, features = self.rows[probes], self.gallery.features[gallery]
        norms = None
        if self.how.weights is None:
            norms = self.probe_norms[probes], self.norms(self.gallery.norms[gallery])
        tensors = (rows, features, *(norms or ()))
        needs_grad = tracked(*tensors)
        if rows.device.type == "cpu" and not needs_grad:
            return _fixed(rows, features, *(norms or (None, None)))
        # A GPU multiplies rows of the stored type; gradients are those of the result's.
        dtype = self.dtype if needs_grad else features.dtype
        if norms is not None:
            features = features.to(dtype) * norms[1].unsqueeze(2)
        with torch.autocast(rows.device.type, enabled=False):
            scores = _product(rows.flatten(1).to(dtype), features.to(dtype).flatten(1).T, self.dtype)
            return scores if norms is None else _divided(scores, *norms)

    def _learned(self, chosen: slice, gallery: slice) -> Tensor:
        parameters = self.how.parameters
        assert parameters is not None
        tensors = []
        for side, part in ((self.probes, chosen), (self.gallery, gallery)):
            assert side.projection is not None and side.bias is not None
            tensors += [side.features[part], side.projection[part], side.bias[part]]
        tensors += [parameters.weight, parameters.slope]
        needs_grad = any(t.requires_grad for t in tensors)
        options = (*self.probes.grid, NORMALIZE[parameters.normalize], parameters.temperature)
        return apply(_XCosMatrix, _forward, needs_grad, *tensors, *options)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b on a GPU, summed and returned in ``dtype``."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype)


def _as_they_are(norms: Tensor) -> Tensor:
    return norms


def _up_to_one(norms: Tensor) -> Tensor:
    """Norms [N, cells] divided by each face's largest."""
    largest = norms.amax(1, keepdim=True)
    return norms / torch.where(largest == 0, 1.0, largest)


def _divided(scores: Tensor, probe_norms: Tensor, gallery_norms: Tensor) -> Tensor:
    """Scores of norm attention from their numerators; without any common norm the cells' cosines are 0 too."""
    total = probe_norms @ gallery_norms.T
    nothing = total == 0
    return torch.where(nothing, 0.0, scores / torch.where(nothing, 1.0, total))


def _free_bytes(device: torch.device) -> int | None:
    """Memory that an allocation may take; None where nobody says."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _refuse_what_does_not_fit(probes: Templates, gallery: Templates) -> None:
    wide = result_dtype(probes.dtype)
    size = len(probes) * len(gallery) * wide.itemsize
    if size < _LARGE_BYTES or torch.compiler.is_compiling():
        return
    free = _free_bytes(probes.device)
    if free is not None and size > free:
        raise RuntimeError(
            f"{_OP}: probes, gallery: expected a matrix that fits in memory, got [{len(probes)}, {len(gallery)}] "
            f"{_checks.dtype_name(wide)}, which takes {byte_size(size)} where {byte_size(free)} are free; "
            "xcos_topk finds the best of each row without it"
        )


def xcos_matrix(probes: Templates, gallery: Templates, attention: Tensor | str = "own") -> Tensor:
    """Scores of all pairs of probes and gallery faces, exactly: ``score[p, g] = sum_ij W[p,g,i,j] S[p,g,i,j]``.

    With the templates' own learned attention W is that of the attention network for this very pair: the first
    convolution is linear over the two faces, so its parts are in the templates, and what depends on the pair (a
    maximum, the second convolution, the softmax) is computed in registers. Differentiable once to the features,
    projections and biases of both sides and to the attention's parameters; the backward pass computes the pairs again
    instead of storing anything of their size, so that losses over all pairs of a batch are affordable. In forward mode
    it is plain torch, differentiable any number of times, and holds [P, G, hidden, cells].

    Args:
        probes: :class:`xcos_ext.Templates` of the pairs' first faces, P of them.
        gallery: templates of the second faces, G of them; same channels, grid, dtype, device and head.
        attention: ``"own"`` (the templates': learned, ``"norm"`` or ``"uniform"``), ``"uniform"`` (every cell alike),
            ``"norm"`` (proportional to the product of the two cells' norms), or weights [H, W] or [P, H, W], one map
            for all or one a probe, used as they are. All but learned attention are products of matrices.

    Returns:
        [P, G], float32 (float64 for float64 templates). A face with NaN gives NaN in its own pairs only.

    Raises:
        TypeError: an argument of another type.
        RuntimeError: templates that do not fit each other (channels, grid, dtype, device, role, or another head's), a
            wrong attention, or a matrix larger than the memory that is free.

    >>> from xcos_ext import Templates
    >>> faces = Templates.from_features(torch.eye(3).view(3, 3, 1, 1))
    >>> xcos_matrix(faces[:2], faces)
    tensor([[1., 0., 0.],
            [0., 1., 0.]])
    """
    pairs = AllPairs(_OP, probes, gallery, attention)
    _refuse_what_does_not_fit(probes, gallery)
    return pairs.scores()
