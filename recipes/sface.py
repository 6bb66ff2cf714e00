"""SFace (Zhong et al., arXiv 2205.12010) as a network of torch: a MobileNet with PReLU, read from its ONNX file.

onnxruntime runs the file for one picture at a time; here batches are computed together, on any device.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from xcos_ext.backbones import Recogniser
from xcos_ext.card.preprocessing import Preprocessing
from xcos_ext.io.errors import ModelError
from xcos_ext.onnx.files import read_onnx

__all__ = ["SFace"]


class SFace(Recogniser):
    """RGB [N, 3, 112, 112], values 0..255 times 1/255 -> map [N, 1024, 7, 7] -> embedding [N, 128].

    Args:
        path: ONNX file of SFace, in fp32 or with weights in blocks of int8.

    Raises:
        ModelError: another network.
    """

    output_prefixes: ClassVar[tuple[str, ...]] = ("linear.", "norm.")

    def __init__(self, path: str) -> None:
        super().__init__()
        from onnx import numpy_helper
        from onnx.reference import ReferenceEvaluator

        self.architecture = "sface"
        self.grid_shape = (1024, 7, 7)
        self.embedding_size = 128
        graph: Any = read_onnx(path).graph
        values: dict[str, Any] = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        layers: list[nn.Module] = []
        tail: list[nn.Module] = []
        for node in graph.node:
            given = [values.get(name) for name in node.input]
            if node.op_type in ("Constant", "DequantizeLinear", "Reshape"):
                made: Any = ReferenceEvaluator(node).run(
                    None, {name: value for name, value in zip(node.input, given, strict=True) if value is not None}
                )
                values[node.output[0]] = made[0]
                continue
            t = [None if value is None else torch.tensor(value) for value in given]
            if node.op_type == "Conv":
                a: dict[str, Any] = {str(x.name): x.i or list(x.ints) for x in node.attribute}
                weight = cast(Tensor, t[1])
                conv = nn.Conv2d(
                    weight.shape[1] * a["group"], weight.shape[0], weight.shape[2], a["strides"][0], a["pads"][0],
                    groups=a["group"], bias=False,
                )  # fmt: skip
                conv.weight.data = weight
                layers.append(conv)
            elif node.op_type == "BatchNormalization":
                scale = cast(Tensor, t[1])
                norm = (nn.BatchNorm1d if tail else nn.BatchNorm2d)(len(scale))
                norm.eps = next(x.f for x in node.attribute if x.name == "epsilon")
                norm.weight.data, norm.bias.data = scale, cast(Tensor, t[2])
                norm.running_mean, norm.running_var = cast(Tensor, t[3]), cast(Tensor, t[4])
                (tail if tail else layers).append(norm)
            elif node.op_type == "PRelu":
                slope = nn.PReLU(int(cast(Tensor, t[1]).numel()))
                slope.weight.data = cast(Tensor, t[1]).flatten()
                layers.append(slope)
            elif node.op_type == "Gemm":
                linear = nn.Linear(cast(Tensor, t[1]).shape[1], 128)
                linear.weight.data, linear.bias.data = cast(Tensor, t[1]), cast(Tensor, t[2])
                tail.append(linear)
            elif node.op_type in ("Sub", "Mul"):
                values[f"pixels {node.op_type}"] = next(value for value in given if value is not None)
            elif node.op_type not in ("Dropout", "Flatten"):
                raise ModelError(f"{path}: expected SFace, got a network with {node.op_type}")
        if len(tail) != 2 or "pixels Mul" not in values:
            raise ModelError(f"{path}: expected SFace, got another network")
        shift, scale_ = (float(values[f"pixels {name}"].item()) for name in ("Sub", "Mul"))
        self.preprocessing = Preprocessing(mean=(shift / 255,) * 3, std=(1 / (255 * scale_),) * 3)
        self.features = nn.Sequential(*layers)
        self.linear, self.norm = tail

    def grid(self, images: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> [N, 1024, 7, 7]."""
        made: Tensor = self.features(images)
        return made

    def embed(self, grid: Tensor) -> Tensor:
        """[N, 1024, 7, 7] -> embedding [N, 128], not normalised to unit length."""
        made: Tensor = self.norm(self.linear(grid.flatten(1)))
        return made
