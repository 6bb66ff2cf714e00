"""Statistics of batch norm, measured once and kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xcos_ext.model import XCosHead

__all__ = ["fix_statistics"]


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
