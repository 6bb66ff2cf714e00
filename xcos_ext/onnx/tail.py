"""An output block of affine ONNX operators, evaluated in torch: exact in every precision, and with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .graph import Graph

if TYPE_CHECKING:
    import onnx

__all__ = ["AffineTail", "NotAffineError"]


class NotAffineError(ValueError):
    """An operator that is not affine over the map, or that is not known here; the message names it."""


@dataclass(frozen=True)
class _Step:
    """A node: its operator, where its inputs come from ("" for none), what it makes, its attributes."""

    op: str
    inputs: tuple[str, ...]
    output: str
    settings: dict[str, Any]
    opset: int


# Values are tensors: of integers, on the CPU, where they are a shape or a list of axes; None for an input left out.
_Operator = Callable[[_Step, list[Any]], Tensor]


def _ints(step: _Step, values: list[Any], place: int, name: str) -> list[int] | None:
    """A list of integers that older opsets have as attribute and newer ones as input."""
    if len(values) > place and values[place] is not None:
        return [int(i) for i in values[place].reshape(-1)]
    found = step.settings.get(name)
    return None if found is None else [int(i) for i in found]


def _both(values: list[Any]) -> tuple[Tensor, Tensor]:
    """Two operands in one type, which is the larger of their types."""
    a, b = values
    if not (a.is_floating_point() and b.is_floating_point()):
        raise NotAffineError("it computes with shapes")
    kind = torch.promote_types(a.dtype, b.dtype)
    return a.to(kind), b.to(kind)


def _conv(step: _Step, values: list[Any]) -> Tensor:
    x, weight = values[0], values[1].to(values[0].dtype)
    bias = values[2].to(x.dtype) if len(values) > 2 and values[2] is not None else None
    if step.settings.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise NotAffineError("its padding is not explicit")
    dims = weight.dim() - 2
    pads = step.settings.get("pads", [0] * 2 * dims)
    x = F.pad(x, [p for d in reversed(range(dims)) for p in (pads[d], pads[d + dims])])
    convolve: Any = {1: F.conv1d, 2: F.conv2d}[dims]
    options = (step.settings.get("strides", [1] * dims), 0, step.settings.get("dilations", [1] * dims))
    made: Tensor = convolve(x, weight, bias, *options, step.settings.get("group", 1))
    return made


def _gemm(step: _Step, values: list[Any]) -> Tensor:
    a, b = values[0], values[1].to(values[0].dtype)
    a = a.T if step.settings.get("transA") else a
    b = b.T if step.settings.get("transB") else b
    made: Tensor = step.settings.get("alpha", 1.0) * (a @ b)
    if len(values) > 2 and values[2] is not None:
        made = made + step.settings.get("beta", 1.0) * values[2].to(a.dtype)
    return made


def _batch_norm(step: _Step, values: list[Any]) -> Tensor:
    get = step.settings.get
    if get("training_mode") or not get("is_test", 1) or not get("spatial", 1):
        raise NotAffineError("it takes its statistics from the batch")
    x = values[0]
    weight, bias, mean, var = (v.to(x.dtype) for v in values[1:5])
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, get("epsilon", 1e-5))


def _reshape(step: _Step, values: list[Any]) -> Tensor:
    x, shape = values[0], values[1].tolist()
    if not step.settings.get("allowzero"):
        shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    made: Tensor = x.reshape(shape)
    return made


def _flatten(step: _Step, values: list[Any]) -> Tensor:
    x, axis = values[0], step.settings.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    made: Tensor = x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), -1)
    return made


def _squeeze(step: _Step, values: list[Any]) -> Tensor:
    axes = _ints(step, values, 1, "axes")
    made: Tensor = values[0].squeeze() if axes is None else values[0].squeeze(tuple(axes))
    return made


def _unsqueeze(step: _Step, values: list[Any]) -> Tensor:
    x, axes = values[0], _ints(step, values, 1, "axes") or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    made: Tensor = x
    return made


def _reduce(step: _Step, values: list[Any]) -> Tensor:
    axes, x = _ints(step, values, 1, "axes"), values[0]
    if axes is None:
        if step.settings.get("noop_with_empty_axes"):
            return x
        axes = list(range(x.dim()))
    reduce = torch.mean if step.op == "ReduceMean" else torch.sum
    return reduce(x, tuple(axes), keepdim=bool(step.settings.get("keepdims", 1)))


def _average_pool(step: _Step, values: list[Any]) -> Tensor:
    settings = step.settings
    kernel = settings["kernel_shape"]
    pads, dims = settings.get("pads", [0, 0, 0, 0]), len(kernel)
    plain = settings.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID") and not settings.get("ceil_mode")
    if dims != 2 or not plain or list(pads[:2]) != list(pads[2:]) or set(settings.get("dilations", [1])) != {1}:
        raise NotAffineError("its padding is of a kind that is not known here")
    counted = bool(settings.get("count_include_pad", 0))
    return F.avg_pool2d(values[0], kernel, settings.get("strides", [1, 1]), list(pads[:2]), False, counted)


def _same(step: _Step, values: list[Any]) -> Tensor:
    # Also a cast: the precision of numbers is the caller's, and shapes are integers in any case.
    made: Tensor = values[0]
    return made


def _shape(step: _Step, values: list[Any]) -> Tensor:
    return torch.tensor(values[0].shape)[step.settings.get("start", 0) : step.settings.get("end")]


def _gather(step: _Step, values: list[Any]) -> Tensor:
    if values[0].is_floating_point():
        raise NotAffineError("it picks parts of the map")
    made: Tensor = values[0][values[1]]
    return made


def _concat(step: _Step, values: list[Any]) -> Tensor:
    if len({value.is_floating_point() for value in values}) > 1:
        raise NotAffineError("it joins a map and a shape")
    return torch.cat([torch.atleast_1d(value) for value in values], step.settings.get("axis", 0))


def _slice(step: _Step, values: list[Any]) -> Tensor:
    starts, ends = _ints(step, values, 1, "starts"), _ints(step, values, 2, "ends")
    if values[0].is_floating_point() or starts is None or ends is None or len(starts) != 1:
        raise NotAffineError("it picks parts of the map")
    made: Tensor = values[0][starts[0] : ends[0] : (_ints(step, values, 4, "steps") or [1])[0]]
    return made


def _add(step: _Step, values: list[Any]) -> Tensor:
    a, b = _both(values)
    return a + b if step.op == "Add" else a - b


def _multiply(step: _Step, values: list[Any]) -> Tensor:
    a, b = _both(values)
    if step.op == "MatMul":
        return a @ b
    return a * b if step.op == "Mul" else a / b


_OPERATORS: dict[str, _Operator] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _same,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _multiply,
    "Dropout": _same,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda step, values: values[0].mean(tuple(range(2, values[0].dim())), keepdim=True),
    "Identity": _same,
    "MatMul": _multiply,
    "Mul": _multiply,
    "Neg": lambda step, values: -values[0],
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _add,
    "Transpose": lambda step, values: values[0].permute(step.settings.get("perm", range(values[0].dim())[::-1])),
    "Unsqueeze": _unsqueeze,
}
# Inputs that may depend on the map: by default the first alone. Mul and MatMul: one of both.
_MAY_DEPEND = {"Add": 2, "Sub": 2, "Mul": 2, "MatMul": 2, "Concat": 1 << 30}


def _first_obstacle(graph: Graph, nodes: Sequence[onnx.NodeProto], tensor: str) -> str | None:
    """The first operator, and its output, that keeps nodes behind ``tensor`` from being affine; None: none does."""
    dependent = {tensor}
    for node in nodes:
        depends = [name in dependent for name in node.input]
        known = node.op_type in _OPERATORS and node.domain in ("", "ai.onnx")
        places = _MAY_DEPEND.get(node.op_type, 1)
        product = node.op_type in ("Mul", "MatMul") and sum(depends) > 1
        if any(depends) and (not known or any(depends[places:]) or product):
            return f"{node.op_type} (which makes {node.output[0]!r})"
        if any(depends) and node.op_type != "Shape":
            dependent.update(node.output[:1])
    return None


class AffineTail(nn.Module):
    """From a map to the embedding, in the precision of the map.

    Args:
        graph: the whole graph.
        tensor: the map.
        output: the embedding.

    Raises:
        NotAffineError: an operator between both that is not affine, or not known here.
    """

    def __init__(self, graph: Graph, tensor: str, output: str) -> None:
        super().__init__()
        nodes = [graph.freed(node) for node in graph.tail([output], tensor)]
        obstacle = _first_obstacle(graph, nodes, tensor)
        if obstacle is not None:
            raise NotAffineError(obstacle)
        self._start, self._output = tensor, output
        self._steps: list[_Step] = []
        self._lists: dict[str, Tensor] = {}
        self._places: dict[str, str] = {}
        get = graph.onnx.helper.get_attribute_value
        for node in nodes:
            for name in node.input:
                self._keep(graph, name)
            if node.op_type not in _OPERATORS:
                raise NotAffineError(f"{node.op_type} (which makes {node.output[0]!r})")
            settings = {a.name: get(a) for a in node.attribute}
            self._steps.append(_Step(node.op_type, tuple(node.input), node.output[0], settings, graph.opset))

    def _keep(self, graph: Graph, name: str) -> None:
        """Store a constant: numbers as buffer, integers as they are."""
        if not name or name in self._lists or name in self._places or (value := graph.constant(name)) is None:
            return
        if value.dtype.kind == "f":
            place = f"w{len(self._places)}"
            self.register_buffer(place, torch.from_numpy(np.array(value, np.float32 if value.itemsize < 8 else None)))
            self._places[name] = place
        elif value.dtype.kind in "iub":
            self._lists[name] = torch.from_numpy(np.array(value))

    def forward(self, grid: Tensor) -> Tensor:
        """Map [N, C, H, W] -> embedding [N, D]."""
        if not len(grid):  # a graph's -1 cannot be told from no elements
            return self.forward(grid.new_zeros(1, *grid.shape[1:]) + grid.sum())[:0]
        values: dict[str, Any] = {self._start: grid, "": None, **self._lists}
        for name, place in self._places.items():
            values[name] = getattr(self, place)
        for step in self._steps:
            try:
                values[step.output] = _OPERATORS[step.op](step, [values[name] for name in step.inputs])
            except (NotAffineError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
                raise NotAffineError(f"{step.op} (which makes {step.output!r}): {error}") from error
        made: Tensor = values[self._output]
        return made.flatten(1)
