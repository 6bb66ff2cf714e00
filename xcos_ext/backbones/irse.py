"""IR and IR-SE residual networks of the ArcFace family, depths 50, 100 and 152.

Residual units with pre-activation batch norm, PReLU and, in the SE variant, channel attention (Deng et al.,
"ArcFace", arXiv 1801.07698; Hu et al., "Squeeze-and-Excitation Networks", arXiv 1709.01507). Parameter names
follow the layout in which the public PyTorch weights are distributed: ``input_layer``, ``body``,
``output_layer``.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from xcos_ext.card.preprocessing import ARCFACE

from .recogniser import Recogniser

__all__ = ["IRSE"]

# Units per stage; every stage starts with a stride of 2 and has twice the channels of the one before.
_UNITS = {50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 152: (3, 8, 36, 3)}
_CHANNELS = (64, 128, 256, 512)
_SE_REDUCTION = 16


class _ChannelAttention(nn.Module):
    """Squeeze-and-excitation: each channel is scaled by a gate computed from the channel means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // _SE_REDUCTION, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // _SE_REDUCTION, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * gate


class _Unit(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if channels_in == channels:
            # A 1x1 max pool only subsamples: it has no parameters, so the public keys stay as they are.
            self.shortcut_layer = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        layers: list[nn.Module] = [
            nn.BatchNorm2d(channels_in),
            nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        if squeeze:
            layers.append(_ChannelAttention(channels))
        self.res_layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IRSE(Recogniser):
    """IR or IR-SE network: RGB [N, 3, 112, 112], (x/255 - 0.5)/0.5 -> 512x7x7 map -> 512-d embedding.

    Args:
        depth: 50, 100 or 152.
        squeeze: with channel attention (IR-SE) or without (IR).
        output: with the output block (BN, dropout, flatten, linear, BN). An xCos model needs only the map.
        dropout: probability in the output block; used in training mode only.

    Raises:
        ValueError: another depth.
    """

    output_prefixes: ClassVar[tuple[str, ...]] = ("output_layer.",)

    def __init__(self, depth: int = 50, *, squeeze: bool = True, output: bool = True, dropout: float = 0.6) -> None:
        super().__init__()
        if depth not in _UNITS:
            raise ValueError(f"depth: expected one of {sorted(_UNITS)}, got {depth}")
        self.architecture = f"ir_se_{depth}" if squeeze else f"ir_{depth}"
        self.grid_shape = (512, 7, 7)
        self.preprocessing = ARCFACE
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        units: list[nn.Module] = []
        channels_in = 64
        for channels, count in zip(_CHANNELS, _UNITS[depth], strict=True):
            for i in range(count):
                units.append(_Unit(channels_in, channels, 2 if i == 0 else 1, squeeze))
                channels_in = channels
        self.body = nn.Sequential(*units)
        self.output_layer: nn.Module | None = None
        if output:
            self.embedding_size = 512
            self.output_layer = nn.Sequential(
                nn.BatchNorm2d(512),
                nn.Dropout(dropout),
                nn.Flatten(),
                nn.Linear(512 * 7 * 7, 512),
                nn.BatchNorm1d(512),
            )

    def grid(self, images: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> [N, 512, 7, 7]."""
        return self.body(self.input_layer(images))

    def embed(self, grid: Tensor) -> Tensor:
        """[N, 512, 7, 7] -> embedding [N, 512], not normalised to unit length."""
        self._require_output()
        assert self.output_layer is not None
        return self.output_layer(grid)
