"""Where a network can be split, whatever it is."""

from __future__ import annotations

import os

from torch import Tensor, nn

from .feature_map import FeatureMap
from .layers import layer_feature_maps
from .onnx_recogniser import onnx_feature_maps

__all__ = ["feature_maps"]


def feature_maps(
    network: nn.Module | str | os.PathLike[str], example: Tensor | None = None, *, output: str | None = None
) -> list[FeatureMap]:
    """The maps at which a network may be split for xCos, nearest to its output first.

    Listed are square maps of 4 to 16 cells a side that the output depends on alone: no connection leads around them. Of
    a module that torch.fx cannot follow, all such maps are listed, whatever leads around them.

    Args:
        network: an ONNX file, or a module that maps images to embeddings.
        example: of a module: images [N, 3, height, width]; None: two grey ones of 112 x 112.
        output: of an ONNX file: the tensor that is the embedding; None: its only output [N, D].

    Returns:
        The maps; the one that :class:`OnnxRecogniser` or :func:`from_layer` takes by default is marked. Empty where
        there is none.

    Raises:
        ModelError: a file that cannot be used, no single embedding, or a module that fails for the example.
        TypeError: neither a file nor a module, or an argument that is for the other.
        MissingPackageError: onnx or onnxruntime is not installed.

    >>> net = nn.Sequential(nn.Conv2d(3, 6, 16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(294, 8))
    >>> [(found.name, found.shape, found.affine, found.chosen) for found in feature_maps(net)]
    [('1', (6, 7, 7), True, True), ('0', (6, 7, 7), False, False)]
    """
    if isinstance(network, nn.Module):
        if output is not None:
            raise TypeError("output: for ONNX files only")
        return layer_feature_maps(network, example)
    if not isinstance(network, (str, os.PathLike)):
        raise TypeError(f"network: expected an ONNX file or a torch module, got {type(network).__name__}")
    if example is not None:
        raise TypeError("example: for modules only")
    return onnx_feature_maps(network, output)
