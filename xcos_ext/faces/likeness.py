"""Whether an aligned crop looks like a face at all.

A recogniser gives two pictures of nothing a score like any other, so who takes a crop's alignment on trust asks here
first. The answer is that of the default detector's network, whatever recogniser is used. It is computed in NumPy,
because pair graphs are compared without torch, and arrays enrolled without OpenCV. docs/verify.md measures.
"""

from __future__ import annotations

import functools

import numpy as np

from .detector import check_picture
from .network import CROP, LAYERS, MIDDLE, crop_transform, load_weights, reading

__all__ = ["LIKELY", "face_likelihood"]

#: From this on a crop looks like a face, as it does to the default detector.
LIKELY = 0.5


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
    to_seen = crop_transform()
    seen = crop.astype(np.float32)
    for axis in (0, 1):  # rows, columns
        zoom, shift = to_seen[1 - axis, 1 - axis], to_seen[1 - axis, 2]
        at = ((np.arange(CROP) - shift) / zoom + 0.5) * crop.shape[axis] / 112 - 0.5
        seen = _sampled(seen, at).swapaxes(0, 1)
    pixels = np.stack([seen, seen[:, ::-1]]) / 64 - 2
    logits = reading("read", pixels, _convolution, _twice)[:, MIDDLE, MIDDLE, 10].astype(np.float64)
    return float(1 / (1 + np.exp(-logits.mean())))


def _sampled(image: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of an image [H, W, C] at fractional places [N], the border repeated."""
    at = at.clip(0, len(image) - 1)
    low = at.astype(int)
    part = (at - low)[:, None, None].astype(np.float32)
    return image[low] * (1 - part) + image[np.minimum(low + 1, len(image) - 1)] * part


def _convolution(name: str, x: np.ndarray, relu: bool) -> np.ndarray:
    """A layer on pictures [N, H, W, C]."""
    _, outputs, kernel, stride, groups = LAYERS[name]
    weight, bias = _kernel(name)
    height, width = x.shape[1:3]
    if kernel > 1:
        x = np.pad(x, ((0, 0), *[(kernel // 2, kernel // 2)] * 2, (0, 0)))
    around = [x[:, r : r + height : stride, c : c + width : stride] for r in range(kernel) for c in range(kernel)]
    if groups == 1:
        y = np.concatenate(around, 3) @ weight.reshape(-1, outputs)
    else:  # every channel for itself
        y = sum(part * tap for part, tap in zip(around, weight[:, 0], strict=True))
    y += bias
    return np.maximum(y, 0, out=y) if relu else y


@functools.cache
def _kernel(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight [taps, inputs of a group, outputs] and bias of a layer."""
    weight = _weights()[f"{name}.weight"]
    return weight.transpose(2, 3, 1, 0).reshape(-1, *weight.shape[1::-1]), _weights()[f"{name}.bias"]


@functools.cache
def _weights() -> dict[str, np.ndarray]:
    return load_weights()


def _twice(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    return x.repeat(2, 1).repeat(2, 2)[:, : like.shape[1], : like.shape[2]]
