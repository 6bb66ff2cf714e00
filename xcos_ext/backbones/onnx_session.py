"""Parts of ONNX graphs at work in onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.errors import ModelError
from xcos_ext.optional import need

if TYPE_CHECKING:
    import onnx

__all__ = ["Runner", "run_graph", "session_of"]


def session_of(proto: onnx.ModelProto, where: str, threads: int | None = None) -> Any:
    """A graph loaded by onnxruntime, on the CPU.

    Raises:
        ModelError: onnxruntime cannot load it.
    """
    runtime = need("onnxruntime", "a recogniser in an ONNX file", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own types
        raise ModelError(f"{where}: onnxruntime cannot load it ({_first_line(error)})") from error


def run_graph(session: Any, given: dict[str, np.ndarray], where: str) -> list[Any]:
    """Every output of a graph.

    Raises:
        ModelError: onnxruntime cannot run it.
    """
    try:
        results: list[Any] = session.run(None, given)
    except Exception as error:  # onnxruntime's own types
        raise ModelError(f"{where}: onnxruntime cannot run it ({_first_line(error)})") from error
    return results


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


class Runner:
    """A part of a graph in onnxruntime: from one tensor to others. Copies share the session, which has no state."""

    def __init__(self, proto: onnx.ModelProto, where: str, threads: int | None) -> None:
        self._proto, self._where, self._threads = proto, where, threads
        self._session = session_of(proto, where, threads)
        (given,) = self._session.get_inputs()
        self._name = given.name
        self._dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}.get(given.type, np.float64)

    def __call__(self, value: np.ndarray) -> list[np.ndarray]:
        return run_graph(self._session, {self._name: value.astype(self._dtype, copy=False)}, self._where)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _runner, (self._proto.SerializeToString(), self._where, self._threads)


def _runner(contents: bytes, where: str, threads: int | None) -> Runner:
    import onnx

    return Runner(onnx.load_model_from_string(contents), where, threads)
