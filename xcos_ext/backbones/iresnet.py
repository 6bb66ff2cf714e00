"""Improved residual networks in the parameter layout of insightface's PyTorch weights: depths 18, 34, 50, 100 and 200.

The unit is that of the ArcFace paper (Deng et al., arXiv 1801.07698): batch norm, 3x3 convolution, batch norm, PReLU,
strided 3x3 convolution, batch norm, beside a shortcut. :class:`~xcos_ext.backbones.IRSE` computes much the same under
other names; the two differ in where a stage of 64 channels has a projecting shortcut.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from xcos_ext.card.preprocessing import ARCFACE

from .recogniser import Recogniser

__all__ = ["IResNet"]

# Units per stage; every stage halves the map.
_UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}
_CHANNELS = (64, 128, 256, 512)


class _Unit(nn.Module):
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


class IResNet(Recogniser):
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
    """

    output_prefixes: ClassVar[tuple[str, ...]] = ("bn2.", "fc.", "features.")

    def __init__(
        self, depth: int = 50, *, embedding_size: int = 512, output: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth not in _UNITS:
            raise ValueError(f"depth: expected one of {sorted(_UNITS)}, got {depth}")
        self.architecture = f"iresnet{depth}"
        self.grid_shape = (512, 7, 7)
        self.preprocessing = ARCFACE
        self.conv1 = nn.Conv2d(3, _CHANNELS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_CHANNELS[0])
        self.prelu = nn.PReLU(_CHANNELS[0])
        cin = _CHANNELS[0]
        for stage, (channels, count) in enumerate(zip(_CHANNELS, _UNITS[depth], strict=True), 1):
            units = [_Unit(cin if i == 0 else channels, channels, 2 if i == 0 else 1) for i in range(count)]
            self.add_module(f"layer{stage}", nn.Sequential(*units))
            cin = channels
        if output:
            self.embedding_size = embedding_size
            self.bn2 = nn.BatchNorm2d(cin)
            self.dropout = nn.Dropout(dropout)
            self.fc = nn.Linear(cin * 7 * 7, embedding_size)
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
