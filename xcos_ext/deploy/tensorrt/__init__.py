"""TensorRT engines of ONNX graphs (needs the ``tensorrt`` extra and an NVIDIA GPU): build, keep, run.

``build_engine(onnx, plan)`` writes a plan with its sidecar, ``cached_engine(onnx, folder)`` only when it must, and
``TrtRunner(plan).run({name: tensor})`` runs it on torch's tensors. docs/tensorrt.md has the rest.
"""

from .build import DEFAULT_WORKSPACE, build_engine
from .cache import cached_engine
from .package import EngineError, TensorRTError
from .plan import PlanCard, TensorCard, read_card
from .profiles import DEFAULT_PROFILES, BatchProfile
from .runner import TrtRunner

__all__ = [
    "DEFAULT_PROFILES",
    "DEFAULT_WORKSPACE",
    "BatchProfile",
    "EngineError",
    "PlanCard",
    "TensorCard",
    "TensorRTError",
    "TrtRunner",
    "build_engine",
    "cached_engine",
    "read_card",
]
