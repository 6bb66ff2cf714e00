"""The default model's body, small and our own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from xcos_ext.card.preprocessing import ARCFACE

from .recogniser import Recogniser

__all__ = ["CompactNet", "squares_as_channels"]


def _conv(cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _with_relu(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True))


@fx.wrap  # one step of a graph, as it looks at the number of pictures
def squares_as_channels(images: Tensor) -> Tensor:
    """2x2 pixels to channels, of no pictures too, which torch's operator gives back as they came."""
    if not torch.jit.is_tracing() and images.shape[0] == 0:
        n, channels, height, width = images.shape
        return images.reshape(n, 4 * channels, height // 2, width // 2)
    return F.pixel_unshuffle(images, 2)


class _Block(nn.Module):
    """x + BN(second(ReLU(BN(first x)))); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _with_relu(_conv(channels, channels))
        self.second = _conv(channels, channels)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.second(self.first(x)))


class CompactNet(Recogniser):
    """The default model's body: RGB [N, 3, 112, 112], (x/255 - 0.5)/0.5 -> map [N, 128, 7, 7].

    Blocks of 2x2 pixels become channels, then come three stages of plain residual blocks at 28, 14 and 7 pixels.
    Dense 3x3 convolutions rather than depthwise ones: on a CPU they do several times the work in the same time
    (figures in docs/models.md). The head behind it projects every cell to the grid feature. There is no output
    block: the flattened grid feature serves as the embedding.

    Args:
        output: accepted as for every backbone; there is no output block to leave out.

    >>> import torch
    >>> CompactNet().eval().grid(torch.zeros(1, 3, 112, 112)).shape
    torch.Size([1, 128, 7, 7])
    """

    def __init__(self, *, output: bool = True) -> None:
        super().__init__()
        self.architecture = "compact"
        # Channels at 28, 14 and 7 pixels, and residual blocks there.
        plan = ((12, 32, 2), (32, 96, 3), (96, 128, 2))
        self.grid_shape = (128, 7, 7)
        self.preprocessing = ARCFACE
        self.stages = nn.ModuleList(
            nn.Sequential(_with_relu(_conv(a, b, 2)), *(_Block(b) for _ in range(blocks))) for a, b, blocks in plan
        )

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The stages' maps of normalised RGB [N, 3, 112, 112]: [N, 32, 28, 28], [N, 96, 14, 14], [N, 128, 7, 7]."""
        x = squares_as_channels(images)
        made = []
        for stage in self.stages:
            x = stage(x)
            made.append(x)
        return tuple(made)

    def grid(self, images: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> [N, 128, 7, 7]."""
        return self.maps(images)[-1]
