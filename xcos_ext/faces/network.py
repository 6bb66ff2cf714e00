"""The default detector's network: one definition that runs on torch to find faces, on NumPy to judge an aligned crop,
and with batch normalisation in ``recipes/train_detector.py``.

Anchor-free, as FCOS (Tian et al., ICCV 2019): every cell of three maps says whether it lies at the middle of a face,
and where that face's box, five points and pose then are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.io.errors import ModelError
from xcos_ext.io.shipped import DATA, readable_file

from .alignment import ARCFACE_TEMPLATE

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CROP",
    "LAYERS",
    "MIDDLE",
    "OUTPUTS",
    "STRIDES",
    "crop_transform",
    "decoded",
    "features",
    "load_weights",
    "maps",
    "reading",
    "save_weights",
]

_WEIGHTS = DATA / "detector.safetensors"
_FORMAT, _VERSION = "xcos_ext.detector", "1"

#: Pixels from a cell to the next on the three maps; cell i is centred on pixel ``stride * i``.
STRIDES = (8, 16, 32)
#: Channels of a map: logit of a face; its middle (x, y) from the cell's and log (width, height) of its box, in strides;
#: five points (x, y) from the cell's centre in strides; yaw and pitch in radians.
OUTPUTS = 17

#: Input channels, output channels, kernel, stride and groups of each convolution.
LAYERS: dict[str, tuple[int, int, int, int, int]] = {
    "stem": (3, 16, 3, 2, 1),
    "down4": (16, 32, 3, 2, 1),
    "down8": (32, 56, 3, 2, 1),
    "down16": (56, 64, 3, 2, 1),
    "down32": (64, 64, 3, 2, 1),
    "side8": (56, 64, 1, 1, 1),
    "side16": (64, 64, 1, 1, 1),
    "out": (64, OUTPUTS, 1, 1, 1),
    "rough": (64, 10, 5, 1, 1),
    "read": (64, 11, 5, 1, 1),
}
for _width, _names in ((32, "a4"), (56, "a8 b8"), (64, "a16 b16 a32 b32 c32 p8 p16 head")):
    for _name in _names.split():
        LAYERS |= {f"{_name}.depth": (_width, _width, 3, 1, _width), f"{_name}.point": (_width, _width, 1, 1, 1)}

#: Side of the upright crop that :func:`reading` sees, and the cell that is its middle.
CROP = 128
MIDDLE = CROP // 2 // STRIDES[1]
_EYES = 36.0  # pixels between the eyes in it

#: A convolution by name, with its bias, and (True) cut off below zero.
Convolution = Callable[[str, Any, bool], Any]
#: Repeats each cell of its first argument twice, down to the size of its second.
Repetition = Callable[[Any, Any], Any]


def _trunk(pixels: Any, convolution: Convolution, twice: Repetition) -> tuple[Any, Any, Any]:
    """Features 8, 16 and 32 pixels apart; the latter two have seen each other."""
    x = _block("a4", convolution("down4", convolution("stem", pixels, True), True), convolution)
    at8 = _block("b8", _block("a8", convolution("down8", x, True), convolution), convolution)
    at16 = _block("b16", _block("a16", convolution("down16", at8, True), convolution), convolution)
    at32 = convolution("down32", at16, True)
    for name in ("a32", "b32", "c32"):
        at32 = _block(name, at32, convolution)
    at16 = convolution("side16", at16, True)
    return at8, _block("p16", at16 + twice(at32, at16), convolution), at32


def _block(name: str, x: Any, convolution: Convolution) -> Any:
    return convolution(f"{name}.point", convolution(f"{name}.depth", x, False), True)


def maps(pixels: Any, convolution: Convolution, twice: Repetition) -> list[Any]:
    """The three maps of pictures.

    Args:
        pixels: RGB, ``value / 64 - 2``, so that mid-grey is what lies outside the picture.
        convolution: applies a layer of :data:`LAYERS`.
        twice: enlarges a map.

    Returns:
        A map with :data:`OUTPUTS` channels for each of :data:`STRIDES`.
    """
    at8, at16, at32 = _trunk(pixels, convolution, twice)
    at8 = convolution("side8", at8, True)
    at8 = _block("p8", at8 + twice(at16, at8), convolution)
    return [convolution("out", _block("head", x, convolution), False) for x in (at8, at16, at32)]


def features(pixels: Any, convolution: Convolution, twice: Repetition) -> Any:
    """What upright crops (:func:`crop_transform`) show, 16 pixels apart: :func:`reading` is linear in it around
    :data:`MIDDLE`. Arguments as of :func:`maps`."""
    return _trunk(pixels, convolution, twice)[1]


def reading(layer: str, pixels: Any, convolution: Convolution, twice: Repetition) -> Any:
    """What upright crops (:func:`crop_transform`) show: a map of which the middle cell (:data:`MIDDLE`) has (x, y) of
    the five points in pixels from the crop's middle, and with the layer ``"read"`` the logit of its being a face.

    Args:
        layer: ``"rough"`` for crops that may be far off, ``"read"`` for such that a rough reading has given.
        pixels, convolution, twice: as of :func:`maps`.
    """
    return convolution(layer, features(pixels, convolution, twice), False)


def crop_transform() -> np.ndarray:
    """From the template to the upright crop that :func:`reading` sees, [2, 3]: the points' mean is at its middle."""
    zoom = _EYES / (ARCFACE_TEMPLATE[1, 0] - ARCFACE_TEMPLATE[0, 0])
    return np.hstack([zoom * np.eye(2), (CROP / 2 - zoom * ARCFACE_TEMPLATE.mean(0))[:, None]])


