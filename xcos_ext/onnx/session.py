"""ONNX graphs loaded and run by onnxruntime; torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.devices import check_device_name
from xcos_ext.io.errors import DeviceError, ModelError
from xcos_ext.io.optional import need
from xcos_ext.io.text import first_line

if TYPE_CHECKING:
    import onnx

__all__ = ["Provider", "Runner", "check_threads", "providers_on", "run_graph", "session_of"]

#: A name, or a name with options.
Provider = str | tuple[str, Mapping[str, Any]]

CPU = ("CPUExecutionProvider",)
_CUDA = "CUDAExecutionProvider"


def providers_on(device: str) -> list[Provider]:
    """What onnxruntime runs graphs by on a device, best first: on a GPU what it lacks there runs on the CPU.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``: CUDA where this onnxruntime has it.

    Raises:
        DeviceError: another name, or a GPU for an onnxruntime that has no CUDA.
        MissingPackageError: onnxruntime is not installed.

    >>> providers_on("cpu")
    ['CPUExecutionProvider']
    """
    index = check_device_name(device)
    known = need("onnxruntime", "running an ONNX graph", extra="onnx").get_available_providers()
    if device == "cpu" or (device == "auto" and _CUDA not in known):
        return list(CPU)
    if _CUDA not in known:
        raise DeviceError(
            f"device: expected cpu or auto, for this onnxruntime has no CUDA (pip install onnxruntime-gpu), got "
            f"{device!r}"
        )
    # Maps and score must agree to the last bits of fp32, which TF32 has not.
    return [(_CUDA, {"device_id": index or 0, "use_tf32": 0}), *CPU]


def check_threads(threads: int | None) -> None:
    """Raises ValueError for a number of threads below 1; None leaves it to onnxruntime."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads: expected an integer of at least 1 or None, got {threads!r}")


def session_of(
    graph: onnx.ModelProto | bytes, where: str, threads: int | None = None, providers: Sequence[Provider] = CPU
) -> Any:
    """A graph loaded by onnxruntime, by the first of the providers.

    Raises:
        ModelError: onnxruntime cannot load it, or cannot start the provider.
        MissingPackageError: onnxruntime is not installed.
    """
    runtime = need("onnxruntime", "running an ONNX graph", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    if threads is not None:
        options.intra_op_num_threads = threads
    contents = graph if isinstance(graph, bytes) else graph.SerializeToString()
    try:
        # Without enable_fallback=0 it prints on stdout, and goes on by itself, where a provider fails.
        session = runtime.InferenceSession(contents, options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # onnxruntime's own types
        raise ModelError(f"{where}: onnxruntime cannot load it ({first_line(error, 300)})") from error
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if wanted not in session.get_providers():  # other failures it keeps to itself
        raise ModelError(f"{where}: onnxruntime cannot load it ({wanted} does not start here)")
    return session


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
