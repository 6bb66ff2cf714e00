"""A narrow body made from a trained MobileFaceNet, and a head for it in closed form: where training starts.

    python -m recipes.surgery recipes/default_model.toml --network mobilefacenet_apache2.pt --out start.safetensors

Inside each block one channel after the other goes that least squares over real faces misses least, and what projects
the rest is solved for anew, against the network's own output and on what the narrower network really gives it. The
layers at 56x56 pixels are replaced by a dense stem, trained for some hundred steps to give the network's map at 28x28.
The head is the ridge regression from the map to what the teachers say, cell by cell. Of a slim model the body stays and
the head alone is made anew: for targets that have changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from recipes.common import say
from xcos_ext.backbones import MobileFaceNetReLU, Recogniser, SlimFaceNet
from xcos_ext.backbones.slim import squares_as_channels
from xcos_ext.io.errors import XCosError
from xcos_ext.model import CellProjection, XCosHead, XCosModel, load_model, save_model
from xcos_ext.training.data import normalised
from xcos_ext.training.tasks import load_experiment

__all__ = ["kept_channels", "narrowed", "ridge_head"]

_FACES = 768  # that channels and projections are solved on
_PLACES = 64  # of a map that are looked at, for each face
_STEM = (1200, 32, 4e-3)  # steps, faces and rate of its training
_RIDGE = 1e-4


def kept_channels(inner: Tensor, outer: Tensor, count: int) -> Tensor:
    """The inputs of a linear map without which least squares would miss most, ascending.

    Args:
        inner: H^T H [C, C], of inputs H.
        outer: H^T Y [C, D], of wanted outputs.
        count: how many are kept.

    >>> h = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> kept_channels(h.T @ h, h.T @ h[:, [0, 2]], 2).tolist()
    [0, 2]
    """
    kept = torch.arange(len(inner))
    inverse = torch.linalg.inv(inner.double() + _RIDGE * inner.diagonal().mean() * torch.eye(len(inner)).double())
    weight = inverse @ outer.double()
    while len(kept) > count:
        worst = int((weight.square().sum(1) / inverse.diagonal()).argmin())
        rest = torch.arange(len(kept)) != worst
        column, pivot = inverse[rest, worst], inverse[worst, worst]
        weight = weight[rest] - column[:, None] * weight[worst] / pivot
        inverse = inverse[rest][:, rest] - column[:, None] * column / pivot
        kept = kept[rest]
    return kept


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its batch norm."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


def _set(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    conv.weight.copy_(weight)
    cast(Tensor, conv.bias).copy_(bias)


def _samples(maps: Tensor, places: Tensor) -> Tensor:
    """[N, C, h, w] -> [N * places, C] with a column of ones."""
    picked = maps.flatten(2)[:, :, places].transpose(1, 2).flatten(0, 1)
    return torch.cat((picked, torch.ones(len(picked), 1)), 1)


@torch.no_grad()
def narrowed(network: MobileFaceNetReLU, images: Tensor, seed: int = 0) -> SlimFaceNet:
    """The narrow body of a trained network.

    Args:
        network: in evaluation mode.
        images: uint8 RGB [N, 3, 112, 112], faces; the more, the better.
        seed: of the choice of faces and places, and of the stem's first weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        body = SlimFaceNet().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _train_stem(body, network, images, generator)
    faces = images[torch.randperm(len(images), generator=generator)[:_FACES]]
    wide = network.features[0](network.dw_conv(network.conv1(normalised(network, faces))))
    narrow = _stem(body, faces)
    own, whole = list(body.blocks), list(network.features)[1:]
    for number, block in enumerate(own):
        if number >= len(whole):  # a block more than the network has: does nothing yet
            nn.init.zeros_(block.project.weight)
            nn.init.zeros_(block.project.bias)
            continue
        other: Any = whole[number].conv
        hidden = other[1](other[0](wide))
        wanted = whole[number](wide)
        sides = hidden.shape[2] * hidden.shape[3]
        places = torch.randperm(sides, generator=generator)[:_PLACES]
        h, y = _samples(hidden, places)[:, :-1], _samples(other[3](other[2](hidden)), places)[:, :-1]
        h, y = h - h.mean(0), y - y.mean(0)
        kept = kept_channels(h.T @ h, h.T @ y, block.widen.out_channels)
        weight, bias = _folded(other[0][0], other[0][1])
        _set(block.widen, weight[kept], bias[kept])
        weight, bias = _folded(other[1][0], other[1][1])
        _set(block.depthwise, weight[kept], bias[kept])
        target = wanted - narrow if block.residual else wanted
        h, y = _samples(block.hidden(narrow), places).double(), _samples(target, places)[:, :-1].double()
        inner = h.T @ h
        ridge = _RIDGE * inner.diagonal().mean() * torch.eye(len(inner)).double()
        solved = torch.linalg.solve(inner + ridge, h.T @ y).float()
        _set(block.project, solved[:-1].T[:, :, None, None], solved[-1])
        narrow, wide = block(narrow), wanted
        error = float((narrow - wide).square().mean() / (wide - wide.mean((0, 2, 3), keepdim=True)).square().mean())
        say(f"block {number + 1}: {len(kept)} channels, {100 * error:.1f} % of the variance lost so far")
    _set(body.widen, *_folded(cast(nn.Conv2d, network.conv2[0]), cast(nn.BatchNorm2d, network.conv2[1])))
    return body


