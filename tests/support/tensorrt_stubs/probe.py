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
    from xcos_ext.deploy.tensorrt import build, plan

    module = plan.load_tensorrt()
    log = plan.log_of(module)
    log.logger.log(trt.ILogger.Severity.WARNING, "a warning")
    log.logger.log(trt.ILogger.Severity.ERROR, "an\nerror")
    errors = log.reason()
    told: list[int] = []

    def progress(done: int, total: int) -> None:
        told.append(done)
        if done:
            raise KeyboardInterrupt

    monitor = build._Steps(progress).monitor(module)
    monitor.phase_start("build", None, 4)
    went_on = [monitor.step_complete("build", step) for step in (-1, 1)]
    monitor.phase_finish("build")
    try:
        log.start(module.Builder)
        failure = "none"
    except plan.TensorRTError as error:
        failure = str(error)
    overrides = {
        f"{base.__name__}.{name}": list(inspect.signature(value).parameters)[1:]
        for base, kind in ((trt.ILogger, type(log.logger)), (trt.IProgressMonitor, type(monitor)))
        for name, value in vars(kind).items()
        if not name.startswith("_") and issubclass(kind, base)
    }
    return {"errors": errors, "told": told, "went_on": went_on, "failure": failure, "overrides": overrides}


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
            "named": trt.DataType.HALF.name,
            "buffer": has_buffer(trt.IHostMemory),
            "dims": [int(n) for n in trt.Dims((-1, 3, 112))],
            "exercised": exercised(),
        }
    )
)
