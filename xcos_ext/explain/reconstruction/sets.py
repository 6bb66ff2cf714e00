"""A face drawn from its feature, whole or with a set of channels or cells put out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xcos_ext.explain.explainers.interface import EmbeddingCosine, PairModel, XCosPairs
from xcos_ext.io.fingerprint import fingerprint_state

from .network import FeatureDecoder

__all__ = ["fingerprint_of", "reconstruct", "without"]

_BATCH = 64  # pictures decoded at a time


def fingerprint_of(model: PairModel) -> str:
    """Short hash of all that features depend on: an xCos model's own, or of a recogniser's weights and pixels.

    Raises:
        ValueError: another kind of model, without a method ``fingerprint()``.
    """
    if isinstance(model, XCosPairs):
        return model.model.fingerprint()
    if isinstance(model, EmbeddingCosine):
        recogniser = model.recogniser
        return fingerprint_state(recogniser.state_dict(), extra=f"embedding {recogniser.preprocessing}")
    own = getattr(model, "fingerprint", None)
    if not callable(own):
        raise ValueError("model: expected an xCos model, a recogniser's cosine or one with fingerprint(), got another")
    return str(own())


def _chosen(chosen: Tensor | Sequence[int], size: int, argument: str) -> Tensor:
    """bool [size] or [N, size] of numbers or of a mask."""
    mask = torch.as_tensor(chosen)
    if mask.dtype == torch.bool:
        if mask.dim() not in (1, 2) or mask.shape[-1] != size:
            raise ValueError(f"{argument}: expected bool [{size}] or [N, {size}], got {list(mask.shape)}")
        return mask
    if mask.numel() == 0:
        return torch.zeros(size, dtype=torch.bool)
    if mask.is_floating_point() or mask.dim() != 1 or int(mask.min()) < 0 or int(mask.max()) >= size:
        raise ValueError(f"{argument}: expected numbers from 0 to {size - 1} or a bool mask, got {chosen}")
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, mask.long().cpu(), True)


def _mask(chosen: Tensor, shape: tuple[int, ...], argument: str) -> Tensor:
    mask = torch.as_tensor(chosen)
    if mask.dtype != torch.bool:
        raise TypeError(f"{argument}: expected a bool mask, got {mask.dtype}")
    if tuple(mask.shape[-len(shape) :]) != shape or mask.dim() - len(shape) not in (0, 1):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{argument}: expected [{wanted}] or [N, {wanted}], got {list(mask.shape)}")
    return mask


def without(
    decoder: FeatureDecoder,
    features: Tensor,
    *,
    channels: Tensor | Sequence[int] | None = None,
    cells: Tensor | None = None,
    entries: Tensor | None = None,
) -> Tensor:
    """Features with a set of entries replaced by the data-set mean of those entries; the others stay as they are.

    Args:
        decoder: whose mean is used.
        features: [N, *shape].
        channels: of an embedding, or of a grid in all its cells: numbers, or bool [C] or [N, C].
        cells: of a grid, with all their channels: bool [h, w] or [N, h, w].
        entries: any: bool [*shape] or [N, *shape].

    Returns:
        The features' shape and dtype; a new tensor. Of several kinds of sets the union is replaced.

    Raises:
        TypeError: features that are not floating-point, or a mask that is not bool.
        ValueError: a wrong shape or number, or cells of an embedding.
    """
    decoder.check(features)
    removed = torch.zeros(1, *decoder.shape, dtype=torch.bool, device=features.device)
    if channels is not None:
        mask = _chosen(channels, decoder.shape[0], "channels").to(features.device)
        removed = removed | mask.reshape(-1, decoder.shape[0], *(1 for _ in decoder.shape[1:]))
    if cells is not None:
        if not decoder.grid:
            raise ValueError("cells: expected a decoder of grid features, got one of embeddings, which have no cells")
        mask = _mask(cells, decoder.shape[1:], "cells").to(features.device)
        removed = removed | mask.reshape(-1, 1, *decoder.shape[1:])
    if entries is not None:
        mask = _mask(entries, decoder.shape, "entries").to(features.device)
        removed = removed | mask.reshape(-1, *decoder.shape)
    if len(removed) not in (1, len(features)):
        raise ValueError(f"sets: expected one for all faces or {len(features)}, got {len(removed)}")
    return torch.where(removed, decoder.mean.to(features), features)


@torch.no_grad()
def reconstruct(
    decoder: FeatureDecoder,
    features: Tensor,
    *,
    channels: Tensor | Sequence[int] | None = None,
    cells: Tensor | None = None,
    entries: Tensor | None = None,
) -> Tensor:
    """Pictures of what was kept of faces, optionally without a set of channels, cells or entries.

    Args:
        decoder: in evaluation mode.
        features: [N, *shape], as ``PairModel.features`` makes them.
        channels, cells, entries: as for :func:`without`.

    Returns:
        RGB in 0..1, fp32 [N, 3, H, W].

    Raises:
        TypeError, ValueError: as :func:`without`.
    """
    kept = without(decoder, features, channels=channels, cells=cells, entries=entries)
    return decoded(decoder, kept)


def decoded(decoder: FeatureDecoder, features: Tensor, batch_size: int = _BATCH) -> Tensor:
    """Pictures in 0..1 of any number of features, some at a time."""
    if not len(features):
        return torch.empty(0, 3, *decoder.picture_size, device=features.device)
    return torch.cat([decoder(part).clamp(0, 1) for part in features.split(batch_size)])
