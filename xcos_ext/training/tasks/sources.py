"""What a head is trained on and from: pictures, a frozen recogniser's maps, and the head before its first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from xcos_ext.backbones import Recogniser
from xcos_ext.io.errors import XCosError
from xcos_ext.io.text import composed
from xcos_ext.model import CellProjection, ClosedFormHead, XCosAttention, XCosHead, load_recogniser, plug

from ..data import Maps, Pictures, cached_maps, people_of_folds, people_of_share, read_pictures
from ..settings import ConfigError
from .config import DataConfig, ModelConfig

__all__ = ["Sources", "build_head", "fix_statistics", "held_out_people", "load_sources"]

_STATISTICS_PEOPLE = 1000  # one picture each of at most so many people for the closed form's mean


@dataclasses.dataclass
class Sources:
    """Attributes: the frozen recogniser in evaluation mode, pictures, and its maps of them."""

    recogniser: Recogniser
    pictures: Pictures
    maps: Maps


def load_sources(
    data: DataConfig,
    model: ModelConfig,
    *,
    flipped: bool = False,
    chosen: Callable[[str], bool] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Sources:
    """Read recogniser and pictures, and compute or read the maps.

    Args:
        data: which pictures, and where maps are kept.
        model: which recogniser.
        flipped: with the mirrored pictures' maps.
        chosen: which people to read; None: all.
        progress: called with what is done, items done and items in all.
    """
    recogniser = load_recogniser(model.recogniser).requires_grad_(False)

    def tell(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    pictures = read_pictures(data.pictures, recogniser.preprocessing.size, chosen=chosen, progress=tell("reading"))
    maps = cached_maps(recogniser, pictures, Path(data.cache), flipped=flipped, progress=tell("computing maps"))
    return Sources(recogniser, pictures, maps)


def held_out_people(data: DataConfig, names: tuple[str, ...]) -> set[str]:
    """People that must not be trained on, by all the rules given.

    Raises:
        ConfigError: folds without a pairs file.
        XCosError: a list or pairs file that cannot be used.
    """
    if data.folds and data.pairs is None:
        raise ConfigError("data.pairs: expected the pairs file that data.folds belong to, got nothing")
    found = people_of_share(names, data.held_out_share)
    if data.held_out_list is not None:
        try:
            lines = composed(Path(data.held_out_list).read_text(encoding="utf-8-sig")).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise XCosError(f"{data.held_out_list}: cannot be read as a list of people ({error})") from error
        found |= {line.strip() for line in lines}
    if data.pairs is not None and data.folds:
        found |= people_of_folds(data.pairs, data.folds)
    return found & set(names)


def build_head(config: ModelConfig, sources: Sources, trained: Tensor, seed: int) -> XCosHead:
    """A new head as the settings say, in evaluation mode, its batch norms' statistics measured.

    Args:
        config: of the model.
        sources: recogniser and maps.
        trained: indices of the pictures that may be looked at.
        seed: of random weights.
    """
    recogniser, pictures, maps = sources.recogniser, sources.pictures, sources.maps
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        closed: ClosedFormHead | None = None
        channels = config.channels
        if config.start == "closed-form":
            first = np.unique(pictures.people[trained].numpy(), return_index=True)[1][:_STATISTICS_PEOPLE]
            grids = maps.grids[0][trained[torch.from_numpy(first)]]
            try:
                plugged = plug(recogniser, grids.split(64), project=channels, spread=config.spread)
            except ValueError as error:
                raise ConfigError(f"model: no closed form to start from: {error}") from error
            closed = cast(ClosedFormHead, plugged.head)
            channels = closed.channels
        elif channels is None:
            raise ConfigError("model.channels: expected a whole number with start = 'random', got none")
        attention: Any = config.attention
        if attention in ("residual", "learned"):
            attention = XCosAttention(
                channels,
                config.hidden,
                temperature=config.temperature,
                symmetric=config.symmetric,
                residual=attention == "residual",
            )
        elif attention == "uniform" and closed is not None:
            raise ConfigError("model.attention: expected 'residual', 'learned' or 'norm' with the closed form")
        projection: Any = "shared"
        if closed is not None:
            projection = CellProjection.from_tensors(dict(closed.named_buffers()), closed.grid_shape)
        head = XCosHead(recogniser.grid_shape[0], channels, attention=attention, projection=projection)
        fix_statistics(head, maps.grids[0][trained[:: max(1, len(trained) // 1024)]], seed)
    return head


@torch.no_grad()
def fix_statistics(head: XCosHead, grids: Tensor, seed: int, pairs: int = 512) -> None:
    """Gives every batch norm the statistics of real faces and pairs, and leaves the head in evaluation mode.

    A template folds batch norm into convolutions, so its mean and variance must be constants: in training mode they
    would be those of a batch, the "batch" of the attention's inner layers would be all pairs, and a face's template
    would depend on every other face. ``templates`` refuses that. Instead the statistics are measured once, before
    training (those of a new head, mean 0 and variance 1, are nobody's), and stay. ``eval()`` fixes statistics only: all
    weights, those of the batch norms included, are trained; and what is trained is the very function that is deployed.

    Args:
        head: to prepare.
        grids: the backbone's maps [N, in_channels, H, W] of faces, floating-point.
        seed: of the choice of pairs.
        pairs: how many to measure on, in batches of 64.
    """
    norms = [module for module in head.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain average over the batches below
    head.train()
    random = torch.Generator().manual_seed(seed)
    for chosen in torch.randint(len(grids), (max(1, pairs // 64), 2, 64), generator=random):
        features = head.features(grids[chosen.flatten()].float())
        if head.attention is not None:
            head.attention(*features.chunk(2))
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    head.eval()