def _stem(body: SlimFaceNet, faces: Tensor) -> Tensor:
    return torch.cat([body.stem(squares_as_channels(normalised(body, part))) for part in faces.split(64)])


def _train_stem(body: SlimFaceNet, network: MobileFaceNetReLU, images: Tensor, generator: torch.Generator) -> None:
    steps, count, rate = _STEM
    optimiser = torch.optim.AdamW(body.stem.parameters(), rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    total = 0.0
    for step in range(steps):
        faces = images[torch.randint(len(images), (count,), generator=generator)]
        wanted = network.features[0](network.dw_conv(network.conv1(normalised(network, faces))))
        with torch.enable_grad():
            made = body.stem(squares_as_channels(normalised(body, faces).contiguous(memory_format=torch.channels_last)))
            loss = (made - wanted).square().mean() / wanted.var()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        schedule.step()
        total += float(loss)
        if step % 200 == 199:
            say(f"stem: step {step + 1}, {100 * total / 200:.1f} % of the variance lost")
            total = 0.0


@torch.no_grad()
def ridge_head(body: Recogniser, images: Tensor, features: Tensor, ridge: float = 3e-3) -> XCosHead:
    """A head with norm attention, whose cells are the ridge regression from the body's map to given grid features.

    Args:
        body: in evaluation mode.
        images: uint8 RGB [N, 3, H, W].
        features: wanted [N, K, h, w].
        ridge: times the mean of the diagonal.
    """
    channels, count = body.grid_shape[0], features.shape[1]
    cells = features.shape[2] * features.shape[3]
    inner = torch.zeros(cells, channels + 1, channels + 1)
    outer = torch.zeros(cells, channels + 1, count)
    for start in range(0, len(images), 128):
        grid = body.grid(normalised(body, images[start : start + 128])).flatten(2).permute(2, 0, 1)
        x = torch.cat((grid, torch.ones(*grid.shape[:2], 1)), 2)
        y = features[start : start + 128].flatten(2).permute(2, 0, 1)
        inner.baddbmm_(x.transpose(1, 2), x)
        outer.baddbmm_(x.transpose(1, 2), y)
    projection = CellProjection(body.grid_shape, count, separable=False, spread=False)
    for cell in range(cells):  # one by one: MKL's batched solver fails at this size
        scaled = ridge * inner[cell].diagonal()[:-1].mean()
        regular = inner[cell].double() + torch.diag(torch.cat((scaled.expand(channels), torch.zeros(1)))).double()
        solved = torch.linalg.solve(regular, outer[cell].double()).float()
        projection.weight[cell] = solved[:-1].T
        cast(Tensor, projection.mean).view(count, cells)[:, cell] = -solved[-1]
    return XCosHead(channels, count, attention="norm", projection=projection).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="experiment with task = 'recipes.student'")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--network", required=True, help="a MobileFaceNet with ReLU6, or a slim model")
    parser.add_argument("--out", type=Path, required=True, help="model file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        from recipes.student import Experiment, load_sources

        experiment = load_experiment(options.config, options.assignments)
        body = load_model(options.network).backbone.requires_grad_(False)
        if not isinstance(experiment, Experiment) or not isinstance(body, (MobileFaceNetReLU, SlimFaceNet)):
            raise XCosError("expected task = 'recipes.student' and a MobileFaceNet with ReLU6 or a slim model")
        sources = load_sources(experiment)
        trained = sources.trained
        if isinstance(body, MobileFaceNetReLU):
            body = narrowed(body, sources.pictures.images[trained])
        generator = torch.Generator().manual_seed(0)
        faces = trained[torch.randperm(len(trained), generator=generator)[:9000]]
        features = sources.features[0, faces].float()
        head = ridge_head(body, sources.pictures.images[faces], features)
        save_model(XCosModel(body, head, name=experiment.name), options.out)
    except (XCosError, OSError, ValueError) as error:
        say(f"surgery: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
