"""``xcos info``: what was built, what is installed, what it runs on. Every probe may fail alone."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from xcos_ext.io.text import first_line

from . import options
from .console import TROUBLE, print_json, print_rows

_PACKAGES = (
    *("torch", "numpy", "safetensors", "click", "rich", "pillow", "opencv-python-headless", "opencv-python"),
    *("matplotlib", "onnxruntime", "pylance", "pyarrow"),
)


@options.command("info")
@options.as_json
def run(as_json: bool) -> int:
    """What was built, what is installed, and what it runs on."""
    data = collect()
    status = TROUBLE if "error" in data["library"] else 0
    if as_json:
        print_json(data)
        return status
    rows = [("xcos_ext", f"{data.pop('xcos_ext')} in {data.pop('folder')}")]
    for name, value in data.items():
        if name == "gpus":
            gpus = value if isinstance(value, list) else []
            rows += [(f"GPU {index}", _shown(gpu)) for index, gpu in enumerate(gpus)] or [("GPU", _shown(value))]
        elif name == "packages":
            rows += [(package, _shown(version)) for package, version in value.items() if package != "torch"]
        elif isinstance(value, dict) and "error" not in value:
            rows += [(f"{name}: {key.replace('_', ' ')}", _shown(item)) for key, item in value.items()]
        else:
            rows.append(("XCOS_MODEL" if name == "model" else name.replace("_", " "), _shown(value)))
    print_rows(*rows)
    return status


def collect() -> dict[str, Any]:
    """Everything, as JSON-ready values; a probe that failed gives ``{"error": ...}``."""
    from xcos_ext import __version__

    return {
        "xcos_ext": __version__,
        "folder": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        "library": _try(_library),
        "torch": _try(_torch),
        "gpus": _try(_gpus),
        "python": sys.version.split()[0],
        "platform": _try(platform.platform),
        "processor": _try(_processor),
        "cpus": _try(lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "packages": {name: _try(partial(_version, name)) for name in _PACKAGES},
        "model": os.environ.get("XCOS_MODEL") or None,
    }


def _try(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except ValueError as error:  # it names what is wrong: a variable of the environment
        return {"error": first_line(error, None)}
    except Exception as error:
        text = str(error).splitlines()
        return {"error": f"{type(error).__name__}: {text[0]}" if text else type(error).__name__}


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _library() -> dict[str, Any]:
    from xcos_ext.ops import build_info

    return dict(build_info())


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "multiprocessors": gpu.multi_processor_count,
        }
        for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        if set(value) == {"error"}:
            return f"failed: {value['error']}"
        return ", ".join(f"{key.replace('_', ' ')} {_shown(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return str(value)
