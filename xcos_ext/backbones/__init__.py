"""Face recognition networks that give a grid map (512x7x7) and, with their output block, an embedding."""

from xcos_ext.preprocessing import ARCFACE, IMAGENET, Preprocessing

from .compact import CompactNet
from .irse import IRSE
from .local import LocalNet
from .mobilefacenet import MobileFaceNet, MobileFaceNetReLU
from .recogniser import Recogniser, SplitRecogniser
from .registry import available, create, register

__all__ = [
    "ARCFACE",
    "IMAGENET",
    "IRSE",
    "CompactNet",
    "LocalNet",
    "MobileFaceNet",
    "MobileFaceNetReLU",
    "Preprocessing",
    "Recogniser",
    "SplitRecogniser",
    "available",
    "create",
    "register",
]
