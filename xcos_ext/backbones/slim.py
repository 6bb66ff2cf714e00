"""The default model's body: narrow, and in the form of a MobileFaceNet so that it can start from one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from xcos_ext.card.preprocessing import ARCFACE

from .recogniser import Recogniser

__all__ = ["SlimFaceNet", "squares_as_channels"]

# Hidden channels of the blocks at 28, 14 and 7 pixels; the first of the latter two halve the sides.
_HIDDEN = ((96,) * 4, (256, *(192,) * 6), (512, 256, 256, 512, 512))


@fx.wrap  # one step of a graph, as it looks at the number of pictures
def squares_as_channels(images: Tensor) -> Tensor:
    """2x2 pixels to channels, of no pictures too, which torch's operator gives back as they came."""
    if not torch.jit.is_tracing() and images.shape[0] == 0:
        n, channels, height, width = images.shape
        return images.reshape(n, 4 * channels, height // 2, width // 2)
    return F.pixel_unshuffle(images, 2)


class _Inverted(nn.Module):
    """Inverted residual: widen (1x1), depthwise 3x3, project (1x1, linear)."""

    def __init__(self, cin: int, hidden: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.widen = nn.Conv2d(cin, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden)
        self.project = nn.Conv2d(hidden, cout, 1)
        self.residual = stride == 1 and cin == cout

    def hidden(self, x: Tensor) -> Tensor:
        """What is projected, [N, hidden, h, w]."""
        return F.relu6(self.depthwise(F.relu6(self.widen(x))))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.hidden(x))
        return x + y if self.residual else y


class SlimFaceNet(Recogniser):
    """RGB [N, 3, 112, 112], (x/255 - 0.5)/0.5 -> map [N, 512, 7, 7]: a MobileFaceNet with fewer hidden channels.

    The plan is MobileFaceNet's from 28x28 pixels on (Chen et al., arXiv 1804.07573), three quarters as wide inside its
    blocks, with two more blocks at 7x7, ReLU6 and no batch norm. Up to there its layers at 56x56 are replaced by two
    dense 3x3 convolutions over blocks of 2x2 pixels, which a CPU does in a fraction of the time. ``recipes/surgery.py``
    makes it from a trained MobileFaceNet. There is no output block: the flattened grid feature serves as the embedding.

    Args:
        output: accepted as for every backbone; there is no output block to leave out.

    >>> import torch
    >>> SlimFaceNet().eval().grid(torch.zeros(1, 3, 112, 112)).shape
    torch.Size([1, 512, 7, 7])
    """

    def __init__(self, *, output: bool = True) -> None:
        super().__init__()
        self.architecture = "slim"
        self.grid_shape = (512, 7, 7)
        self.preprocessing = ARCFACE
        self.stem = nn.Sequential(
            nn.Conv2d(12, 48, 3, 2, 1), nn.ReLU6(), nn.Conv2d(48, 64, 3, padding=1), nn.ReLU6(), nn.Conv2d(64, 64, 1)
        )
        blocks: list[nn.Module] = []
        cin = 64
        for cout, first, hidden in zip((64, 128, 128), (1, 2, 2), _HIDDEN, strict=True):
            for i, width in enumerate(hidden):
                blocks.append(_Inverted(cin, width, cout, first if i == 0 else 1))
                cin = cout
        self.blocks = nn.Sequential(*blocks)
        self.widen = nn.Conv2d(128, 512, 1)

    def grid(self, images: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> [N, 512, 7, 7]."""
        return F.relu6(self.widen(self.blocks(self.stem(squares_as_channels(images)))))
