"""What every backbone of the package offers: a grid map and, where it has an output block, an embedding."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from xcos_ext.card.preprocessing import ARCFACE, Preprocessing

__all__ = ["Recogniser", "SplitRecogniser", "in_type_of"]


def in_type_of(module: nn.Module, images: Tensor) -> Tensor:
    """Pictures in the floating-point type of a network's first weight: pictures come in fp32, whatever a network was
    brought to with ``.half()`` or ``.double()``. While a graph is made they stay as they are.

    >>> in_type_of(nn.Conv2d(3, 8, 3).double(), torch.zeros(1, 3, 4, 4)).dtype
    torch.float64
    """
    if torch.compiler.is_compiling() or not isinstance(images, Tensor):
        return images
    weight = next((p for p in module.parameters() if p.is_floating_point()), images)
    return images.to(weight.dtype)


class Recogniser(nn.Module):
    """Base class of face recognition networks split at their last feature map.

    A network is ``embedding = embed(grid(images))``: ``grid`` is everything up to the last map before spatial
    resolution is lost (512x7x7 for the networks here), ``embed`` is the output block behind it.

    Attributes:
        architecture: the registry name, as in :func:`xcos_ext.backbones.create`.
        grid_shape: (channels, height, width) of the map for one image of the expected size.
        embedding_size: length of the embedding, or None if the network was built without its output block.
        preprocessing: the pixel normalisation that the known weights of this architecture expect.

    >>> class Tiny(Recogniser):
    ...     grid_shape = (3, 7, 7)
    ...     def grid(self, images):
    ...         return nn.functional.avg_pool2d(images, 16)
    >>> Tiny().architecture, Tiny().embedding_size
    ('custom', None)
    """

    architecture: str = "custom"
    grid_shape: tuple[int, int, int] = (512, 7, 7)
    embedding_size: int | None = None
    preprocessing: Preprocessing = ARCFACE

    #: Prefixes of the state-dict keys that belong to the output block.
    output_prefixes: ClassVar[tuple[str, ...]] = ()

    #: Whether torch.fx can follow ``grid``, so that its batch norms can be folded.
    traceable: bool = True

    def grid(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W], normalised -> the last feature map [N, *grid_shape]."""
        raise NotImplementedError

    def embed(self, grid: Tensor) -> Tensor:
        """Feature map [N, *grid_shape] -> embedding [N, embedding_size], not normalised to unit length.

        Raises:
            RuntimeError: the network has no output block.
        """
        self._require_output()
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W], normalised, of any float type -> embedding [N, embedding_size], not normalised to unit
        length, in the network's type."""
        return self.embed(self.grid(in_type_of(self, images)))

    def _require_output(self) -> None:
        if self.embedding_size is None:
            raise RuntimeError(f"{self.architecture}: built without its output block, so it has no embedding")


class SplitRecogniser(Recogniser):
    """Joins two modules, ``body`` (images to map) and ``output`` (map to embedding), into a recogniser.

    For networks of other packages: split yours before the layer that removes the grid, and hand both parts
    over, for example ``SplitRecogniser(net.trunk, net.neck, grid_shape=(512, 7, 7), embedding_size=512)``.

    Args:
        body: maps images [N, 3, H, W] to [N, *grid_shape].
        output: maps [N, *grid_shape] to [N, embedding_size].
        grid_shape: (channels, height, width) of the map.
        embedding_size: length of the embedding.
        preprocessing: pixel normalisation of the network's input.

    >>> import torch
    >>> output = nn.Sequential(nn.Flatten(), nn.Linear(147, 8))
    >>> net = SplitRecogniser(nn.AvgPool2d(16), output, grid_shape=(3, 7, 7), embedding_size=8)
    >>> net(torch.zeros(2, 3, 112, 112)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        body: nn.Module,
        output: nn.Module,
        *,
        grid_shape: tuple[int, int, int] = (512, 7, 7),
        embedding_size: int = 512,
        preprocessing: Preprocessing = ARCFACE,
    ) -> None:
        super().__init__()
        self.body = body
        self.output = output
        self.grid_shape = grid_shape
        self.embedding_size = embedding_size
        self.preprocessing = preprocessing

    def grid(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> ``body(images)``."""
        return self.body(images)

    def embed(self, grid: Tensor) -> Tensor:
        """Feature map -> ``output(grid)``."""
        return self.output(grid)
