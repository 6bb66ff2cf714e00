"""Small recognisers as ONNX graphs, for tests."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as runtime
from onnx import helper, numpy_helper

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
CHANNELS, DIM = 6, 5


class Net:
    """A graph under construction: a convolution to 6x7x7 with ReLU, called `map`, then whatever a test adds."""

    def __init__(self, *, batch: Any = "n", opset: int = 17, dtype: Any = np.float32, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.batch, self.opset, self.dtype = batch, opset, dtype
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.last = "x"

    def weight(self, value: Any) -> str:
        value = np.asarray(value)
        value = value.astype(self.dtype) if value.dtype.kind == "f" else value
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def draw(self, *shape: int) -> str:
        return self.weight(self.random.normal(size=shape) / np.sqrt(np.prod(shape[1:]) or 1))

    def add(self, op: str, *inputs: str, output: str | None = None, **settings: Any) -> str:
        """A node that takes the tensor before, and ``inputs``."""
        output = output or f"t{len(self.nodes)}"
        given = [self.last if name == "." else name for name in (inputs if "." in inputs else (".", *inputs))]
        self.nodes.append(helper.make_node(op, given, [output], **settings))
        self.last = output
        return output

    def start(self) -> Net:
        self.add("Conv", self.draw(CHANNELS, 3, 16, 16), kernel_shape=[16, 16], strides=[16, 16])
        self.add("Relu", output="map")
        return self

    def norm(self, size: int, output: str | None = None) -> str:
        values = [self.random.normal(1, 0.2, size), *self.random.normal(size=(2, size))]
        return self.add(
            "BatchNormalization",
            *(self.weight(v) for v in values),
            self.weight(self.random.uniform(0.5, 2, size)),
            output=output,
            epsilon=1e-3,
        )

    def gemm(self, size: int = CHANNELS * 49, output: str | None = None) -> str:
        return self.add("Gemm", self.draw(DIM, size), self.draw(DIM), output=output, transB=1)

    def save(
        self,
        path: Path,
        *outputs: str,
        inputs: list[Any] | None = None,
        also: tuple[str, ...] = (),
        size: tuple[Any, Any] = (112, 112),
        ir_version: int = 8,
    ) -> Path:
        """Write it; ``also`` are names that stand among the inputs, too."""
        kind = FLOAT16 if self.dtype == np.float16 else FLOAT
        given = inputs or [helper.make_tensor_value_info("x", kind, [self.batch, 3, *size])]
        made = [helper.make_tensor_value_info(name, kind, None) for name in outputs or (self.last,)]
        graph = helper.make_graph(self.nodes, "g", given, made, self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir_version)
        with contextlib.suppress(onnx.shape_inference.InferenceError):
            proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)  # outputs must have shapes
        for value in proto.graph.output:
            if not value.type.tensor_type.HasField("shape"):
                shape = ["n", CHANNELS, 7, 7] if value.name == "map" else ["n", DIM]
                value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shape))
        stored = {tensor.name: (tensor.data_type, tensor.dims) for tensor in self.weights}
        proto.graph.input.extend(helper.make_tensor_value_info(n, *stored.get(n, (kind, [1]))) for n in also)
        onnx.save(proto, path)
        return path


def quantised(ir_version: int, path: Path, *, made: bool = False) -> Path:
    """As model zoos keep them: for one picture, weights in int8 and among the inputs (``made``: also what nodes make of
    them), inputs that nothing reads, a dropout and two outputs."""
    net = Net(batch=1)
    names = []

    def weight(*shape: int) -> str:
        scales = net.weight(net.random.uniform(0.002, 0.004, shape[0]))
        whole = net.weight(net.random.integers(-127, 128, shape).astype(np.int8))
        names.append(f"q{len(names)}")
        net.nodes.append(helper.make_node("DequantizeLinear", [whole, scales], [names[-1]], axis=0))
        return names[-1]

    net.add("Conv", weight(CHANNELS, 3, 16, 16), strides=[16, 16])
    net.add("Relu", output="map")
    net.norm(CHANNELS, output="bn")
    net.nodes.append(helper.make_node("Constant", [], ["ratio"], value_float=0.4))
    net.add("Dropout", "ratio")
    net.nodes.append(helper.make_node("Constant", [], ["one"], value_ints=[1]))
    net.nodes.append(helper.make_node("Constant", [], ["rest"], value_ints=[-1]))
    net.nodes.append(helper.make_node("Concat", ["one", "rest"], ["shape"], axis=0))
    net.add("Reshape", "shape")
    net.add("Gemm", weight(DIM, CHANNELS * 49), output="emb", transB=1)
    weights = [tensor.name for tensor in net.weights]
    also = (*weights, "conv_1_weight", "conv_2_weight", *(names if made else ()))
    return net.save(path, "emb", "map", also=also, ir_version=ir_version)


def images(count: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, 112, 112)).astype(np.float32)


def whole(path: Path, given: np.ndarray, name: str | None = None) -> np.ndarray:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None if name is None else [name], {"x": given})[0]


def residual(path: Path) -> Path:
    """map -> conv `inner` -> added to map as `joined` -> batch norm `bn` -> embedding `emb`; `side` leads nowhere."""
    net = Net().start()
    net.add("Conv", net.draw(CHANNELS, CHANNELS, 3, 3), pads=[1] * 4, output="inner")
    net.nodes.append(helper.make_node("Relu", ["inner"], ["side"]))
    net.nodes.append(helper.make_node("Add", ["inner", "map"], ["joined"]))
    net.last = "joined"
    net.norm(CHANNELS, output="bn")
    net.add("Flatten", output="flat")
    net.gemm(output="emb")
    return net.save(path, "emb")
