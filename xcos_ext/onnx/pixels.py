"""What an ONNX recogniser does to its pictures first, and so which pixels it is for."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xcos_ext.card.preprocessing import Preprocessing
from xcos_ext.io.errors import ModelError

from .graph import Graph

if TYPE_CHECKING:
    import onnx

__all__ = ["InputNormalisation", "check_range", "normalisation_of"]


class InputNormalisation(NamedTuple):
    """What a graph does to its pictures first: ``x * scale + shift``, per channel.

    Attributes:
        scale: three numbers.
        shift: three numbers.
        preprocessing: what the input has to go through, so that pixels of 0..255 come out as this expects; None: not
            to be told from the numbers.
    """

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]
    preprocessing: Preprocessing | None


def normalisation_of(graph: Graph) -> InputNormalisation | None:
    """What is done to the pictures before anything else, where that is a scale and a shift per channel."""
    scale, shift, name, found = np.ones(3), np.zeros(3), graph.input, False
    while True:
        users = [node for node in graph.nodes if name in graph.reads(node)]
        if len(users) != 1:
            break
        node = users[0]
        if node.op_type not in ("Cast", "Identity"):
            step = _scale_and_shift(graph, node, name)
            if step is None:
                break
            scale, shift, found = scale * step[0], shift * step[0] + step[1], True
        name = node.output[0]
    if not found or not (np.all(np.isfinite(scale)) and np.all(np.isfinite(shift)) and np.all(scale != 0)):
        return None
    red, green, blue = map(float, scale)
    first, second, third = map(float, shift)
    return InputNormalisation((red, green, blue), (first, second, third), _expected(scale, shift, graph.size))


def _scale_and_shift(graph: Graph, node: onnx.NodeProto, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    if node.op_type == "BatchNormalization" and node.input[0] == name:
        given = [graph.constant(n) for n in node.input[1:5]]
        if any(v is None or v.shape != (3,) for v in given):
            return None
        weight, bias, mean, var = (np.asarray(v, np.float64) for v in given)
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        factor = weight / np.sqrt(var + epsilon)
        return factor, bias - mean * factor
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or len(node.input) != 2:
        return None
    first = node.input[0] == name
    value = graph.constant(node.input[1 if first else 0])
    if value is None or value.ndim > 4 or (not first and node.op_type == "Div"):
        return None
    axes = (1,) * (4 - value.ndim) + value.shape
    if axes not in ((1, 3, 1, 1), (1, 1, 1, 1)):
        return None
    numbers = np.broadcast_to(value.reshape(-1).astype(np.float64), 3)
    one, none = np.ones(3), np.zeros(3)
    if node.op_type == "Mul":
        return numbers, none
    if node.op_type == "Div":
        return (1 / numbers, none) if np.all(numbers != 0) else None
    if node.op_type == "Add":
        return one, numbers
    return (one, -numbers) if first else (-one, numbers)


def _expected(scale: np.ndarray, shift: np.ndarray, size: tuple[int, int] | None) -> Preprocessing | None:
    """The pixels that a normalisation is made for: 0..255 or 0..1."""
    options: dict[str, Any] = {} if size is None else {"size": size}
    zero = float(np.median(-shift / scale))  # the pixel that becomes 0
    largest = float(np.abs(scale).max())
    if zero >= 16 or (not shift.any() and largest <= 1 / 32):
        return Preprocessing(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255), **options)
    if 0.2 <= zero <= 0.8 and largest >= 1:
        return Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **options)
    return None


def check_range(own: InputNormalisation, expected: Preprocessing, given: Preprocessing, where: str) -> None:
    """Raises ModelError where pixels come to the first convolution in another range than they are meant to."""

    def ends(preprocessing: Preprocessing) -> np.ndarray:
        mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
        pixels = np.array([[0.0], [1.0]])
        return ((pixels - mean) / std) * np.array(own.scale) + np.array(own.shift)

    right, got = ends(expected), ends(given)
    if np.abs(got - right).max() > 0.25 * np.abs(right[1] - right[0]).max():
        pixels = "0..255" if expected.std[0] < 0.1 else "0..1"
        settings = ", ".join(f"{name}={value}" for name, value in asdict(given).items() if name != "size")
        raise ModelError(
            f"{where}: preprocessing: expected pixels of {pixels}, which the graph normalises itself (x * "
            f"{own.scale[0]:.4g} + {own.shift[0]:.4g}), got {settings}"
        )
