"""Residual networks of the ArcFace family, in the two parameter layouts in which weights are distributed.

Their unit is that of the ArcFace paper (Deng et al., arXiv 1801.07698): batch norm, 3x3 convolution, PReLU, strided 3x3
convolution, batch norm, beside a shortcut. :class:`IRSE` has the names of InsightFace_Pytorch (``input_layer``,
``body``, ``output_layer``) and, in the SE variant, channel attention (Hu et al., arXiv 1709.01507). :class:`IResNet`
has insightface's own names and one batch norm more; the two differ also in where a stage of 64 channels has a
projecting shortcut.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from xcos_ext.card.preprocessing import ARCFACE

from .recogniser import Recogniser

__all__ = ["IRSE", "IResNet"]

# Every stage starts with a stride of 2.
_CHANNELS = (64, 128, 256, 512)
_SE_REDUCTION = 16


class _ResidualNet(Recogniser):
    """What both have in common: depths, the plan of their units, the map's shape."""

    #: Depth -> units in each stage.
    units: ClassVar[dict[int, tuple[int, ...]]]

    def __init__(self, architecture: str, depth: int) -> None:
        super().__init__()
        if depth not in self.units:
            raise ValueError(f"depth: expected one of {sorted(self.units)}, got {depth}")
        self.architecture = f"{architecture}{depth}"
        self.grid_shape = (512, 7, 7)
        self.preprocessing = ARCFACE

    def _plan(self, depth: int) -> list[list[tuple[int, int, int]]]:
        """Channels in, channels out and stride of each unit, stage by stage."""
        stages, cin = [], _CHANNELS[0]
        for channels, count in zip(_CHANNELS, self.units[depth], strict=True):
            stages.append([(cin, channels, 2), *[(channels, channels, 1)] * (count - 1)])
            cin = channels
        return stages


class _ChannelAttention(nn.Module):
    """Squeeze-and-excitation: each channel is scaled by a gate computed from the channel means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // _SE_REDUCTION, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // _SE_REDUCTION, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * gate


class _IRSEUnit(nn.Module):
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


class IRSE(_ResidualNet):
    """IR or IR-SE network: RGB [N, 3, 112, 112], (x/255 - 0.5)/0.5 -> 512x7x7 map -> 512-d embedding.

    Args:
        depth: 50, 100 or 152.
        squeeze: with channel attention (IR-SE) or without (IR).
        output: with the output block (BN, dropout, flatten, linear, BN). An xCos model needs only the map.
        dropout: probability in the output block; used in training mode only.

    Raises:
        ValueError: another depth.

    >>> import torch
    >>> with torch.device("meta"):  # shapes without weights
    ...     IRSE().eval()(torch.empty(1, 3, 112, 112)).shape
    torch.Size([1, 512])
    """

    output_prefixes: ClassVar[tuple[str, ...]] = ("output_layer.",)
    units: ClassVar[dict[int, tuple[int, ...]]] = {50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 152: (3, 8, 36, 3)}

    def __init__(self, depth: int = 50, *, squeeze: bool = True, output: bool = True, dropout: float = 0.6) -> None:
        super().__init__("ir_se_" if squeeze else "ir_", depth)
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.body = nn.Sequential(*(_IRSEUnit(*unit, squeeze) for stage in self._plan(depth) for unit in stage))
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


class _IResNetUnit(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.prelu = nn.PReLU(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.downsample: nn.Module | None = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        y = self.bn3(self.conv2(y))
        return y + (x if self.downsample is None else self.downsample(x))


class IResNet(_ResidualNet):
    """insightface's iresnet: RGB [N, 3, 112, 112], (x/255 - 0.5)/0.5 -> 512x7x7 map -> embedding.

    The map is what the last residual unit gives, before the network's ``bn2``: as for IR-SE networks, batch norm
    belongs to the output block (``bn2``, dropout, flatten, ``fc``, ``features``), which is affine in evaluation mode.
    Batch norms have eps 1e-5. Parameter names are the public ones.

    Args:
        depth: 18, 34, 50, 100 or 200.
        embedding_size: length of the embedding.
        output: with the output block. An xCos model needs only the map.
        dropout: probability in the output block; used in training mode only.

    Raises:
        ValueError: another depth.

    >>> import torch
    >>> with torch.device("meta"):  # shapes without weights
    ...     IResNet().eval()(torch.empty(1, 3, 112, 112)).shape
    torch.Size([1, 512])
    """

    output_prefixes: ClassVar[tuple[str, ...]] = ("bn2.", "fc.", "features.")
    units: ClassVar[dict[int, tuple[int, ...]]] = {
        18: (2, 2, 2, 2),
        34: (3, 4, 6, 3),
        50: (3, 4, 14, 3),
        100: (3, 13, 30, 3),
        200: (6, 26, 60, 6),
    }

    def __init__(
        self, depth: int = 50, *, embedding_size: int = 512, output: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__("iresnet", depth)
        self.conv1 = nn.Conv2d(3, _CHANNELS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_CHANNELS[0])
        self.prelu = nn.PReLU(_CHANNELS[0])
        for number, stage in enumerate(self._plan(depth), 1):
            self.add_module(f"layer{number}", nn.Sequential(*(_IResNetUnit(*unit) for unit in stage)))
        if output:
            self.embedding_size = embedding_size
            self.bn2 = nn.BatchNorm2d(_CHANNELS[-1])
            self.dropout = nn.Dropout(dropout)
            self.fc = nn.Linear(_CHANNELS[-1] * 7 * 7, embedding_size)
            self.features = nn.BatchNorm1d(embedding_size)

    def grid(self, images: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> [N, 512, 7, 7]."""
        x = self.prelu(self.bn1(self.conv1(images)))
        for stage in range(1, len(_CHANNELS) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x

    def embed(self, grid: Tensor) -> Tensor:
        """[N, 512, 7, 7] -> embedding [N, embedding_size], not normalised to unit length."""
        self._require_output()
        return self.features(self.fc(self.dropout(self.bn2(grid).flatten(1))))
