"""From aligned 8-bit face crops to the normalised tensor that a network expects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xcos_ext.io.arrays import picture_hint, refuse_masked
from xcos_ext.io.several import several

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ARCFACE", "IMAGENET", "Preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its input: size, and mean and standard deviation per RGB channel.

    ``x = (rgb / 255 - mean) / std``, channel by channel.

    Attributes:
        size: (height, width) of the aligned crop in pixels.
        mean: per-channel mean of RGB values in [0, 1].
        std: per-channel standard deviation of RGB values in [0, 1]; positive.

    >>> face = np.full((112, 112, 3), 255, np.uint8)
    >>> ARCFACE(face).shape, float(ARCFACE(face).max()), round(float(IMAGENET(face).max()), 2)
    (torch.Size([1, 3, 112, 112]), 1.0, 2.64)
    """

    size: tuple[int, int] = (112, 112)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        size, mean, std = tuple(self.size), tuple(self.mean), tuple(self.std)
        if len(size) != 2 or any(int(s) != s or s < 1 for s in size):
            raise ValueError(f"size: expected two positive integers (height, width), got {size}")
        if len(mean) != 3 or not np.all(np.isfinite(mean)):
            raise ValueError(f"mean: expected three finite numbers (R, G, B), got {mean}")
        if len(std) != 3 or not np.all(np.isfinite(std)) or min(std) <= 0:
            raise ValueError(f"std: expected three positive numbers (R, G, B), got {std}")
        with np.errstate(all="ignore"):  # as array() computes them
            ends = (np.array([[0], [1]], np.float32) - np.array(mean, np.float32)) / np.array(std, np.float32)
        if not np.isfinite(ends).all():
            raise ValueError(f"mean, std: expected numbers with which 0 and 1 stay finite in fp32, got {mean}, {std}")
        object.__setattr__(self, "size", tuple(int(s) for s in size))
        object.__setattr__(self, "mean", tuple(float(m) for m in mean))
        object.__setattr__(self, "std", tuple(float(s) for s in std))

    def array(self, faces: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Turn aligned crops into a batch, without torch.

        Args:
            faces: one uint8 RGB array [H, W, 3], a batch [N, H, W, 3], or a sequence of [H, W, 3] arrays,
                with (H, W) equal to ``size``.

        Returns:
            fp32 array [N, 3, H, W], contiguous. An empty sequence gives [0, 3, H, W].

        Raises:
            TypeError: an array is not uint8, or has a mask.
            ValueError: an array has another shape.
        """
        height, width = self.size
        single = isinstance(faces, np.ndarray) and faces.ndim != 4
        refuse_masked(faces=faces)
        items = []
        for i, given in enumerate([faces] if single else several(faces, "faces", "pictures", ordered=True)):
            refuse_masked(**{f"faces[{i}]": given})
            face = np.asarray(given)
            if face.dtype != np.uint8:
                got = face.dtype if face.dtype != object else type(given).__name__
                raise TypeError(f"faces[{i}]: expected a uint8 array, got {got}{picture_hint(given)}")
            if face.shape != (height, width, 3):
                raise ValueError(f"faces[{i}]: expected an aligned RGB crop ({height}, {width}, 3), got {face.shape}")
            items.append(face)
        if not items:
            return np.empty((0, 3, height, width), np.float32)
        pixels = np.stack(items).transpose(0, 3, 1, 2).astype(np.float32)
        mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (self.mean, self.std))
        return np.ascontiguousarray((pixels / np.float32(255) - mean) / std)

    def check_normalised(self, least: float, most: float, argument: str, hint: str) -> None:
        """Refuse pixels that no preprocessing like this one gives, such as 0..255.

        Args:
            least: the least pixel.
            most: the largest; infinite and NaN ones pass, and become NaN scores.
            argument: that they are of.
            hint: what to do instead.

        Raises:
            ValueError: pixels outside by more than 16 times the range, which noise and networks that draw leave
                a little; 0..255 is 127 times that of -1..1.

        >>> ARCFACE.check_normalised(0, 255, "images", "call preprocessing(faces)")
        Traceback (most recent call last):
        ValueError: images: expected pixels normalised to -1 .. 1, got 0 .. 255; call preprocessing(faces)
        """
        ends = [((end - mean) / std) for end in (0, 1) for mean, std in zip(self.mean, self.std, strict=True)]
        low, high = min(ends), max(ends)
        slack = 16 * (high - low)
        if math.isfinite(least) and math.isfinite(most) and (least < low - slack or most > high + slack):
            raise ValueError(
                f"{argument}: expected pixels normalised to {low:.3g} .. {high:.3g}, got {least:.3g} .. {most:.3g}; "
                f"{hint}"
            )

    def __call__(self, faces: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        """:meth:`array` as a tensor on the CPU."""
        import torch

        return torch.from_numpy(self.array(faces))


#: (x / 255 - 0.5) / 0.5: the ArcFace family, xCos included.
ARCFACE = Preprocessing()
#: ImageNet statistics: the MobileFaceNet with ReLU6.
IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
