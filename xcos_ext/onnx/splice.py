"""Putting graphs together: that of a backbone which is ONNX itself with a head's, one for one picture in a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xcos_ext.io.errors import ModelError
from xcos_ext.io.optional import need

if TYPE_CHECKING:
    import onnx

__all__ = ["one_by_one", "with_body"]


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
    body.ir_version, graph = head.ir_version, body.graph
    for repeated in (body.opset_import, body.metadata_props, body.functions):  # the head's serve both
        del repeated[:]
    image, grid = graph.input[0].name, graph.output[0].name
    batch = head.graph.input[0].type.tensor_type.shape.dim[0]
    shape = [batch.dim_param or batch.dim_value, 3, *size]
    maps = [f"{name}/map" for name in names]
    for field in (graph.input, graph.output, graph.value_info):
        del field[:]
    graph.input.extend(helper.make_tensor_value_info(name, library.TensorProto.FLOAT, shape) for name in names)
    graph.output.extend(library.ValueInfoProto(name=name) for name in maps)
    if len(names) == 1:
        before, after = helper.make_node("Identity", names, [image]), helper.make_node("Identity", [grid], maps)
    else:
        before = helper.make_node("Concat", names, [image], axis=0)
        after = helper.make_node("Split", [grid], maps, axis=0, num_outputs=len(names))
    graph.node.insert(0, before)
    graph.node.append(after)
    made: onnx.ModelProto = library.compose.merge_models(body, head, list(zip(maps, names, strict=True)))
    return made


def one_by_one(part: onnx.ModelProto, number: int, where: str) -> onnx.ModelProto:
    """A graph for a fixed number of pictures as one for any number, by ONNX's own loop (Scan).

    Each picture goes through by itself, as often as the graph wants pictures, and the first of each output is kept.

    Args:
        part: one input [number, ...], and outputs [number, ...].
        number: of pictures.
        where: the file, for messages.

    Returns:
        A graph with the same names whose input and outputs are [N, ...].

    Raises:
        ModelError: an opset before 9, which has another Scan.
    """
    library = need("onnx", "a recogniser in an ONNX file", extra="onnx")
    helper = library.helper
    opset = next((entry.version for entry in part.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < 9:
        raise ModelError(
            f"{where}: expected opset 9 or later in a graph that works for {number} pictures only, got {opset}; export "
            "it with a free batch"
        )
    made = library.ModelProto()
    made.CopyFrom(part)
    given, names = part.graph.input[0], [value.name for value in part.graph.output]
    kind = given.type.tensor_type
    sizes = [dim.dim_value or dim.dim_param or None for dim in kind.shape.dim[1:]]
    axes = helper.make_tensor("axis", library.TensorProto.INT64, [1], [0])
    first = helper.make_tensor("first", library.TensorProto.INT64, [], [0])
    old = opset < 13  # axes were an attribute
    inner = helper.make_graph(
        [
            helper.make_node(
                "Unsqueeze", ["one"] if old else ["one", "axis"], ["row"], **({"axes": [0]} if old else {})
            ),
            helper.make_node("Concat", ["row"] * number, [given.name], axis=0),
            *part.graph.node,
            *(helper.make_node("Gather", [name, "first"], [f"{name}/first"], axis=0) for name in names),
        ],
        "picture",
        [helper.make_tensor_value_info("one", kind.elem_type, sizes)],
        [library.ValueInfoProto(name=f"{name}/first") for name in names],
        [*part.graph.initializer, first, *([] if old else [axes])],
    )
    # Names in a loop must not be those around it.
    inner = library.compose.add_prefix_graph(inner, "each/")
    graph = made.graph
    for field in (graph.node, graph.initializer, graph.input, graph.value_info):
        del field[:]
    graph.input.append(helper.make_tensor_value_info(given.name, kind.elem_type, ["batch", *sizes]))
    graph.node.append(helper.make_node("Scan", [given.name], names, body=inner, num_scan_inputs=1))
    return made
