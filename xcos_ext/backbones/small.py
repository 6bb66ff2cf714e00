"""The small bodies of our own: one whose cells see the whole face, and one whose cells see only their own part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from xcos_ext.card.preprocessing import ARCFACE

from .recogniser import Recogniser

__all__ = ["CompactNet", "LocalNet", "squares_as_channels"]


def _conv(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Keeps or halves the sides; halved by an even kernel, cells stay in the middle of what they see."""
    return nn.Conv2d(cin, cout, kernel, stride, (kernel + 1) // 2 - 1 if stride > 1 else kernel // 2, bias=False)


def _initialised(*convolutions: nn.Conv2d) -> tuple[nn.Conv2d, ...]:
    for conv in convolutions:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return convolutions


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

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d) -> None:
        super().__init__()
        self.first = _with_relu(first)
        self.second = second
        self.norm = nn.BatchNorm2d(second.out_channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.second(self.first(x)))


class _StagedNet(Recogniser):
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
        self.stages = nn.ModuleList(stages)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The stages' maps of normalised RGB [N, 3, 112, 112]: [N, C, 28, 28], [N, C, 14, 14], [N, C, 7, 7]."""
        x = squares_as_channels(images)
        made = []
        for stage in self.stages:
            x = stage(x)
            made.append(x)
        return tuple(made)

    def grid(self, images: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> [N, C, 7, 7]."""
        return self.maps(images)[-1]


class CompactNet(_StagedNet):
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
        # Channels at 28, 14 and 7 pixels, and residual blocks there.
        plan = ((12, 32, 2), (32, 96, 3), (96, 128, 2))

        def conv(cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
            return _initialised(_conv(cin, cout, 3, stride))[0]

        stages: list[nn.Module] = [
            nn.Sequential(_with_relu(conv(a, b, 2)), *(_Block(conv(b, b), conv(b, b)) for _ in range(blocks)))
            for a, b, blocks in plan
        ]
        super().__init__("compact", stages, 128)


class LocalNet(_StagedNet):
    """RGB [N, 3, 112, 112], (x/255 - 0.5)/0.5 -> map [N, 256, 7, 7], each cell from 44x44 pixels around its own 16x16.

    A cell of the usual networks sees the whole face. Here a pixel more than 14 beyond a cell's border cannot change the
    cell, by construction: 3x3 convolutions stop at 28x28, what follows are 1x1 convolutions. Batch norms use fixed
    statistics in evaluation mode, and nothing pools over the picture. (The idea of restricted receptive fields in
    face recognition: RRFNet, arXiv 2510.10753; this network is our own.)

    Args:
        output: accepted as for every backbone; there is no output block to leave out.

    >>> import torch
    >>> [tuple(made.shape[1:]) for made in LocalNet().eval().maps(torch.zeros(1, 3, 112, 112))]
    [(48, 28, 28), (128, 14, 14), (256, 7, 7)]
    """

    #: Side of the square of pixels that a cell sees; its middle is the cell's.
    receptive_field = 44

    def __init__(self, *, output: bool = True) -> None:
        # Channels at 28, 14 and 7 pixels, residual blocks there, and the kernels between and inside them.
        plan = ((12, 48, 1, 4, 3), (48, 128, 3, 4, 1), (128, 256, 3, 2, 1))

        def block(channels: int, kernel: int) -> _Block:
            hidden = channels if kernel > 1 else 2 * channels
            return _Block(*_initialised(_conv(channels, hidden, kernel), _conv(hidden, channels, kernel)))

        stages: list[nn.Module] = [
            nn.Sequential(_with_relu(*_initialised(_conv(a, b, down, 2))), *(block(b, inner) for _ in range(blocks)))
            for a, b, blocks, down, inner in plan
        ]
        super().__init__("local", stages, 256)