def decoded(levels: Sequence[np.ndarray], least: float) -> np.ndarray:
    """The cells that see a face.

    Args:
        levels: the maps of one picture, [H, W, OUTPUTS] each.
        least: score from which on a cell counts.

    Returns:
        fp64 [N, OUTPUTS], in pixels: score in [0, 1]; middle, sides, five points; yaw, pitch in radians.
    """
    found = []
    for level, stride in zip(levels, STRIDES, strict=True):
        score = 1 / (1 + np.exp(-level[..., 0].astype(np.float64)))
        y, x = np.nonzero(score >= least)
        cells = level[y, x].astype(np.float64)
        centre = np.stack([x, y], 1) * stride
        cells[:, 0] = score[y, x]
        cells[:, 1:3] = cells[:, 1:3] * stride + centre
        cells[:, 3:5] = np.exp(cells[:, 3:5].clip(-6, 6)) * stride
        cells[:, 5:15] = cells[:, 5:15] * stride + np.tile(centre, 5)
        found.append(cells)
    return np.concatenate(found)


def load_weights(path: str | os.PathLike[str] | None = None) -> dict[str, np.ndarray]:
    """Weights and biases of :data:`LAYERS`, fp32; None: those that come with the package.

    Raises:
        ModelError: the file is missing, damaged, or of another network.
    """
    from safetensors import SafetensorError, safe_open

    file = readable_file(_WEIGHTS if path is None else path, "a detector's weights file")
    hint = "; the file comes with xcos_ext: install the package again" if path is None else ""
    try:
        with safe_open(str(file), framework="numpy") as opened:
            notes = opened.metadata() or {}
            found = {name: opened.get_tensor(name).astype(np.float32) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as weights ({error}){hint}") from error
    if (notes.get("xcos_format"), notes.get("version")) != (_FORMAT, _VERSION):
        raise ModelError(f"{file}: expected weights of a detector of version {_VERSION}, got other ones{hint}")
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {f"{name}.weight": (o, i // g, k, k) for name, (i, o, k, _, g) in LAYERS.items()}
    shapes |= {f"{name}.bias": (o,) for name, (_, o, *_) in LAYERS.items()}
    if {name: array.shape for name, array in found.items()} != shapes:
        raise ModelError(f"{file}: expected the detector's layers, got others{hint}")
    if not all(np.isfinite(array).all() for array in found.values()):
        raise ModelError(f"{file}: expected finite weights, got NaN or infinity{hint}")
    return found


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write weights that :func:`load_weights` reads: fp16 safetensors, with ``notes`` among its metadata.

    Raises:
        OutputError: the file cannot be written; no partial file is left.
    """
    from xcos_ext.io.weights import write_safetensors

    halves = {name: tensor.half() for name, tensor in weights.items()}
    write_safetensors(path, halves, {**notes, "xcos_format": _FORMAT, "version": _VERSION})
