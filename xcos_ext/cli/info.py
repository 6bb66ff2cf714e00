"""``xcos info``: what was built, what is installed, what it runs on. Every probe may fail alone."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import click

from .console import print_json, quiet_opencv

__all__ = ["collect", "run"]

_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "click",
    "rich",
    "pillow",
    "opencv-python-headless",
    "opencv-python",
    "matplotlib",
    "onnxruntime",
)


def _try(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        text = str(error).splitlines()
        return {"error": f"{type(error).__name__}: {text[0]}" if text else type(error).__name__}


def _version(package: str) -> str | None:
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
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def _cascades() -> bool:
    import cv2

    folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
    return hasattr(cv2, "CascadeClassifier") and os.path.isfile(
        os.path.join(folder, "haarcascade_frontalface_alt2.xml")
    )


def collect() -> dict[str, Any]:
    """Everything, as JSON-ready values; a probe that failed gives ``{"error": ...}``."""
    quiet_opencv()
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
        "face_cascades": _try(_cascades),
        "model": os.environ.get("XCOS_MODEL") or None,
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"error"}:
        return f"failed: {value['error']}"
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_shown(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(item) for item in value)
    return str(value)


def run(as_json: bool) -> int:
    """Print the collection; 2 if the compiled library cannot be used, else 0."""
    data = collect()
    usable = "error" not in data["library"]
    if as_json:
        print_json(data)
        return 0 if usable else 2
    rows: list[tuple[str, str]] = [("xcos_ext", f"{data['xcos_ext']} in {data['folder']}")]
    for section in ("library", "torch"):
        part = data[section]
        if "error" in part:
            rows.append((section, _shown(part)))
        else:
            rows.extend((f"{section}: {key.replace('_', ' ')}", _shown(value)) for key, value in part.items())
    gpus = data["gpus"]
    if isinstance(gpus, list) and gpus:
        rows.extend((f"GPU {index}", _shown(gpu)) for index, gpu in enumerate(gpus))
    else:
        rows.append(("GPU", _shown(gpus)))
    rows.extend((key.replace("_", " "), _shown(data[key])) for key in ("python", "platform", "processor", "cpus"))
    rows.extend((name, _shown(version)) for name, version in data["packages"].items() if name != "torch")
    rows.append(("face cascades", _shown(data["face_cascades"])))
    rows.append(("XCOS_MODEL", _shown(data["model"])))
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        click.echo(f"{name:<{width}}{value}")
    return 0 if usable else 2
