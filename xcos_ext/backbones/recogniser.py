"""What every backbone of the package offers: a grid map and, where it has an output block, an embedding."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from xcos_ext.card.preprocessing import ARCFACE, Preprocessing

__all__ = ["Recogniser", "SplitRecogniser"]


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
        """Images [N, 3, H, W], normalised -> embedding [N, embedding_size], not normalised to unit length."""
        return self.embed(self.grid(images))

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
