"""Reading ONNX files that may come from anywhere: whole, or refused with the reason."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xcos_ext.io.errors import ModelError
from xcos_ext.io.optional import need
from xcos_ext.io.shipped import readable_file
from xcos_ext.io.text import first_line

if TYPE_CHECKING:
    import onnx

__all__ = ["contents_hash", "metadata", "onnx_hash", "read_onnx", "tensors_of"]

StrPath = str | os.PathLike[str]

#: What one protobuf message may hold; larger networks keep their weights in files beside it.
MOST_BYTES = 2**31 - 1


def _regular(path: StrPath) -> Path:
    """The path of a readable, non-empty regular file that protobuf can hold."""
    file = readable_file(path, "an ONNX file")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ModelError(
            f"{file}: expected an ONNX file of at most 2 GiB (weights beyond it lie beside it), got {size}"
        )
    return file


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _in_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def tensors_of(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor: initialisers and constants, those of graphs inside graphs and of functions too."""
    for graph in _graphs(proto.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
        yield from _in_nodes(graph.node)
    for function in proto.functions:
        yield from _in_nodes(function.node)


def _external(tensor: onnx.TensorProto, file: Path) -> tuple[Path, int, int]:
    """The file, offset and length of a tensor's data, inside the model's folder.

    Raises:
        ModelError: an absolute path, one that leaves the folder (by .. or by a symbolic link), or data that is missing.
    """
    entries, where = {entry.key: entry.value for entry in tensor.external_data}, f"{file}: tensor {tensor.name!r}"
    location = entries.get("location", "")
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else None
    except ValueError as error:
        raise ModelError(f"{where}: damaged external data ({error})") from error
    if offset < 0 or (length is not None and length < 0):
        raise ModelError(f"{where}: external data: expected an offset and a length of at least 0")
    folder = file.resolve().parent
    if not location or "\0" in location:
        raise ModelError(f"{where}: external data without a location")
    inside = not os.path.isabs(location) and ".." not in location.replace("\\", "/").split("/")
    target = (folder / location).resolve() if inside else folder
    if not inside or not target.is_relative_to(folder):
        raise ModelError(f"{where}: external data outside the model's folder ({location!r}), refused")
    if not target.is_file():
        raise ModelError(f"{where}: external data is missing: there is no file {location!r} beside the model")
    size = target.stat().st_size
    length = max(size - offset, 0) if length is None else length
    if offset + length > size:
        raise ModelError(
            f"{where}: external data is cut off: {location!r} has {size} bytes, {offset + length} are needed"
        )
    return target, offset, length


def _load_external(tensor: onnx.TensorProto, file: Path, inside: Any) -> None:
    target, offset, length = _external(tensor, file)
    with target.open("rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(length)
    del tensor.external_data[:]
    tensor.data_location = inside


def _parsed(path: StrPath) -> tuple[Any, Path, onnx.ModelProto]:
    """The package onnx, the file, and its graph without the weights that lie beside it."""
    file = _regular(path)
    library = need("onnx", "reading an ONNX file", extra="onnx")
    try:
        proto: onnx.ModelProto = library.load_model(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own types, depending on its version
        raise ModelError(f"{file}: damaged or truncated, or not an ONNX file ({first_line(error)})") from error
    if not proto.HasField("graph") or not proto.graph.output or not proto.opset_import:
        raise ModelError(f"{file}: truncated, or not an ONNX file: it has no graph with outputs")
    return library, file, proto


def _drop_made_inputs(graph: onnx.GraphProto) -> None:
    """Inputs that nodes make are none; quantisers leave them, and neither onnx nor onnxruntime takes such a graph."""
    made = {name for node in graph.node for name in node.output}
    kept = [value for value in graph.input if value.name not in made]
    if len(kept) < len(graph.input):
        del graph.input[:]
        graph.input.extend(kept)


def read_onnx(path: StrPath) -> onnx.ModelProto:
    """An ONNX model with all its weights in memory.

    Data that the model keeps beside it is read from its own folder only: never from a path that is absolute or leaves
    the folder, also not through a symbolic link. Nothing in the file is run.

    Raises:
        ModelError: missing, empty, truncated, not ONNX, not a valid graph, or external data that is missing, cut off
            or outside the folder.
        MissingPackageError: onnx is not installed.
    """
    library, file, proto = _parsed(path)
    outside = library.TensorProto.EXTERNAL
    try:
        beside = [tensor for tensor in tensors_of(proto) if tensor.data_location == outside]
        # All tensors may name the same bytes. Beyond this no message holds them, and they would be read for nothing.
        if (total := sum(_external(tensor, file)[2] for tensor in beside)) > MOST_BYTES:
            raise ModelError(f"{file}: expected weights of at most 2 GiB, got {total:,} bytes of external data")
        for tensor in beside:
            _load_external(tensor, file, library.TensorProto.DEFAULT)
        _drop_made_inputs(proto.graph)
        library.checker.check_model(proto)
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{file}: external data cannot be read: {error.strerror or error}") from error
    except Exception as error:  # onnx's own types
        raise ModelError(f"{file}: damaged, or not a valid ONNX graph ({first_line(error)})") from error
    return proto


def onnx_hash(path: StrPath) -> str:
    """SHA-256, in hex, of an ONNX file and of every file that its weights lie in.

    Raises:
        ModelError: as :func:`read_onnx`, but weights are only looked for, not read into memory.
        MissingPackageError: onnx is not installed.
    """
    library, file, proto = _parsed(path)
    outside = library.TensorProto.EXTERNAL
    beside = {_external(t, file)[0] for t in tensors_of(proto) if t.data_location == outside}
    digest = hashlib.sha256()
    for part in (file, *sorted(beside)):
        with part.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def contents_hash(proto: onnx.ModelProto) -> str:
    """SHA-256, in hex, of what a graph computes with: its nodes, and names, types, shapes and values of its weights.

    Metadata and documentation are left out, so that it can be kept in the file that it is of.
    """
    digest = hashlib.sha256()
    for graph in _graphs(proto.graph):
        for value in (*graph.input, *graph.output):
            digest.update(f"|{value.name}".encode())
        for node in graph.node:
            settings = ",".join(sorted(f"{a.name}={_setting(a)}" for a in node.attribute))
            digest.update(f"|{node.domain}:{node.op_type}({','.join(node.input)})({settings})".encode())
            digest.update(",".join(node.output).encode())
    for tensor in tensors_of(proto):
        digest.update(f"|{tensor.name}:{tensor.data_type}:{list(tensor.dims)}|".encode())
        digest.update(tensor.raw_data or str(tensor).encode())
    return digest.hexdigest()


def _setting(attribute: Any) -> str:
    """A node's attribute in words; tensors and graphs are hashed by themselves."""
    values = (attribute.i, f"{attribute.f:.9g}", attribute.s, list(attribute.ints), list(attribute.strings))
    return repr((attribute.type, *values, [f"{x:.9g}" for x in attribute.floats]))


def metadata(proto: onnx.ModelProto) -> dict[str, str]:
    """The file's own notes, name -> text.

    >>> import onnx
    >>> proto = onnx.ModelProto()
    >>> onnx.helper.set_model_props(proto, {"xcos.kind": "pair"})
    >>> metadata(proto)
    {'xcos.kind': 'pair'}
    """
    notes = ((entry.key, entry.value) for entry in proto.metadata_props)
    # What is not UTF-8 comes as bytes.
    return {key: value for key, value in notes if isinstance(key, str) and isinstance(value, str)}
