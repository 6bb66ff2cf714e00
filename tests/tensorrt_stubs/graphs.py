"""Small ONNX graphs, made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BATCH = "batch"


def sum_graph(
    path: Path,
    *,
    batch: int | str = BATCH,
    width: int | str = 4,
    names: tuple[str, ...] = ("a", "b"),
    listed: bool = False,
) -> Path:
    """``total [batch] = sum of all inputs [batch, width] * scale``; with ``listed`` the weight is an input too."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, width]) for name in names]
    if listed:
        inputs.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1]))
    nodes = [
        helper.make_node("Sum", list(names), ["added"], name="add"),
        helper.make_node("Mul", ["added", "scale"], ["scaled"], name="scale_it"),
        helper.make_node("ReduceSum", ["scaled", "axes"], ["total"], name="reduce", keepdims=0),
    ]
    weights = [
        numpy_helper.from_array(np.ones(1, np.float32), "scale"),
        numpy_helper.from_array(np.array([1], np.int64), "axes"),
    ]
    graph = helper.make_graph(
        nodes, "sum", inputs, [helper.make_tensor_value_info("total", TensorProto.FLOAT, [batch])], weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"xcos": '{"fingerprint": "0123456789abcdef"}'})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path
