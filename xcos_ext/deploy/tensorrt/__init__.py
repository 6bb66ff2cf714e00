"""TensorRT engines of ONNX graphs (needs the ``tensorrt`` extra and an NVIDIA GPU): build, keep, run.

``build_engine(onnx, plan)`` writes a plan with its sidecar, ``cached_engine(onnx, folder)`` only when it must, and
``TrtRunner(plan).run({name: tensor})`` runs it on torch's tensors. docs/deploy.md has the rest.
"""

from .build import build_engine, cached_engine
from .plan import BatchProfile, EngineError, PlanCard, TensorRTError, read_card
from .runner import TrtRunner

__all__ = [
    "BatchProfile",
    "EngineError",
    "PlanCard",
    "TensorRTError",
    "TrtRunner",
    "build_engine",
    "cached_engine",
    "read_card",
]
