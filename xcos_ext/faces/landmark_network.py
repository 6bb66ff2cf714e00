"""The network that reads five landmarks and tells whether there is a face (needs torch; imported when it is used)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LandmarkNetwork"]


class LandmarkNetwork(nn.Module):
    """Five landmarks by integral regression: the mean position under a heat map (Sun et al., "Integral Human Pose
    Regression", ECCV 2018, eq. 3), so that a fraction of a heat map's cell counts and gradients reach every cell.

    Three strided convolutions go down to an eighth of the crop, two lateral ones bring the detail of a quarter back.

    Args:
        size: side of the square crops, pixels; a multiple of 16.
        width: channels of the first convolution; the deeper ones have two to four times as many.
    """

    def __init__(self, size: int = 64, width: int = 16) -> None:
        super().__init__()
        if size < 32 or size % 16:
            raise ValueError(f"size: expected a multiple of 16 from 32 on, got {size}")
        if width < 1:
            raise ValueError(f"width: expected a positive number, got {width}")
        self.size, self.width = size, width
        a, b, c, d = width, 2 * width, 3 * width, 4 * width
        self.quarter = nn.Sequential(_conv(1, a, 2), _conv(a, b, 2), _conv(b, b))
        self.eighth = nn.Sequential(_conv(b, c, 2), _conv(c, c))
        self.sixteenth = nn.Sequential(_conv(c, d, 2), _conv(d, d))
        self.from_sixteenth = nn.Conv2d(d, b, 1)
        self.from_eighth = nn.Conv2d(c, b, 1)
        self.heat = nn.Sequential(_conv(b, b), nn.Conv2d(b, 5, 1))
        self.face = nn.Linear(d, 1)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Landmarks of crops.

        Args:
            crops: grey, [N, 1, size, size], any scale of values: each crop is brought to mean 0 and deviation 1.

        Returns:
            points fp32 [N, 5, 2], (x, y) in pixels of the crop; logit fp32 [N] of its being a face; heat fp32
            [N, 5, size / 4, size / 4], non-negative with sum 1 over each map.
        """
        x = crops.float()
        deviation, mean = torch.std_mean(x, (1, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / (deviation + 1e-3)
        quarter = self.quarter(x)
        eighth = self.eighth(quarter)
        sixteenth = self.sixteenth(eighth)
        merged = self.from_eighth(eighth) + _twice(self.from_sixteenth(sixteenth))
        heat = self.heat(quarter + _twice(merged))
        heat = heat.flatten(2).softmax(2).view_as(heat)
        # Cell i of the heat map is 4 pixels wide and begins at pixel edge 4 i; pixel centres are at whole coordinates.
        at = torch.arange(heat.shape[-1], dtype=heat.dtype, device=heat.device) * 4 + 1.5
        points = torch.stack([heat.sum(2) @ at, heat.sum(3) @ at], 2)
        return points, self.face(sixteenth.mean((2, 3)))[:, 0], heat


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")
