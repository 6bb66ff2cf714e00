"""Small networks that tests of several rooms share."""

from __future__ import annotations

from torch import Tensor, nn

from xcos_ext import backbones


def randomised(module: nn.Module) -> nn.Module:
    """Batch norms and slopes away from their neutral values, evaluation mode, fp64."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
        elif isinstance(layer, nn.PReLU):
            nn.init.uniform_(layer.weight, -0.5, 0.5)
    return module.double().eval()


class TinyBackbone(backbones.Recogniser):
    """Three channels pooled to a 7x7 map: enough to test what surrounds a backbone."""

    grid_shape = (6, 7, 7)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 16, 16)

    def grid(self, images: Tensor) -> Tensor:
        return self.conv(images)
