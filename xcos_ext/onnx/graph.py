"""An ONNX graph as tensors that depend on each other: what leads where, where it can be cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xcos_ext.io.errors import ModelError
from xcos_ext.io.optional import need
from xcos_ext.io.text import few

from .session import run_graph, session_of

if TYPE_CHECKING:
    import onnx

__all__ = ["BATCH", "Graph"]

#: Name of the axis of pictures.
BATCH = "batch"
_PURPOSE = "a recogniser in an ONNX file"


class Bypass(NamedTuple):
    """Where the output depends on the picture around a tensor: the node that joins both ways, and by which input."""

    op: str
    tensor: str
    source: str


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, also those that its subgraphs take from outside."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {v.name for v in (*graph.input, *graph.initializer)} | {o for n in graph.node for o in n.output}
            for inner in graph.node:
                yield from (name for name in _captured(inner) if name not in own)
            yield from (value.name for value in graph.output if value.name not in own)


def _is_random(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")


class Graph:
    """A recogniser's graph: pictures [N, 3, height, width] and what is made of them.

    Inputs that are initialisers or that nothing reads are no inputs. What is made of weights alone
    (dequantised weights, constants, shapes) is computed once by onnxruntime and is a weight from then on. The
    optimisers of onnxruntime and onnxscript do so too, but they also rewrite the rest: tensors that ``--tensor`` names
    are gone afterwards, and by default both leave DequantizeLinear as it is.

    Args:
        proto: with its weights; it is changed.
        where: the file, for messages.
        fixed: the number of pictures that it keeps; None: the number becomes free, also in reshapes.

    Attributes:
        proto: the graph.
        input: name of the pictures.
        size: (height, width) of the pictures; None: any.
        opset: of the standard operators.
        number: of pictures, as the file has it; None: any.
        fixed: as given.

    Raises:
        ModelError: other inputs than one batch of RGB pictures, or weights that onnxruntime cannot compute.
    """

    def __init__(self, proto: onnx.ModelProto, where: str, *, fixed: int | None = None) -> None:
        from .flow import Flow  # loads networkx

        self.onnx: Any = need("onnx", _PURPOSE, extra="onnx")
        self.proto, self.where, self.fixed = proto, where, fixed
        self.opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
        proto.ir_version = max(proto.ir_version, 4)  # in older ones initialisers must be inputs too
        graph = proto.graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.outputs = [value.name for value in graph.output]
        pictures = self._pictures()
        self.input = pictures.name
        self.size = self._free(pictures)
        self._fold()
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.outputs = [name for name in self.outputs if name in self.producer]
        if fixed is None and self.number is not None:
            self._free_reshapes()
        self._shapes: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
        # Nodes that ask the pictures for nothing but their number: no information runs through them.
        self._counts = {id(node) for node in self.nodes if self._only_counts(node)}
        # From each tensor to those that are made of it.
        made = ((name, output) for node in self.nodes for name in self.reads(node) for output in node.output if output)
        self._flow = Flow((self.input, *self.producer), made)

    # --- the input

    def _pictures(self) -> onnx.ValueInfoProto:
        """The only input that is one; the others are dropped."""
        given = self.proto.graph.input
        read = {name for node in self.nodes for name in _captured(node)}.union(self.outputs)
        read -= {tensor.values.name for tensor in self.proto.graph.sparse_initializer} | self.weights.keys()
        found = [value for value in given if value.name in read]
        if len(found) != 1:
            names = few((repr(value.name) for value in found), 4) or "none"
            raise ModelError(f"{self.where}: expected a graph with one input, the pictures, got {names}")
        pictures = self.onnx.ValueInfoProto()
        pictures.CopyFrom(found[0])
        del given[:]
        given.append(pictures)
        only: onnx.ValueInfoProto = given[0]
        return only

    def _free(self, value: onnx.ValueInfoProto) -> tuple[int, int] | None:
        """Make the number of pictures free, or what is asked for; gives their size."""
        kind = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if len(shape) != 4 or shape[1] not in (3, None) or (shape[1] is None and shape[3] == 3):
            got = ", ".join("?" if d is None else str(d) for d in shape)
            raise ModelError(
                f"{self.where}: input {value.name!r}: expected pictures [N, 3, height, width], got [{got}]"
            )
        floats = (self.onnx.TensorProto.FLOAT, self.onnx.TensorProto.FLOAT16)
        if kind.elem_type not in floats:
            name = self.onnx.TensorProto.DataType.Name(kind.elem_type).lower()
            raise ModelError(f"{self.where}: input {value.name!r}: expected float or float16 pictures, got {name}")
        self.dtype = np.dtype(np.float32 if kind.elem_type == floats[0] else np.float16)
        self.number = shape[0]
        batch = kind.shape.dim[0]
        batch.Clear()
        if self.fixed is None:
            batch.dim_param = BATCH
        else:
            batch.dim_value = self.fixed
        height, width = shape[2:]
        return None if height is None or width is None else (height, width)

    def _fold(self) -> None:
        """Compute what no picture has a part in."""
        varying, found, constant = [], {self.input}, []
        for node in self.nodes:
            if _is_random(node) or not found.isdisjoint(_captured(node)):
                varying.append(node)
                found.update(node.output)
            else:
                constant.append(node)
        wanted = {name for node in varying for name in _captured(node)} & {n for node in constant for n in node.output}
        needed, parts = set(wanted), list[Any]()
        for node in reversed(constant):
            if not needed.isdisjoint(node.output):
                parts.append(node)
                needed.update(_captured(node))
        if wanted:
            names = sorted(wanted)
            made = self.part(parts[::-1], [], names)
            results = run_graph(session_of(made, self.where), {}, self.where)
            for name, value in zip(names, results, strict=True):
                self._store(name, np.asarray(value))
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(varying)
        self.nodes = list(self.proto.graph.node)

    def _store(self, name: str, value: np.ndarray) -> None:
        """Keep a weight."""
        tensor = self.proto.graph.initializer.add()
        tensor.CopyFrom(self.onnx.numpy_helper.from_array(value, name))
        self.weights[name] = tensor

    def freed(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """A reshape for a fixed number of pictures as one that keeps whatever number there is; other nodes as they
        are."""
        shape = self.constant(node.input[1]) if node.op_type == "Reshape" and len(node.input) > 1 else None
        number = self.number if self.fixed is None else self.fixed
        if shape is None or shape.ndim != 1 or len(shape) < 2 or number is None or shape[0] != number:
            return node
        if 0 in shape and any(a.name == "allowzero" and a.i for a in node.attribute):
            return node  # really empty
        # 0 copies the number from the input; it is kept first by all that is usual between maps and embeddings.
        name = f"{node.output[0]}/free"
        if name not in self.weights:
            self._store(name, np.array([0, *shape[1:]], np.int64))
        freed: onnx.NodeProto = self.onnx.NodeProto()
        freed.CopyFrom(node)
        freed.input[1] = name
        kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
        del freed.attribute[:]
        freed.attribute.extend(kept)
        return freed

    def _free_reshapes(self) -> None:
        for node in self.nodes:
            node.CopyFrom(self.freed(node))
        del self.proto.graph.value_info[:]
        for value in self.proto.graph.output:
            value.type.tensor_type.ClearField("shape")

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a tensor that depends on nothing."""
        if name not in self.weights:
            return None
        value: np.ndarray = self.onnx.numpy_helper.to_array(self.weights[name])
        return value

    # --- what leads where

    def _only_counts(self, node: onnx.NodeProto) -> bool:
        if node.op_type != "Shape" or list(node.input) != [self.input]:
            return False
        settings = {a.name: a.i for a in node.attribute}
        if settings.get("start", 0) == 0 and settings.get("end") == 1:
            return True
        users = [user for user in self.nodes if node.output[0] in _captured(user)]
        return not settings and all(self._takes_first(user) for user in users)

    def _takes_first(self, node: onnx.NodeProto) -> bool:
        """Whether a node takes the first entry of a shape and no other."""
        given = [self.constant(name) for name in node.input[1:]]
        if node.op_type not in ("Gather", "Slice") or any(value is None for value in given):
            return False
        numbers = [int(i) for value in given for i in np.asarray(value).reshape(-1)]
        return numbers == [0] if node.op_type == "Gather" else numbers in ([0, 1], [0, 1, 0], [0, 1, 0, 1])

    def reads(self, node: onnx.NodeProto) -> Iterator[str]:
        """Names whose values a node depends on."""
        return iter(()) if id(node) in self._counts else _captured(node)

    def tail(self, outputs: Sequence[str], tensor: str) -> list[onnx.NodeProto]:
        """The nodes that make ``outputs`` of a tensor, in order; the number of pictures is the tensor's."""
        nodes = []
        for node in self.before(outputs, [tensor]):
            if id(node) in self._counts:
                copied = self.onnx.NodeProto()
                copied.CopyFrom(node)
                copied.input[0] = tensor
                node = copied
            nodes.append(node)
        return nodes

    def before(self, names: Iterable[str], stop: Iterable[str] = ()) -> list[onnx.NodeProto]:
        """The nodes that tensors are made of, in the graph's order, not looking behind the tensors of ``stop``."""
        found = self._flow.behind(set(names), set(stop))
        return [node for node in self.nodes if not found.isdisjoint(node.output)]

    def depending(self, nodes: Iterable[onnx.NodeProto], start: Iterable[str]) -> set[str]:
        """The tensors among those of ``nodes`` (in order) that depend on ``start``, which is included."""
        return self._flow.depending(set(start), {name for node in nodes for name in node.output})

    def between(self, tensor: str, output: str) -> list[onnx.NodeProto]:
        """The nodes that lead from one tensor to another and depend on it."""
        nodes = self.before([output], [tensor])
        dependent = self.depending(nodes, [tensor])
        return [node for node in nodes if any(name in dependent for name in node.output)]

    def bypass(self, tensor: str, output: str) -> Bypass | None:
        """Where the output depends on the pictures other than through ``tensor``; None where it does not."""
        nodes = self.before([output], [tensor])
        around = self.depending(nodes, [self.input])
        if output not in around:
            return None
        through = self.depending(nodes, [tensor])
        for node in nodes:
            reads = set(self.reads(node))
            if reads & (around - through) and reads & through:
                return Bypass(node.op_type, node.output[0], min(reads & (around - through)))
        return Bypass(self.producer[output].op_type, output, self.input)

    def cuts(self, output: str) -> list[str]:
        """The tensors through which alone the output depends on the pictures, from the input on."""
        return self._flow.cuts(self.input, output)

    # --- parts and shapes

    def part(
        self,
        nodes: Sequence[onnx.NodeProto],
        inputs: Sequence[str],
        outputs: Sequence[str],
        like: np.ndarray | None = None,
    ) -> onnx.ModelProto:
        """A graph of its own from some nodes, with the weights that they read.

        Args:
            nodes: in order.
            inputs: tensors that it is given.
            outputs: tensors that it gives.
            like: values [N, ...] of an input that is not the whole graph's, for its type and shape.
        """
        used = {name for node in nodes for name in _captured(node)} | set(outputs)
        made: onnx.ModelProto = self.onnx.ModelProto()
        made.CopyFrom(self.proto)
        graph = made.graph
        own = {value.name: value for value in self.proto.graph.input}
        for field in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
            del field[:]
        graph.node.extend(nodes)
        graph.initializer.extend(tensor for name, tensor in self.weights.items() if name in used)
        helper = self.onnx.helper
        kind = helper.np_dtype_to_tensor_dtype(self.dtype if like is None else like.dtype)
        shape = None if like is None else [self.fixed or BATCH, *like.shape[1:]]
        for name in inputs:
            graph.input.append(own[name] if name in own else helper.make_tensor_value_info(name, kind, shape))
        graph.output.extend(self.onnx.ValueInfoProto(name=name) for name in outputs)
        return made

    def run(self, images: np.ndarray) -> list[Any]:
        """Every output that depends on the pictures.

        Raises:
            ModelError: onnxruntime cannot load or run it.
        """
        made = self.part(self.before(self.outputs), [self.input], self.outputs)
        return run_graph(session_of(made, self.where), {self.input: images}, self.where)

    def shapes(self, names: Iterable[str], size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors for two pictures of a size (or as many as are fixed): inferred, or else found by running
        the graph on grey ones.

        Raises:
            ModelError: the graph cannot be run.
        """
        wanted = list(names)
        if size not in self._shapes:
            self._shapes[size] = self._infer(size)
        found = self._shapes[size]
        unknown = [name for name in wanted if name not in found]
        if unknown:
            made = self.part(self.before(unknown), [self.input], unknown)
            grey = np.full((self.fixed or 2, 3, *size), 0.5, self.dtype)
            results = run_graph(session_of(made, self.where), {self.input: grey}, self.where)
            found.update({name: tuple(np.shape(result)) for name, result in zip(unknown, results, strict=True)})
        return {name: found[name] for name in wanted}

    def _infer(self, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """The shapes that follow from the graph alone."""
        proto = self.onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for dim, number in zip(
            proto.graph.input[0].type.tensor_type.shape.dim, (self.fixed or 2, 3, *size), strict=True
        ):
            dim.Clear()
            dim.dim_value = number
        for value in proto.graph.output:  # another size than the file says may be meant
            value.type.tensor_type.ClearField("shape")
        del proto.graph.value_info[:]
        try:
            inferred = self.onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except Exception:  # onnx's own types; running decides
            return {}
        found = {}
        for value in (*inferred.graph.value_info, *inferred.graph.output):
            kind = value.type.tensor_type
            if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
                found[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
        return found
