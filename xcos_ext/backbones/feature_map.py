"""Places where a network may be split: its feature maps that everything behind them depends on alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from xcos_ext.io.text import few

__all__ = ["FeatureMap", "is_map_shape", "shown", "with_choice"]

# Sides of a map that is worth comparing cell by cell: fewer cells say nothing of where, more are not yet a face.
_SIDES = range(4, 17)


@dataclass(frozen=True)
class FeatureMap:
    """A feature map of a network, as candidate for the grid that xCos compares.

    Attributes:
        name: of the tensor in an ONNX graph, or of the submodule whose output it is.
        shape: (channels, height, width).
        op: what makes it: an ONNX operator, or a module's class.
        distance: operators or modules between it and the output.
        affine: whether all of these are affine, as the closed form needs; None: not known.
        chosen: whether it is the one that is taken unless another is named.

    >>> FeatureMap("layer4", (512, 7, 7), "Sequential", distance=4).chosen
    False
    """

    name: str
    shape: tuple[int, int, int]
    op: str
    distance: int
    affine: bool | None = None
    chosen: bool = False


def is_map_shape(shape: Sequence[int] | None) -> bool:
    """Whether [N, C, H, W] is that of a square map with some cells and channels."""
    return shape is not None and len(shape) == 4 and shape[2] == shape[3] and shape[2] in _SIDES and shape[1] > 1


def shown(maps: Sequence[FeatureMap], most: int = 4) -> str:
    """The maps in a few words, for messages."""
    return few((f"{m.name!r} {'x'.join(map(str, m.shape))}" for m in maps), most) or "none"


def with_choice(maps: Sequence[FeatureMap], passed: Callable[[FeatureMap, FeatureMap], bool]) -> list[FeatureMap]:
    """The map nearest to the output is marked, or the one in front of what is passed.

    Args:
        maps: nearest to the output first.
        passed: whether a map is the one behind it in the list after batch norm, dropout or the like.
    """
    chosen = 0
    while chosen + 1 < len(maps) and passed(maps[chosen], maps[chosen + 1]):
        chosen += 1
    return [replace(m, chosen=i == chosen) for i, m in enumerate(maps)]
