"""The body of the default model: small, dense 3x3 convolutions, made to be trained and used on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from .staged import StagedNet

__all__ = ["CompactNet"]

# Channels at 28, 14 and 7 pixels, and residual blocks there.
_WIDTHS = (32, 96, 128)
_BLOCKS = (2, 3, 2)


def _conv(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


class _Block(nn.Module):
    """x + BN(conv(ReLU(BN(conv x)))); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.second.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.second(self.first(x)))


class CompactNet(StagedNet):
    """The default model's body: RGB [N, 3, 112, 112], (x/255 - 0.5)/0.5 -> map [N, 128, 7, 7].

    Blocks of 2x2 pixels become channels, then come three stages of plain residual blocks at 28, 14 and 7 pixels.
    Dense 3x3 convolutions rather than depthwise ones: on a CPU they do several times the work in the same time
    (figures in docs/default_model.md). The head behind it projects every cell to the grid feature. There is no output
    block: the flattened grid feature serves as the embedding.

    Args:
        output: accepted as for every backbone; there is no output block to leave out.
    """

    def __init__(self, *, output: bool = True) -> None:
        stages: list[nn.Module] = []
        for cin, cout, blocks in zip((12, *_WIDTHS), _WIDTHS, _BLOCKS, strict=False):
            stages.append(nn.Sequential(_conv(cin, cout, 2), *(_Block(cout) for _ in range(blocks))))
        super().__init__("compact", stages, _WIDTHS[-1])
