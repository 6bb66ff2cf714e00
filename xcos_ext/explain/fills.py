"""What takes the place of pixels that are taken away."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from xcos_ext.card import Preprocessing

__all__ = ["FILLS", "blurred", "filled"]

#: Fill of a measurement -> what it is.
FILLS: Mapping[str, str] = {
    "zero": "black",
    "blur": "the picture itself, blurred: a Gaussian of 1/14 of its height",
    "mean-face": "the mean of the faces measured on",
}


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images [N, C, H, W] under a Gaussian of ``sigma`` pixels; the edge of the picture is repeated beyond it."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def filled(kind: str, images: Tensor, preprocessing: Preprocessing, mean_face: Tensor | None = None) -> Tensor:
    """The pictures that are shown where a picture's own pixels are taken away.

    >>> filled("mean", torch.arange(12.0).view(1, 3, 2, 2), Preprocessing())[0, :, 0, 0]
    tensor([1.5000, 5.5000, 9.5000])

    Args:
        kind: a key of :data:`FILLS`; or ``"black"``, which is zero, or ``"mean"``, the picture's own mean colour.
        images: normalised [N, 3, H, W].
        preprocessing: they were normalised by: black is pixel value 0, not 0 after normalisation.
        mean_face: normalised [3, H, W], for ``"mean-face"``.

    Returns:
        [N, 3, H, W], possibly expanded.

    Raises:
        ValueError: no such fill, or no mean face for it.
    """
    if kind in ("zero", "black"):
        black = [-mean / std for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)]
        return images.new_tensor(black).view(1, 3, 1, 1).expand_as(images)
    if kind == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    if kind == "blur":
        return blurred(images, images.shape[2] / 14)
    if kind == "mean-face":
        if mean_face is None:
            raise ValueError("mean_face: expected a picture for the fill mean-face, got none")
        return mean_face.to(images).expand_as(images)
    raise ValueError(f"fill: expected one of {', '.join(FILLS)}, got {kind!r}")
