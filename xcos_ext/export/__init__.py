"""Models for other runtimes: ONNX graphs, run without torch, and TensorRT engines.

``export_onnx(model, "pair.onnx")`` writes a graph (needs the ``onnx`` extra); ``OnnxModel("pair.onnx")`` runs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .card import OnnxCard, TemplateLayout
    from .onnx import export_onnx
    from .onnx_files import onnx_hash, read_onnx
    from .onnx_model import OnnxModel, PairMaps
    from .tensorrt import TrtRunner, build_engine

# Loaded when first used: running a graph must not cost the import of torch.
_HOME_OF = {
    "OnnxCard": "card",
    "TemplateLayout": "card",
    "export_onnx": "onnx",
    "onnx_hash": "onnx_files",
    "read_onnx": "onnx_files",
    "OnnxModel": "onnx_model",
    "PairMaps": "onnx_model",
    "TrtRunner": "tensorrt",
    "build_engine": "tensorrt",
}

__all__ = [
    "OnnxCard",
    "OnnxModel",
    "PairMaps",
    "TemplateLayout",
    "TrtRunner",
    "build_engine",
    "export_onnx",
    "onnx_hash",
    "read_onnx",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'xcos_ext.export' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"xcos_ext.export.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
