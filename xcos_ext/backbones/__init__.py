"""Face recognition networks that give a grid map (512x7x7) and, with their output block, an embedding.

Networks of other packages become recognisers through :func:`from_layer`, :class:`OnnxRecogniser` or
:class:`SplitRecogniser`; :func:`feature_maps` shows where they can be split.
"""

from .feature_map import FeatureMap
from .layers import LayerRecogniser, from_layer
from .mobilefacenet import MobileFaceNet, MobileFaceNetReLU
from .onnx_recogniser import OnnxRecogniser
from .recogniser import Recogniser, SplitRecogniser
from .registry import available, create, register
from .residual import IRSE, IResNet
from .slim import SlimFaceNet
from .split_points import feature_maps

__all__ = [
    "IRSE",
    "FeatureMap",
    "IResNet",
    "LayerRecogniser",
    "MobileFaceNet",
    "MobileFaceNetReLU",
    "OnnxRecogniser",
    "Recogniser",
    "SlimFaceNet",
    "SplitRecogniser",
    "available",
    "create",
    "feature_maps",
    "from_layer",
    "register",
]
