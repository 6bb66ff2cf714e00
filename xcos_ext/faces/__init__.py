"""Reading pictures, finding faces in them, and cutting them out upright (needs the ``cli`` extra)."""

from xcos_ext.io.text import display_name

from .alignment import ARCFACE_TEMPLATE, align_face, apply_transform, similarity_transform, template_for, warp
from .detector import Detector, Face
from .folders import PersonFolder, PictureTree
from .likeness import LIKELY, face_likelihood
from .pictures import MAX_PIXELS, decode_picture, picture_of, read_picture
from .pose import pose_of
from .quality import Quality, face_quality
from .reader import (
    POLICIES,
    AlignedFace,
    choice_in_words,
    choose_face,
    create_detector,
    detector_maker,
    extract_face,
    read_face,
)
from .small import SmallDetector
from .yunet import YuNetDetector

__all__ = [
    "ARCFACE_TEMPLATE",
    "LIKELY",
    "MAX_PIXELS",
    "POLICIES",
    "AlignedFace",
    "Detector",
    "Face",
    "PersonFolder",
    "PictureTree",
    "Quality",
    "SmallDetector",
    "YuNetDetector",
    "align_face",
    "apply_transform",
    "choice_in_words",
    "choose_face",
    "create_detector",
    "decode_picture",
    "detector_maker",
    "display_name",
    "extract_face",
    "face_likelihood",
    "face_quality",
    "picture_of",
    "pose_of",
    "read_face",
    "read_picture",
    "similarity_transform",
    "template_for",
    "warp",
]
