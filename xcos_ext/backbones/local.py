"""A body whose cells see only their own part of the face."""

from __future__ import annotations

from torch import Tensor, nn

from .staged import StagedNet

__all__ = ["LocalNet"]

# Channels at 28, 14 and 7 pixels, and residual blocks there.
_WIDTHS = (48, 128, 256)
_BLOCKS = (1, 3, 3)


class _Block(nn.Module):
    """x + BN(conv(ReLU(BN(conv x)))); starts as the identity."""

    def __init__(self, channels: int, size: int, hidden: int) -> None:
        super().__init__()
        first = nn.Conv2d(channels, hidden, size, 1, size // 2, bias=False)
        second = nn.Conv2d(hidden, channels, size, 1, size // 2, bias=False)
        for conv in (first, second):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.first = nn.Sequential(first, nn.BatchNorm2d(hidden), nn.ReLU(inplace=True))
        self.second = second
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.second(self.first(x)))


class _Down(nn.Sequential):
    """Halves the sides with an even kernel, so that cells stay in the middle of what they see."""

    def __init__(self, cin: int, cout: int, size: int) -> None:
        conv = nn.Conv2d(cin, cout, size, 2, (size - 2) // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


class LocalNet(StagedNet):
    """RGB [N, 3, 112, 112], (x/255 - 0.5)/0.5 -> map [N, 256, 7, 7], each cell from 44x44 pixels around its own 16x16.

    A cell of the usual networks sees the whole face. Here a pixel more than 14 beyond a cell's border cannot change the
    cell, by construction: 3x3 convolutions stop at 28x28, what follows are 1x1 convolutions. Batch norms use fixed
    statistics in evaluation mode, and nothing pools over the picture. (The idea of restricted receptive fields in
    face recognition: RRFNet, arXiv 2510.10753; this network is our own.)

    Args:
        output: accepted as for every backbone; there is no output block to leave out.
    """

    #: Side of the square of pixels that a cell sees; its middle is the cell's.
    receptive_field = 44

    def __init__(self, *, output: bool = True) -> None:
        kernels, inner = (4, 4, 2), (3, 1, 1)
        stages: list[nn.Module] = []
        for cin, cout, blocks, kernel, size in zip((12, *_WIDTHS), _WIDTHS, _BLOCKS, kernels, inner, strict=False):
            hidden = cout if size > 1 else 2 * cout
            stages.append(nn.Sequential(_Down(cin, cout, kernel), *(_Block(cout, size, hidden) for _ in range(blocks))))
        super().__init__("local", stages, _WIDTHS[-1])
