"""Any recogniser in an ONNX file, split at one of its feature maps and run by onnxruntime."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from xcos_ext.card.preprocessing import ARCFACE, Preprocessing
from xcos_ext.io.errors import ModelError
from xcos_ext.onnx.files import contents_hash, read_onnx
from xcos_ext.onnx.graph import BATCH, Graph
from xcos_ext.onnx.pixels import check_range, normalisation_of
from xcos_ext.onnx.session import Runner, check_threads
from xcos_ext.onnx.splice import one_by_one
from xcos_ext.onnx.tail import AffineTail, NotAffineError

from .feature_map import FeatureMap, is_map_shape, shown, with_choice
from .recogniser import Recogniser

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxRecogniser", "onnx_feature_maps"]

StrPath = str | os.PathLike[str]

# Operators that a map is taken from in front of: as in the networks of the package, they belong to the output block.
_PASSED = ("BatchNormalization", "Dropout", "Identity", "Cast")
_SCALING = ("Add", "Sub", "Mul", "Div")
_SAME = 1e-3  # relative: how far two ways of computing the same in fp32 may be apart
_SAME_HALF = 2e-2


def _read(path: StrPath, size: tuple[int, int] | None = None) -> Graph:
    """The graph, for any number of pictures where that computes what it does for the number it was written for."""
    where = os.fspath(path)
    graph = Graph(read_onnx(path), where)
    number = graph.number or 1
    shape = (number + 1, 3, *(graph.size or size or ARCFACE.size))
    try:
        given = np.random.default_rng(0).uniform(-1, 1, shape).astype(graph.dtype)
    except (MemoryError, ValueError, OverflowError) as error:
        raise ModelError(f"{where}: expected pictures of a size that fits in memory, got {list(shape)}") from error
    together: list[Any] | None = None
    try:
        together = graph.run(given)
        if graph.number is None:
            return graph
    except ModelError:
        pass  # also where the file does not say for how many pictures it is
    fixed = Graph(read_onnx(path), where, fixed=number)
    alone = [fixed.run(np.repeat(image[None], number, 0)) for image in given[:2]]
    if together is None or not all(
        len(both) == len(given) and _close(both[i], one[0])
        for i, results in enumerate(alone)
        for both, one in zip(together, results, strict=True)
        if len(one) == number
    ):
        return fixed
    return graph


def _part(
    graph: Graph,
    nodes: Sequence[onnx.NodeProto],
    given: str,
    names: Sequence[str],
    like: np.ndarray | None = None,
) -> onnx.ModelProto:
    """A part of the graph for any number of pictures."""
    made = graph.part(nodes, [given], names, like)
    return made if graph.fixed is None else one_by_one(made, graph.fixed, graph.where)


def _embedding(graph: Graph, output: str | None, size: tuple[int, int]) -> str:
    """The output that is the embedding."""
    if output is not None:
        if output not in graph.producer:
            raise ModelError(f"{graph.where}: output: there is no tensor {output!r}; its outputs: {graph.outputs}")
        return output
    shapes = graph.shapes(graph.outputs, size)
    flat = [name for name, shape in shapes.items() if len(shape) > 1 and max(shape[1:]) == np.prod(shape[1:]) > 1]
    if len(flat) != 1:
        found = ", ".join(f"{name!r} {list(shape)}" for name, shape in shapes.items()) or "none"
        raise ModelError(f"{graph.where}: expected one output [N, D], the embedding, got {found}; name it as output=")
    return flat[0]


def _before_normalisation(graph: Graph, output: str) -> str:
    """Where the output is a vector divided by its length: that vector. Checked by running it, in :meth:`_check`."""
    node = graph.producer[output]
    if node.op_type == "Div":
        divisor = graph.between(node.input[0], node.input[1])
        if any(n.op_type in ("ReduceL2", "Sqrt", "Pow") for n in divisor):
            return node.input[0]
    return node.input[0] if node.op_type == "LpNormalization" else output


def _passed(graph: Graph, name: str, before: str) -> bool:
    """Whether a tensor is another one after batch norm, or a step of it."""
    node = graph.producer[name]
    if before not in node.input:
        return False
    scaled = node.op_type in _SCALING and all(n == before or graph.constant(n) is not None for n in node.input)
    return node.op_type in _PASSED or scaled


def _candidates(graph: Graph, output: str, size: tuple[int, int]) -> list[FeatureMap]:
    """The maps that the graph may be cut at, nearest to the output first, with the choice marked."""
    cuts = graph.cuts(output)
    shapes = graph.shapes(cuts, size)
    vector = _before_normalisation(graph, output)
    maps = []
    for name in reversed(cuts):
        shape = shapes.get(name)
        if shape is None or not is_map_shape(shape):
            continue
        try:
            AffineTail(graph, name, vector)(torch.zeros(1, *shape[1:]))
            affine = True
        except NotAffineError:
            affine = False
        distance = len(graph.between(name, output))
        op = graph.producer[name].op_type
        maps.append(FeatureMap(name, (shape[1], shape[2], shape[3]), op, distance, affine))
    return with_choice(maps, lambda one, before: _passed(graph, one.name, before.name))


def onnx_feature_maps(path: StrPath, output: str | None = None) -> list[FeatureMap]:
    """:func:`~xcos_ext.backbones.feature_maps` of an ONNX file."""
    graph = _read(path)
    size = graph.size or ARCFACE.size
    return _candidates(graph, _embedding(graph, output, size), size)


class OnnxRecogniser(Recogniser):
    """A recogniser in an ONNX file: ``grid`` runs its graph up to a feature map in onnxruntime, ``embed`` the rest.

    An output block of affine operators (convolution, matrix product, batch norm, pooling by means, sums, scaling,
    reshaping) is computed in torch from the graph's weights, in any precision and with gradients, so the closed form's
    cells are exact; any other one runs in onnxruntime in fp32 and has no cells. A final division by the embedding's
    length is left out: the embedding is not normalised, as everywhere in the package.

    The graph has no gradients to the picture and is fixed: only a head can be trained behind it. A model over it is
    written by :func:`xcos_ext.deploy.export_onnx`.

    Args:
        path: the file; never changed, nothing in it is run but standard operators of onnxruntime.
        tensor: the map; None: the one nearest to the output that the output depends on alone, in front of batch norm
            (:func:`~xcos_ext.backbones.feature_maps` lists them).
        output: the embedding's tensor; None: the graph's only output [N, D].
        preprocessing: of the pictures; None: that which the graph's own first operators ask for
            (:attr:`normalisation`), else :data:`~xcos_ext.card.preprocessing.ARCFACE`.
        threads: of onnxruntime, for one run; None: as it decides.

    Attributes:
        input: name of the pictures' tensor.
        tensor: name of the map.
        output: name of the embedding.
        opset: of the graph's standard operators.
        normalisation: what the graph does to its pictures first, or None.
        obstacle: what keeps the output block from being computed in torch, or None.

    Raises:
        ModelError: a file that cannot be used, a graph without a usable map, a tensor that is not there, is no map or
            is not all that the output depends on, pixels other than the graph's own normalisation expects, or a graph
            that treats pictures of a batch differently.
        ValueError: another picture size than the graph's, or a number of threads below 1.
        MissingPackageError: onnx or onnxruntime is not installed.
    """

    output_prefixes: ClassVar[tuple[str, ...]] = ("output_block.",)
    traceable = False

    def __init__(
        self,
        path: StrPath,
        tensor: str | None = None,
        output: str | None = None,
        *,
        preprocessing: Preprocessing | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        check_threads(threads)
        graph = _read(path, None if preprocessing is None else preprocessing.size)
        self.architecture = "onnx"
        self.where = graph.where
        self.input, self.opset = graph.input, graph.opset
        self.normalisation = normalisation_of(graph)
        self.preprocessing = self._preprocessing(graph, preprocessing)
        size = self.preprocessing.size
        whole = _embedding(graph, output, size)
        self.output = _before_normalisation(graph, whole)
        self.tensor = self._tensor(graph, tensor, whole, size)

        body = _part(graph, graph.before([self.tensor]), graph.input, [self.tensor])
        self._body = Runner(body, graph.where, threads)
        maps = self._maps(graph.dtype)
        self.grid_shape = maps.shape[1:]
        self.body_dtype = str(maps.dtype)
        self._proto = body
        names = [self.output, whole] if whole != self.output else [self.output]
        tail = _part(graph, graph.tail(names, self.tensor), self.tensor, names, maps)
        # Of the graphs, so that weights that are not torch's still have a fingerprint; as numbers 0..255.
        digest = hashlib.sha256(f"{contents_hash(body)} {contents_hash(tail)}".encode()).digest()
        self.contents = nn.Parameter(torch.tensor(list(digest), dtype=torch.float32), requires_grad=False)
        runner = Runner(tail, graph.where, threads)
        self.obstacle: str | None = None
        self.output_block: nn.Module
        self._tail: Runner | None = None
        try:
            self.output_block = AffineTail(graph, self.tensor, self.output)
            self._check_tail(runner, maps, whole)
        except NotAffineError as error:
            self.obstacle, self.output_block, self._tail = str(error), nn.Identity(), runner
            self._check_tail(runner, maps, whole)
        self.eval()

    # --- choices

    def _preprocessing(self, graph: Graph, given: Preprocessing | None) -> Preprocessing:
        own = self.normalisation
        expected = None if own is None else own.preprocessing
        if given is None:
            if expected is not None:
                return expected
            return ARCFACE if graph.size is None else replace(ARCFACE, size=graph.size)
        if graph.size is not None and given.size != graph.size:
            raise ValueError(f"preprocessing: expected pictures of {graph.size} (height, width), got {given.size}")
        if own is not None and expected is not None:
            check_range(own, expected, given, graph.where)
        return given

    def _tensor(self, graph: Graph, tensor: str | None, output: str, size: tuple[int, int]) -> str:
        maps = _candidates(graph, output, size)
        if tensor is None:
            if not maps:
                raise ModelError(
                    f"{graph.where}: no usable feature map: none of 4x4 to 16x16 cells that the output {output!r} "
                    "depends on alone"
                )
            return next(m.name for m in maps if m.chosen)
        if tensor not in graph.producer:
            raise ModelError(f"{graph.where}: tensor: there is no tensor {tensor!r}; usable maps: {shown(maps)}")
        nodes = graph.before([output])
        if tensor not in {name for node in nodes for name in node.output}:
            raise ModelError(f"{graph.where}: tensor: {tensor!r} does not lead to the output {output!r}")
        if all(m.name != tensor for m in maps):
            shape = graph.shapes([tensor], size).get(tensor)
            if not is_map_shape(shape):
                got = "of unknown shape" if shape is None else f"of shape {list(shape)}"
                raise ModelError(
                    f"{graph.where}: tensor: expected a square map [N, C, H, W] of 4 to 16 cells a side, {tensor!r} is "
                    f"{got}; usable maps: {shown(maps)}"
                )
            around = graph.bypass(tensor, output)
            assert around is not None
            raise ModelError(
                f"{graph.where}: tensor: the output does not depend on {tensor!r} alone: {around.op} (which makes "
                f"{around.tensor!r}) also takes {around.source!r}; usable maps: {shown(maps)}"
            )
        return tensor

    # --- checks by running

    def _maps(self, dtype: np.dtype[Any]) -> np.ndarray:
        """Maps of two unlike pictures.

        Raises:
            ModelError: pictures of a batch do not stay by themselves.
        """
        generator = np.random.default_rng(0)
        height, width = self.preprocessing.size
        coarse = generator.integers(0, 256, (2, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
        pictures = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]
        images = self.preprocessing.array(pictures).astype(dtype)
        together: np.ndarray = self._body(images)[0]
        alone = np.concatenate([self._body(image[None])[0] for image in images])
        if together.shape != alone.shape or not _close(together, alone):
            raise ModelError(f"{self.where}: {self.tensor!r} of a picture depends on the other pictures of the batch")
        if not np.all(np.isfinite(together)):
            raise ModelError(f"{self.where}: {self.tensor!r} is not finite for ordinary pictures")
        return together

    def _check_tail(self, runner: Runner, maps: np.ndarray, whole: str) -> None:
        """The embedding from here must be the graph's own, up to its length where that is divided out."""
        results = runner(maps)
        made, normalised = results[0], results[-1]
        size = made.shape[1:]
        if made.shape[0] != len(maps) or int(np.prod(size)) != max(size, default=0):
            raise ModelError(f"{self.where}: output: expected [N, D], {self.output!r} is {list(made.shape)}")
        made = made.reshape(len(maps), -1).astype(np.float64)
        if whole != self.output:
            lengths = np.linalg.norm(made, axis=1, keepdims=True)
            if not _close(made / lengths, normalised.reshape(made.shape).astype(np.float64)):
                raise ModelError(f"{self.where}: output: {whole!r} is divided by something else than its length")
        self.embedding_size = made.shape[1]
        with torch.no_grad():
            ours = self.embed(torch.from_numpy(maps.astype(np.float32)))
        tolerance = _SAME if maps.dtype == np.float32 else _SAME_HALF
        if not _close(ours.numpy(), made, tolerance):
            raise NotAffineError(f"the operators between {self.tensor!r} and {self.output!r}, together")

    # --- running

    def grid(self, images: Tensor) -> Tensor:
        """Normalised RGB [N, 3, height, width] -> [N, *grid_shape], on the device and in the type of the images.

        Raises:
            RuntimeError: gradients to the images are asked for, or a tracer follows.
        """
        if isinstance(images, torch.fx.Proxy):
            raise RuntimeError("images: an ONNX graph cannot be traced by torch; export the model with export_onnx")
        if images.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("images: an ONNX graph has no gradients to its pictures; call it under torch.no_grad()")
        return self._through(self._body, images, self.grid_shape)

    def embed(self, grid: Tensor) -> Tensor:
        """Feature map [N, *grid_shape] -> embedding [N, embedding_size], not normalised to unit length.

        Raises:
            ModelError: gradients of an output block that is not affine.
        """
        if self._tail is None:
            made: Tensor = self.output_block(grid)
            return made
        if grid.requires_grad and torch.is_grad_enabled():
            raise ModelError(
                f"{self.where}: the output block is not affine over the feature map {self.tensor!r}, or not known to "
                f"be: {self.obstacle}; choose another tensor or output"
            )
        return self._through(self._tail, grid, (self.embedding_size or 0,))

    @staticmethod
    def _through(runner: Runner, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not len(value):
            return value.new_zeros((0, *shape))
        found = runner(value.detach().to("cpu", torch.float32).contiguous().numpy())[0]
        made = torch.from_numpy(np.ascontiguousarray(found.reshape(len(value), *shape), np.float32))
        return made.to(value.device, value.dtype)

    def body_proto(self) -> onnx.ModelProto:
        """The graph up to the map: one input [N, 3, height, width], one output [N, *grid_shape], both fp32, N free."""
        import onnx
        from onnx import helper

        made = onnx.ModelProto()
        made.CopyFrom(self._proto)
        floating = onnx.TensorProto.FLOAT
        (given,), (found,) = made.graph.input, made.graph.output
        image, grid = given.name, found.name
        if given.type.tensor_type.elem_type != floating:
            image = f"{given.name}/float"
            kind = given.type.tensor_type.elem_type
            made.graph.node.insert(0, helper.make_node("Cast", [image], [given.name], to=kind))
        if self.body_dtype != "float32":
            grid = f"{found.name}/float"
            made.graph.node.append(helper.make_node("Cast", [found.name], [grid], to=floating))
        shapes = ((image, (3, *self.preprocessing.size)), (grid, self.grid_shape))
        values = [helper.make_tensor_value_info(name, floating, [BATCH, *shape]) for name, shape in shapes]
        made.graph.input[0].CopyFrom(values[0])
        made.graph.output[0].CopyFrom(values[1])
        return made

    def extra_repr(self) -> str:
        return f"{self.where!r}, tensor={self.tensor!r}, output={self.output!r}, preprocessing={self.preprocessing}"


def _close(a: np.ndarray, b: np.ndarray, tolerance: float = _SAME_HALF) -> bool:
    scale = max(float(np.abs(b).max(initial=0)), 1e-30)
    return bool(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0) <= tolerance * scale)
