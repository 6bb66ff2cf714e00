"""Reading pictures, finding faces in them, and cutting them out upright (needs the ``cli`` extra)."""

from xcos_ext.io.text import display_name

from .alignment import ARCFACE_TEMPLATE, align_face, apply_transform, similarity_transform, template_for, warp
from .cascade import CascadeDetector
from .detector import Detector, Face
from .folders import PersonFolder, PictureTree
from .landmarks import LandmarkReader
from .likeness import LIKELY, face_likelihood
from .pictures import MAX_PIXELS, decode_picture, read_picture
from .reader import POLICIES, AlignedFace, choice_in_words, choose_face, create_detector, extract_face, read_face
from .yunet import YuNetDetector

__all__ = [
    "ARCFACE_TEMPLATE",
    "LIKELY",
    "MAX_PIXELS",
    "POLICIES",
    "AlignedFace",
    "CascadeDetector",
    "Detector",
    "Face",
    "LandmarkReader",
    "PersonFolder",
    "PictureTree",
    "YuNetDetector",
    "align_face",
    "apply_transform",
    "choice_in_words",
    "choose_face",
    "create_detector",
    "decode_picture",
    "display_name",
    "extract_face",
    "face_likelihood",
    "read_face",
    "read_picture",
    "similarity_transform",
    "template_for",
    "warp",
]
