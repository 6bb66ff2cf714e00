"""People as noisy mosaics, and maps of a random network, for tests of training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xcos_ext import backbones
from xcos_ext.training.data import Maps, Pictures, normalised
from xcos_ext.training.tasks.sources import Sources

PEOPLE, EACH = 24, 3


class _Output(nn.Module):
    """An affine output block: depthwise 7x7, linear, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(12, 12, 7, groups=12, bias=False)
        self.linear = nn.Linear(12, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, grid: Tensor) -> Tensor:
        return self.norm(self.linear(self.depthwise(grid).flatten(1)))


def network(**options: bool) -> backbones.Recogniser:
    """A random network whose last block is affine; made as the registry makes them."""
    body = nn.Sequential(nn.Conv2d(3, 12, 16, 16), nn.BatchNorm2d(12), nn.PReLU(12))
    return backbones.SplitRecogniser(body, _Output(), grid_shape=(12, 7, 7), embedding_size=8)


def sources() -> Sources:
    """People as noisy mosaics, and maps of a random network."""
    torch.manual_seed(5)
    recogniser = network()
    own = torch.randint(40, 216, (PEOPLE, 1, 3, 7, 7))
    noisy = (own + torch.randint(-25, 26, (PEOPLE, EACH, 3, 7, 7))).flatten(0, 1).clamp(0, 255).float()
    images = torch.nn.functional.interpolate(noisy, size=(112, 112)).to(torch.uint8)
    names = tuple(f"P{i:02d}" for i in range(PEOPLE))
    pictures = Pictures(
        images,
        torch.arange(PEOPLE).repeat_interleave(EACH),
        names,
        tuple(f"{name}/{i}" for name in names for i in range(EACH)),
        fingerprint="0" * 16,
    )
    with torch.no_grad():
        recogniser.train()
        recogniser(normalised(recogniser, images))  # statistics of batch norm that fit the pictures
        recogniser.eval().requires_grad_(False)
        grids = recogniser.grid(normalised(recogniser, images))
        embeddings = torch.nn.functional.normalize(recogniser.embed(grids))
    return Sources(recogniser, pictures, Maps(grids.half()[None], embeddings[None]))


SOURCES = sources()
