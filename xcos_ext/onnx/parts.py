"""Parts of ONNX graphs at work in onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .sessions import run_graph, session_of

if TYPE_CHECKING:
    import onnx

__all__ = ["Runner"]


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
