"""Whether an aligned crop looks like a face at all.

A recogniser gives two pictures of nothing a score like any other, so who takes a crop's alignment on trust asks here
first. The answer is that of the default detector's network (:mod:`.landmark_network`), which knows textures,
surroundings and faces upside down as no faces, whatever recogniser is used. It is computed in NumPy, because pair
graphs are compared without torch, and arrays enrolled without OpenCV. docs/verify.md measures.
"""

from __future__ import annotations

import functools
import json

import numpy as np

from xcos_ext.io.errors import ModelError
from xcos_ext.io.shipped import readable_file

from .detector import check_picture
from .landmarks import _WEIGHTS, crop_transform

__all__ = ["LIKELY", "face_likelihood"]

#: From this on a crop looks like a face, as it does to the default detector.
LIKELY = 0.5

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
#: Strides of LandmarkNetwork's convolutions, down to where it says whether there is a face.
_STRIDES = {"quarter": (2, 2, 1), "eighth": (2, 1), "sixteenth": (2, 1)}


def face_likelihood(crop: np.ndarray) -> float:
    """How much an aligned crop looks like a face.

    Args:
        crop: uint8 RGB [height, width, 3], aligned to the template (:func:`~xcos_ext.faces.template_for` its size).

    Returns:
        In [0, 1]; below :data:`LIKELY` it does not look like one. The mean of the crop and its mirror image.

    Raises:
        ValueError: another shape or type.
        ModelError: the network's file, which comes with the package, is missing or damaged.

    >>> face_likelihood(np.zeros((112, 112, 3), np.uint8)) < LIKELY
    True
    """
    check_picture(crop)
    size, layers, weight, bias = _network()
    to_seen = crop_transform(size)
    seen = crop @ _LUMA
    for axis in (0, 1):  # rows, columns
        zoom, shift = to_seen[1 - axis, 1 - axis], to_seen[1 - axis, 2]
        at = ((np.arange(size) - shift) / zoom + 0.5) * crop.shape[axis] / 112 - 0.5
        seen = _sampled(seen, at).T
    x = (seen - seen.mean()) / (seen.std() + 1e-3)
    x = np.stack([x, x[:, ::-1]])[..., None]  # channels last
    for kernel, shift, stride in layers:
        side = x.shape[1]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        around = [padded[:, r : r + side : stride, c : c + side : stride] for r in range(3) for c in range(3)]
        x = np.maximum(np.concatenate(around, 3) @ kernel + shift, 0)
    logits = (x.mean((1, 2)) @ weight + bias).astype(np.float64)
    return float((1 / (1 + np.exp(-logits))).mean())


def _sampled(image: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of an image [H, W] at fractional places [N], the border repeated."""
    at = at.clip(0, len(image) - 1)
    low = at.astype(int)
    part = (at - low)[:, None].astype(np.float32)
    return image[low] * (1 - part) + image[np.minimum(low + 1, len(image) - 1)] * part


@functools.cache
def _network() -> tuple[int, list[tuple[np.ndarray, np.ndarray, int]], np.ndarray, np.ndarray]:
    """Side of what the network sees; its convolutions, their normalisation folded in, as kernel [9 * inputs, outputs],
    shift and stride; weight and bias of the layer that says whether there is a face."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(readable_file(_WEIGHTS, "a weights file")), framework="numpy") as opened:
            size = json.loads(opened.metadata()["network"])["size"]
            read = {name: opened.get_tensor(name).astype(np.float32) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{error}; the file comes with xcos_ext: install the package again") from error
    layers = []
    for block, strides in _STRIDES.items():
        for i, stride in enumerate(strides):
            gamma, beta, mean, variance = (
                read[f"{block}.{i}.1.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
            )
            factor = gamma / np.sqrt(variance + 1e-5)
            kernel = read[f"{block}.{i}.0.weight"] * factor[:, None, None, None]
            layers.append((kernel.transpose(2, 3, 1, 0).reshape(-1, len(factor)), beta - mean * factor, stride))
    return size, layers, read["face.weight"][0], read["face.bias"]
