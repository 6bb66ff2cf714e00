"""Joining the graph of a backbone that is ONNX itself with the graph of a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xcos_ext.io.errors import ModelError
from xcos_ext.io.optional import need

if TYPE_CHECKING:
    import onnx

__all__ = ["with_body"]


def with_body(
    head: onnx.ModelProto, body: onnx.ModelProto, names: Sequence[str], size: tuple[int, int]
) -> onnx.ModelProto:
    """One graph from images to what the head's graph gives.

    Args:
        head: its inputs are maps [N, C, H, W], called ``names``.
        body: one input [N, 3, height, width] and one output, the map.
        names: of the inputs; they become images. Two of them go through the body as one batch.
        size: (height, width) of the images.

    Returns:
        A graph with the head's opset.

    Raises:
        ModelError: a body that cannot be brought to the head's opset, or that uses operators of its own.
    """
    library = need("onnx", "exporting to ONNX", extra="onnx")
    helper, opset = library.helper, head.opset_import[0].version
    versions = {entry.domain: entry.version for entry in body.opset_import}
    foreign = sorted({node.domain for node in body.graph.node} - {"", "ai.onnx"})
    if foreign:
        raise ModelError(f"model: its backbone's graph needs operators that are not ONNX's own ({', '.join(foreign)})")
    if versions.get("", versions.get("ai.onnx", opset)) != opset:
        try:
            body = library.version_converter.convert_version(body, opset)
        except Exception as error:
            raise ModelError(f"model: its backbone's graph cannot be brought to opset {opset} ({error})") from error
    body = library.compose.add_prefix(body, "body/")
    image, grid = body.graph.input[0].name, body.graph.output[0].name
    batch = head.graph.input[0].type.tensor_type.shape.dim[0]
    first: str | int = batch.dim_param or batch.dim_value
    inputs = [helper.make_tensor_value_info(n, library.TensorProto.FLOAT, [first, 3, *size]) for n in names]
    maps = [f"{name}/map" for name in names]
    if len(names) == 1:
        before = [helper.make_node("Identity", list(names), [image])]
        after = [helper.make_node("Identity", [grid], maps)]
    else:
        before = [helper.make_node("Concat", list(names), [image], axis=0)]
        after = [helper.make_node("Split", [grid], maps, axis=0, num_outputs=len(names))]
    renamed = dict(zip(names, maps, strict=True))
    nodes = []
    for node in head.graph.node:
        copied = library.NodeProto()
        copied.CopyFrom(node)
        copied.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(copied)
    graph = helper.make_graph(
        [*before, *body.graph.node, *after, *nodes],
        head.graph.name,
        inputs,
        list(head.graph.output),
        [*body.graph.initializer, *head.graph.initializer],
    )
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return made
