"""Models at their fastest, here and in other runtimes: folded, compiled, as ONNX graphs, as TensorRT engines.

``export_onnx(model, "pair.onnx")`` writes a graph (needs the ``onnx`` extra); ``OnnxModel("pair.onnx")`` runs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiled import CompiledModel, Trial, compile_for_inference
    from .inference import for_inference
    from .onnx_export import export_onnx
    from .onnx_model import OnnxModel, PairMaps
    from .tensorrt import TrtRunner, build_engine

# Loaded when first used: running a graph must not cost the import of torch.
_HOME_OF = {
    "CompiledModel": "compiled",
    "OnnxModel": "onnx_model",
    "PairMaps": "onnx_model",
    "Trial": "compiled",
    "TrtRunner": "tensorrt",
    "build_engine": "tensorrt",
    "compile_for_inference": "compiled",
    "export_onnx": "onnx_export",
    "for_inference": "inference",
}

__all__ = [
    "CompiledModel",
    "OnnxModel",
    "PairMaps",
    "Trial",
    "TrtRunner",
    "build_engine",
    "compile_for_inference",
    "export_onnx",
    "for_inference",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'xcos_ext.deploy' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"xcos_ext.deploy.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
