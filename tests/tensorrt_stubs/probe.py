"""Run in a process of its own: looks at TensorRT's bindings and lets our code meet them; prints JSON.

The package is called tensorrt_bindings in its wheel; the metapackage tensorrt is that module under another name.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import sys
from typing import Any

import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt


def member(owner: type, name: str) -> dict[str, Any]:
    """A method's signatures or a property's type, from the bindings' documentation."""
    found = inspect.getattr_static(owner, name)
    if isinstance(found, property):
        text = (found.fget.__doc__ or "").strip().splitlines() if found.fget else []
        return {"kind": "property", "writable": found.fset is not None, "signatures": text[:1]}
    lines = (getattr(getattr(owner, name), "__doc__", None) or "").splitlines()
    signatures = [line.strip() for line in lines if "(self" in line and "->" in line]
    return {"kind": "method" if callable(getattr(owner, name)) else "value", "signatures": signatures}


def described(owner: type) -> dict[str, Any]:
    names = [name for name in dir(owner) if not name.startswith("_")] + ["__init__", "__len__"]
    return {name: member(owner, name) for name in names if hasattr(owner, name)}


def has_buffer(kind: type) -> bool:
    """Whether memoryview() takes objects of a class."""
    slot = ctypes.pythonapi.PyType_GetSlot
    slot.restype, slot.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_int]
    return bool(slot(kind, 1))  # Py_bf_getbuffer


def exercised() -> dict[str, Any]:
    """Our own code on the real classes, as far as it comes without libraries."""
    from xcos_ext.deploy.tensorrt import build, package, supervise

    module = package.load_tensorrt()
    log = package.log_of(module)
    log.logger.log(trt.ILogger.Severity.WARNING, "a warning")
    log.logger.log(trt.ILogger.Severity.ERROR, "an\nerror")
    steps = supervise.Steps()
    monitor = steps.monitor(module)
    monitor.phase_start("build", None, 4)
    went_on = monitor.step_complete("build", 1)
    done = steps.done
    steps.cancelled.set()
    stopped = not monitor.step_complete("build", 2)
    monitor.phase_finish("build")
    try:
        build._build(module, b"", "x.onnx", (), (), build.BuildOptions(), b"", steps)
        failure = "none"
    except package.TensorRTError as error:
        failure = str(error)
    return {
        "errors": log.errors(),
        "derived": isinstance(log.logger, trt.ILogger) and isinstance(monitor, trt.IProgressMonitor),
        "went_on": went_on,
        "done": done,
        "stopped": stopped,
        "failure": failure,
    }


classes = {name: value for name, value in vars(trt).items() if isinstance(value, type) and hasattr(value, "__doc__")}
enums = {name: value for name, value in classes.items() if hasattr(value, "__members__")}
severity = trt.ILogger.Severity
print(
    json.dumps(
        {
            "version": trt.__version__,
            "classes": {name: described(value) for name, value in classes.items() if name not in enums},
            "enums": {
                **{name: {key: int(item) for key, item in value.__members__.items()} for name, value in enums.items()},
                "Severity": {key: int(item) for key, item in severity.__members__.items()},
            },
            "hashable": len({*trt.DataType.__members__.values()}) == len(trt.DataType.__members__),
            "named": trt.DataType.HALF.name,
            "buffer": has_buffer(trt.IHostMemory),
            "dims": [int(n) for n in trt.Dims((-1, 3, 112))],
            "exercised": exercised(),
        }
    )
)
