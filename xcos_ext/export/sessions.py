"""ONNX graphs loaded and run by onnxruntime; torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.errors import ModelError, first_line
from xcos_ext.optional import need

if TYPE_CHECKING:
    import onnx

__all__ = ["run_graph", "session_of"]

CPU = ("CPUExecutionProvider",)


def session_of(
    graph: onnx.ModelProto | bytes, where: str, threads: int | None = None, providers: Sequence[str] = CPU
) -> Any:
    """A graph loaded by onnxruntime.

    Raises:
        ModelError: onnxruntime cannot load it.
        MissingPackageError: onnxruntime is not installed.
    """
    runtime = need("onnxruntime", "running an ONNX graph", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    if threads is not None:
        options.intra_op_num_threads = threads
    contents = graph if isinstance(graph, bytes) else graph.SerializeToString()
    try:
        return runtime.InferenceSession(contents, options, providers=list(providers))
    except Exception as error:  # onnxruntime's own types
        raise ModelError(f"{where}: onnxruntime cannot load it ({first_line(error, 300)})") from error


def run_graph(session: Any, given: Mapping[str, np.ndarray], where: str) -> list[Any]:
    """Every output of a graph.

    Raises:
        ModelError: onnxruntime cannot run it.
    """
    try:
        results: list[Any] = session.run(None, dict(given))
    except Exception as error:  # onnxruntime's own types
        raise ModelError(f"{where}: onnxruntime cannot run it ({first_line(error, 300)})") from error
    return results
