"""The operators' argument checks for fake tensors.

Word for word those of csrc/ops (tensors.h, xcos_score.cpp), so that tracing and running a call fail alike;
tests/ops/test_errors.py compares the two.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcos_ext.io.arrays import refuse_masked

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_string(shape: torch.Size | tuple[int, ...]) -> str:
    return "[" + ", ".join(str(int(size)) for size in shape) + "]"


def checked_flag(op: str, name: str, value: Any) -> bool:
    """True or False themselves: anything else would count as one of them, "no" as True."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{op}: {name}: expected True or False, got {type(value).__name__}")


def _fail(op: str, message: str) -> None:
    raise RuntimeError(f"{op}: {message}")


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of scores and maps: fp64 for fp64 features, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATING:
        _fail(
            op,
            f"{name}: expected dtype float16, bfloat16, float32 or float64, got {dtype_name(tensor.dtype)}",
        )


def check_features(op: str, a: Tensor, b: Tensor) -> None:
    if a.dim() != 4:
        _fail(op, f"a: expected a feature map [N, C, H, W], got shape {shape_string(a.shape)}")
    check_dtype(op, "a", a)
    if not (a.shape[1] > 0 and a.shape[2] > 0 and a.shape[3] > 0):
        _fail(op, f"a: expected at least one channel and one cell, got shape {shape_string(a.shape)}")
    if b.dim() != 4 or any(x != y for x, y in zip(a.shape, b.shape, strict=True)):
        _fail(op, f"b: expected shape {shape_string(a.shape)} like a, got {shape_string(b.shape)}")
    if a.dtype != b.dtype:
        _fail(op, f"b: expected dtype {dtype_name(a.dtype)} like a, got {dtype_name(b.dtype)}")
    if a.device != b.device:
        _fail(op, f"b: expected device {a.device} like a, got {b.device}")


def check_shape(op: str, name: str, tensor: Tensor, sizes: tuple[int, ...]) -> None:
    if tensor.dim() != len(sizes) or any(x != y for x, y in zip(tensor.shape, sizes, strict=True)):
        _fail(op, f"{name}: expected shape {shape_string(sizes)}, got {shape_string(tensor.shape)}")


