"""What the small bodies of our own have in common."""

from __future__ import annotations

from torch import Tensor, nn

from xcos_ext.card.preprocessing import ARCFACE

from .recogniser import Recogniser

__all__ = ["StagedNet"]


class StagedNet(Recogniser):
    """Blocks of 2x2 pixels become channels, then come stages, each at half the size of the one before; no output block.

    Args:
        architecture: the registry name.
        stages: their modules; the last one's output is the map.
        channels: of the map.
    """

    def __init__(self, architecture: str, stages: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.architecture = architecture
        self.grid_shape = (channels, 7, 7)
        self.preprocessing = ARCFACE
        self.fold = nn.PixelUnshuffle(2)
        self.stages = nn.ModuleList(stages)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The stages' maps of normalised RGB [N, 3, 112, 112]: [N, C, 28, 28], [N, C, 14, 14], [N, C, 7, 7]."""
        x = self.fold(images)
        made = []
        for stage in self.stages:
            x = stage(x)
            made.append(x)
        return tuple(made)

    def grid(self, images: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> [N, C, 7, 7]."""
        return self.maps(images)[-1]
