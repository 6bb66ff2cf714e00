"""MobileFaceNet (Chen et al., arXiv 1804.07573) in the two parameter layouts in which weights are
distributed.

Both have the same plan: a strided 3x3 convolution, inverted residual blocks down to 128x7x7, a 1x1
convolution to 512x7x7 and an output block of a 7x7 depthwise convolution, a linear layer to 128 and batch
norm. They differ in names, in the activation (PReLU against ReLU6) and in how the second layer is built.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from xcos_ext.card.preprocessing import ARCFACE, IMAGENET

from .recogniser import Recogniser

__all__ = ["MobileFaceNet", "MobileFaceNetReLU"]

# (hidden channels, output channels, blocks, stride of the first block)
_PLAN = ((128, 64, 5, 2), (256, 128, 7, 2), (512, 128, 1, 2), (256, 128, 2, 1))


def _named(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, under the names that the weights have."""
    return nn.Sequential(OrderedDict(layers))


def _conv_bn(
    cin: int, cout: int, kernel: int, stride: int = 1, *, groups: int = 1, linear: bool = False
) -> nn.Sequential:
    """Convolution and batch norm, with PReLU unless ``linear``; keys ``conv``, ``bn``, ``prelu``."""
    padding = 1 if kernel == 3 else 0  # 3x3 keeps the size; 1x1 and the final 7x7 need none
    conv = nn.Conv2d(cin, cout, kernel, stride, padding, groups=groups, bias=False)
    return _named(conv=conv, bn=nn.BatchNorm2d(cout), **({} if linear else {"prelu": nn.PReLU(cout)}))


class _Inverted(nn.Module):
    """Inverted residual: widen (1x1), depthwise 3x3, project (1x1, linear)."""

    def __init__(self, cin: int, hidden: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv = _conv_bn(cin, hidden, 1)
        self.conv_dw = _conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.project = _conv_bn(hidden, cout, 1, linear=True)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.conv_dw(self.conv(x)))
        return x + y if self.residual else y


def _stage(channels: int, hidden: int, blocks: int) -> nn.Sequential:
    return _named(model=nn.Sequential(*(_Inverted(channels, hidden, channels, 1) for _ in range(blocks))))


class MobileFaceNet(Recogniser):
    """MobileFaceNet with PReLU: RGB [N, 3, 112, 112], (x/255 - 0.5)/0.5 -> 512x7x7 map -> embedding.

    Parameter names are those of the InsightFace_Pytorch and xCos code (``conv1.conv.weight`` ...
    ``bn.bias``).

    Args:
        embedding_size: length of the embedding.
        output: with the output block. An xCos model needs only the map.

    >>> import torch
    >>> with torch.device("meta"):  # shapes without weights
    ...     MobileFaceNet().eval()(torch.empty(1, 3, 112, 112)).shape
    torch.Size([1, 128])
    """

    output_prefixes: ClassVar[tuple[str, ...]] = ("conv_6_dw.", "linear.", "bn.")

    def __init__(self, embedding_size: int = 128, *, output: bool = True) -> None:
        super().__init__()
        self.architecture = "mobilefacenet"
        self.grid_shape = (512, 7, 7)
        self.preprocessing = ARCFACE
        self.conv1 = _conv_bn(3, 64, 3, 2)
        self.conv2_dw = _conv_bn(64, 64, 3, groups=64)
        self.conv_23 = _Inverted(64, 128, 64, 2)
        self.conv_3 = _stage(64, 128, 4)
        self.conv_34 = _Inverted(64, 256, 128, 2)
        self.conv_4 = _stage(128, 256, 6)
        self.conv_45 = _Inverted(128, 512, 128, 2)
        self.conv_5 = _stage(128, 256, 2)
        self.conv_6_sep = _conv_bn(128, 512, 1)
        if output:
            self.embedding_size = embedding_size
            self.conv_6_dw = _conv_bn(512, 512, 7, groups=512, linear=True)
            self.linear = nn.Linear(512, embedding_size, bias=False)
            self.bn = nn.BatchNorm1d(embedding_size)

    def grid(self, images: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> [N, 512, 7, 7]."""
        x = self.conv2_dw(self.conv1(images))
        x = self.conv_3(self.conv_23(x))
        x = self.conv_4(self.conv_34(x))
        x = self.conv_5(self.conv_45(x))
        return self.conv_6_sep(x)

    def embed(self, grid: Tensor) -> Tensor:
        """[N, 512, 7, 7] -> embedding [N, embedding_size], not normalised to unit length."""
        self._require_output()
        return self.bn(self.linear(self.conv_6_dw(grid).flatten(1)))


def _separable(cin: int, cout: int) -> nn.Sequential:
    """Depthwise 3x3 and pointwise 1x1, each with batch norm and ReLU."""
    depthwise = nn.Conv2d(cin, cin, 3, padding=1, groups=cin, bias=False)
    pointwise = nn.Conv2d(cin, cout, 1, bias=False)
    first, second = nn.BatchNorm2d(cin), nn.BatchNorm2d(cout)
    return _named(depthwise=depthwise, bn1=first, relu1=nn.ReLU(), pointwise=pointwise, bn2=second, relu2=nn.ReLU())


def _conv_bn_relu6(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU6())


class _InvertedReLU6(nn.Module):
    def __init__(self, cin: int, hidden: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv_bn_relu6(cin, hidden, 1),
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        )
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.residual else y


class MobileFaceNetReLU(Recogniser):
    """MobileFaceNet with ReLU6: RGB [N, 3, 112, 112], ImageNet normalisation -> 512x7x7 map -> embedding.

    Parameter names are those of the Apache-2.0 weights in torchvision style (``conv1.0.weight``,
    ``features.N.conv...``, ``gdconv.depthwise.weight``, ``conv3.weight``).

    Args:
        embedding_size: length of the embedding.
        output: with the output block. An xCos model needs only the map.

    >>> import torch
    >>> with torch.device("meta"):  # shapes without weights
    ...     MobileFaceNetReLU().eval()(torch.empty(1, 3, 112, 112)).shape
    torch.Size([1, 128])
    """

    output_prefixes: ClassVar[tuple[str, ...]] = ("gdconv.", "conv3.", "bn.")

    def __init__(self, embedding_size: int = 128, *, output: bool = True) -> None:
        super().__init__()
        self.architecture = "mobilefacenet_relu"
        self.grid_shape = (512, 7, 7)
        self.preprocessing = IMAGENET
        self.conv1 = _conv_bn_relu6(3, 64, 3, 2)
        self.dw_conv = _separable(64, 64)
        blocks: list[nn.Module] = []
        cin = 64
        for hidden, cout, count, stride in _PLAN:
            for i in range(count):
                blocks.append(_InvertedReLU6(cin, hidden, cout, stride if i == 0 else 1))
                cin = cout
        self.features = nn.Sequential(*blocks)
        self.conv2 = _conv_bn_relu6(128, 512, 1)
        if output:
            self.embedding_size = embedding_size
            self.gdconv = _named(depthwise=nn.Conv2d(512, 512, 7, groups=512, bias=False), bn=nn.BatchNorm2d(512))
            self.conv3 = nn.Conv2d(512, embedding_size, 1)
            self.bn = nn.BatchNorm2d(embedding_size)

    def grid(self, images: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> [N, 512, 7, 7]."""
        return self.conv2(self.features(self.dw_conv(self.conv1(images))))

    def embed(self, grid: Tensor) -> Tensor:
        """[N, 512, 7, 7] -> embedding [N, embedding_size], not normalised to unit length."""
        self._require_output()
        return self.bn(self.conv3(self.gdconv(grid))).flatten(1)