def check_positive(op: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        _fail(op, f"{name}: expected a finite number above 0, got {value:g}")


def check_match(op: str, radius: int, match: int, temperature: float) -> None:
    if not 0 <= radius <= 7:
        _fail(op, f"radius: expected 0 to 7, got {radius}")
    if match not in (0, 1):
        _fail(op, f"match: expected 0 (best) or 1 (soft), got {match}")
    check_positive(op, "temperature", temperature)


def check_head(
    op: str, a: Tensor, parameters: list[Tensor], names: list[str], norm_eps: list[float], residual: bool
) -> None:
    """What xcos_head wants beyond two maps; names: of the parameters, seven a layer."""
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    if a.dtype not in kinds:
        _fail(op, f"a: expected dtype float16, bfloat16 or float32, got {dtype_name(a.dtype)}")
    if a.shape[2] * a.shape[3] > 64:
        _fail(op, f"a: expected at most 64 cells, got shape {shape_string(a.shape)}")
    count = 16 if residual else 21
    if len(parameters) != count:
        form = "with" if residual else "without"
        _fail(op, f"parameters: expected {count} tensors {form} residual, got {len(parameters)}")
    first = parameters[0]
    for i, (name, tensor) in enumerate(zip(names, parameters, strict=False)):
        layer, place = divmod(i, 7)
        outputs = 1 if layer == 2 else 16
        if place == 0:
            check_shape(op, name, tensor, (outputs, (a.shape[1], 32, 16)[layer], 3, 3))
        else:
            check_shape(op, name, tensor, (1 if place == 6 else outputs,))
        if i == 0 and tensor.dtype not in kinds:
            _fail(op, f"{name}: expected dtype float16, bfloat16 or float32, got {dtype_name(tensor.dtype)}")
        if tensor.dtype != first.dtype:
            _fail(
                op,
                f"{name}: expected dtype {dtype_name(first.dtype)} like embed_weight, got {dtype_name(tensor.dtype)}",
            )
        if tensor.device != a.device:
            _fail(op, f"{name}: expected device {a.device} like a, got {tensor.device}")
    norms = 2 if residual else 3
    if len(norm_eps) != norms:
        _fail(op, f"norm_eps: expected {norms} numbers, got {len(norm_eps)}")
    for value in norm_eps:
        if not (math.isfinite(value) and value >= 0):
            _fail(op, f"norm_eps: expected finite numbers, 0 or more, got {value:g}")


def check_mode(op: str, mode: int) -> None:
    if not 0 <= mode <= 3:
        _fail(op, f"mode: expected 0 (uniform), 1 (norm), 2 (weights) or 3 (logits), got {mode}")


def check_attention(op: str, attention: Tensor | None, mode: int, a: Tensor) -> None:
    given = mode >= 2
    if (attention is not None) != given:
        wanted, got = ("a tensor", "None") if given else ("None", "a tensor")
        _fail(op, f"attention: expected {wanted} for this mode, got {got}")
    if attention is None:
        return
    n, _, h, w = a.shape
    shape = attention.shape
    fits = len(shape) in (2, 3) and shape[-2] == h and shape[-1] == w and (len(shape) == 2 or shape[0] == n)
    if not fits:
        _fail(op, f"attention: expected shape [{h}, {w}] or [{n}, {h}, {w}], got {shape_string(shape)}")
    check_dtype(op, "attention", attention)
    if attention.device != a.device:
        _fail(op, f"attention: expected device {a.device} like a, got {attention.device}")


def check_score(
    op: str, a: Tensor, b: Tensor, attention: Tensor | None, mode: int, temperature: float, eps: float
) -> None:
    check_features(op, a, b)
    check_mode(op, mode)
    check_attention(op, attention, mode, a)
    check_positive(op, "temperature", temperature)
    check_positive(op, "eps", eps)


def check_gradient(op: str, name: str, grad: Tensor, a: Tensor, per_cell: bool) -> None:
    wanted = (a.shape[0], a.shape[2], a.shape[3]) if per_cell else (a.shape[0],)
    if grad.dim() != len(wanted) or any(x != y for x, y in zip(grad.shape, wanted, strict=True)):
        _fail(op, f"{name}: expected shape {shape_string(wanted)}, got {shape_string(grad.shape)}")
    if grad.dtype != result_dtype(a.dtype):
        _fail(op, f"{name}: expected dtype {dtype_name(result_dtype(a.dtype))}, got {dtype_name(grad.dtype)}")
    if grad.device != a.device:
        _fail(op, f"{name}: expected device {a.device} like a, got {grad.device}")


def gradient_map(feature: Tensor, needed: bool) -> Tensor:
    """The gradient's shape and layout as csrc/ops/tensors.h allocates it."""
    if not needed:
        return feature.new_empty((0,))
    if _evenly_spaced(feature):
        grad = torch.empty_like(feature)
        if _evenly_spaced(grad):
            return grad
    return torch.empty(feature.shape, dtype=feature.dtype, device=feature.device)


def _evenly_spaced(feature: Tensor) -> bool:
    h, w = feature.shape[-2:]
    return h == 1 or w == 1 or feature.stride(-2) == w * feature.stride(-1)


def refuse_tensor(op: str, name: str, value: object) -> None:
    """A number must be a number: reading it out of a tensor would wait for the GPU."""
    if isinstance(value, Tensor):
        hint = "; to learn it, divide the logits by it" if name == "temperature" else ""
        raise TypeError(f"{op}: {name}: expected a number, got a tensor, whose value would have to be waited for{hint}")


def checked_number(op: str, name: str, value: Any) -> float:
    """A number that is not in a tensor, as a float."""
    refuse_tensor(op, name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name}: expected a number, got {type(value).__name__}")
    return float(value)


def checked_index(op: str, name: str, value: Any) -> int:
    """An integer that is not in a tensor, as an int."""
    refuse_tensor(op, name, value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name}: expected an int, got {type(value).__name__}")
    return operator.index(value)


def are_arrays(op: str, a: object, b: object, attention: object = None) -> bool:
    """Whether an operator is called with NumPy arrays; TypeError for masked ones."""
    given = {"a": a, "b": b} if attention is None else {"a": a, "b": b, "attention": attention}
    if not all(isinstance(value, np.ndarray) for value in given.values()):
        return False
    refuse_masked(**{f"{op}: {name}": value for name, value in given.items()})
    return True


def kind_error(op: str, a: object, b: object, attention: object = None) -> TypeError:
    """The error for arguments that are neither all tensors nor all arrays; names the first that does not fit."""
    if not isinstance(a, Tensor | np.ndarray):
        return TypeError(f"{op}: a: expected a torch.Tensor or a numpy.ndarray, got {type(a).__name__}")
    wanted = Tensor if isinstance(a, Tensor) else np.ndarray
    name, value = ("b", b) if not isinstance(b, wanted) else ("attention", attention)
    return TypeError(f"{op}: {name}: expected a {wanted.__name__} like a, got {type(value).__name__}")
