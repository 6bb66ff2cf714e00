"""What makes two faces similar and dissimilar, as changes of a face's reconstruction: see docs/maps.md.

The abstract of arXiv 2306.00402 says that a decoder shows what a set of channels means and that there is one map of
similar and one of dissimilar regions; how, its abstract does not say, so everything here is ours.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from xcos_ext.card.calibration import check_threshold
from xcos_ext.explain.explainers.base import BatchedExplainer, check_count, threshold_of
from xcos_ext.explain.explainers.interface import PairModel, Saliency, XCosPairs
from xcos_ext.explain.fills import blurred

from .decoder import FeatureDecoder, decoded, fingerprint_of, load_decoder, shipped_decoders

__all__ = ["Evidence", "ReconstructionExplainer", "evidence"]


class Evidence(NamedTuple):
    """What each entry of a feature adds to the decision.

    Attributes:
        excess: [N, K], fp32: the entry's part of the score minus its part of the threshold; sums to score - threshold.
        similar: bool [N, K], excess > 0.
        dissimilar: bool [N, K], excess < 0.
    """

    excess: Tensor
    similar: Tensor
    dissimilar: Tensor


@torch.no_grad()
def evidence(model: PairModel, features_a: Tensor, features_b: Tensor, threshold: float | None = None) -> Evidence:
    """The similar and the dissimilar set of pairs, from features that ``model.features`` made.

    An entry's part of the score is u_k v_k (``PairModel.channels``). Its part of the threshold t (None: the model's) is
    t / N; with xCos it is t W_ij / C in cell ij of C channels, which sums to t as well: with t / N every entry of a
    cell that the attention passes over would count as dissimilar.

    >>> from xcos_ext import backbones
    >>> from xcos_ext.explain.explainers import EmbeddingCosine
    >>> model = EmbeddingCosine(backbones.create("mobilefacenet", embedding_size=2).eval(), threshold=0.5)
    >>> unit = torch.tensor([[0.6, 0.8]])
    >>> evidence(model, unit, unit).excess
    tensor([[0.1100, 0.3900]])

    Raises:
        ValueError: no threshold.
    """
    threshold = threshold_of(model, threshold, "the part that an entry plays")
    u, v = model.channels(features_a, features_b)
    parts = u.float() * v.float()
    if isinstance(model, XCosPairs):
        weights = model.model.score(features_a, features_b, return_maps=True).attention
        shares = (weights / features_a.shape[1]).unsqueeze(1).expand(features_a.shape).flatten(1).float()
    else:
        shares = torch.full_like(parts, 1 / parts.shape[1])
    excess = parts - threshold * shares
    return Evidence(excess, excess > 0, excess < 0)


#: Drawings to make: pairs int64 [M], entries removed bool [M, *shape], weights [M], and for which map, int64 [M]: 0 is
#: the similar one, 1 the dissimilar one.
_Pieces = Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]


class ReconstructionExplainer(BatchedExplainer):
    """Maps of the change of A's reconstruction when what speaks for, or against, the same person is put out.

    Entries of A's feature are put out unit by unit: replaced by the data-set mean, and the picture drawn again. The map
    is ``sum over units of e * mean over RGB |D(a) - D(a without the unit)|`` over the units of a set, e the mean of
    \\|excess\\| (:func:`evidence`) over the unit's entries for channels, the cell's own \\|sum\\| for cells.

    Units are cells (with all their channels; the cells with W (S - t) > 0 are the similar set: 49 drawings), or
    channels: each set is cut into ``groups`` of like \\|excess\\|, so one drawing stands for many entries that have
    nearly the same weight (2 x 8 drawings instead of 1,568). ``groups=None`` draws every entry alone.

    >>> import xcos_ext
    >>> from xcos_ext.explain.explainers import XCosPairs
    >>> ReconstructionExplainer().decoder_for(XCosPairs(xcos_ext.load_model())).shape
    (32, 7, 7)

    Args:
        decoder: of the model's features, or its file; None: the shipped one that fits the model.
        units: ``"cells"``, ``"channels"``, or None: cells for grids, channels for embeddings.
        groups: of each set, for channels; None: as many as there are entries.
        threshold: of the decision; None: the model's.
        blur: standard deviation in pixels of the smoothing of the maps; 0: none.
        batch_size: drawings at a time; None: what is fast on the device.

    Raises:
        ValueError: an option that cannot be used.
        ModelError: a file that cannot be used.
    """

    name = "reconstruction"

    def __init__(
        self,
        decoder: FeatureDecoder | str | os.PathLike[str] | None = None,
        *,
        units: Literal["cells", "channels"] | None = None,
        groups: int | None = 8,
        threshold: float | None = None,
        blur: float = 3.0,
        batch_size: int | None = None,
    ) -> None:
        if units not in (None, "cells", "channels"):
            raise ValueError(f"units: expected 'cells', 'channels' or None, got {units!r}")
        if not (math.isfinite(blur) and blur >= 0):
            raise ValueError(f"blur: expected a finite number >= 0, got {blur}")
        if decoder is not None and not isinstance(decoder, nn.Module):
            decoder = load_decoder(decoder)
        super().__init__(batch_size)
        self.units, self.blur, self.threshold = units, blur, check_threshold(threshold)
        self.groups = None if groups is None else check_count("groups", groups)
        if decoder is not None:
            self._units(decoder)
        self._given = decoder
        self._fitting: tuple[weakref.ref[object], FeatureDecoder] | None = None

    def decoder_for(self, model: PairModel) -> FeatureDecoder:
        """The decoder of this model's features.

        Raises:
            ValueError: the decoder is of another model, or none of the shipped ones is of this model.
        """
        network: object = getattr(model, "module", model)
        if self._fitting is not None and self._fitting[0]() is network:
            return self._fitting[1]
        fingerprint = fingerprint_of(model)
        decoder = self._given
        if decoder is None:
            file = shipped_decoders().get(fingerprint)
            if file is None:
                raise ValueError(
                    f"model: expected one that a shipped decoder belongs to, got {model.name} ({fingerprint}); train "
                    "one for it with recipes/train_decoder.py"
                )
            decoder = load_decoder(file)
        elif decoder.fingerprint != fingerprint:
            raise ValueError(
                f"model: expected the one whose features the decoder {decoder.name!r} was trained on "
                f"({decoder.fingerprint}), got {model.name} ({fingerprint})"
            )
        self._fitting = weakref.ref(network), decoder
        return decoder

    def _units(self, decoder: FeatureDecoder) -> str:
        units = self.units or ("cells" if decoder.grid else "channels")
        if units == "cells" and not decoder.grid:
            raise ValueError("units: expected 'channels' for a decoder of embeddings, which have no cells, got 'cells'")
        return units

    @torch.no_grad()
    def sets(self, model: PairModel, features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of the similar and of the dissimilar set, for ``reconstruct(..., entries=...)``.

        Returns:
            Two masks, bool [N, *shape]. With cells as units a cell is in a set as a whole.
        """
        decoder = self.decoder_for(model)
        found = evidence(model, features_a, features_b, self.threshold)
        excess = found.excess.unflatten(1, decoder.shape)
        if self._units(decoder) == "cells":
            excess = excess.sum(1, keepdim=True).expand_as(excess)
        return excess > 0, excess < 0

    @torch.no_grad()
    def _maps(self, model: PairModel, a: Tensor, b: Tensor, size: int) -> Saliency:
        decoder = self.decoder_for(model).to(a.device)
        features_a, features_b = model.features(a), model.features(b)
        decoder.check(features_a)
        units = self._units(decoder)
        found = evidence(model, features_a, features_b, self.threshold)
        whole = decoded(decoder, features_a, size)
        maps = whole.new_zeros(2, *whole.shape[:1], *whole.shape[2:])
        pieces = (self._cells if units == "cells" else self._channels)(found, decoder, size)
        mean = decoder.mean.to(features_a)
        for pairs, removed, weights, sides in pieces:  # some drawings at a time: memory is bounded
            drawn = decoded(decoder, torch.where(removed, mean, features_a[pairs]), size)
            change = (whole[pairs] - drawn).abs().mean(1) * weights[:, None, None]
            maps.view(-1, *maps.shape[2:]).index_add_(0, sides * len(whole) + pairs, change)
        if self.blur > 0:
            maps = blurred(maps, self.blur)
        return Saliency(maps[0], maps[1])

    # --- units, a few drawings at a time

    def _cells(self, found: Evidence, decoder: FeatureDecoder, size: int) -> _Pieces:
        channels, height, width = decoder.shape
        excess = found.excess.unflatten(1, decoder.shape).sum(1).flatten(1)  # W (S - t)
        pairs, cells = torch.nonzero(excess != 0, as_tuple=True)
        one = torch.eye(height * width, dtype=torch.bool, device=excess.device).view(-1, 1, height, width)
        for p, c in zip(pairs.split(size), cells.split(size), strict=True):
            values = excess[p, c]
            yield p, one[c].expand(-1, channels, -1, -1), values.abs(), (values < 0).long()

    def _channels(self, found: Evidence, decoder: FeatureDecoder, size: int) -> _Pieces:
        entries = found.excess.shape[1]
        count = entries if self.groups is None else min(self.groups, entries)
        for side, members in enumerate((found.similar, found.dissimilar)):
            sizes = members.sum(1, keepdim=True)
            weight = found.excess.abs() * members
            ranks = weight.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # members first, heaviest first
            # Group of each member: ranks cut into `count` parts of equal size, or single ones where there are fewer.
            parts = sizes.clamp_max(count)
            group = torch.where(members, ranks * parts // sizes.clamp_min(1), -1)
            pairs, numbers = torch.nonzero(torch.arange(count, device=parts.device) < parts, as_tuple=True)
            for p, g in zip(pairs.split(size), numbers.split(size), strict=True):
                removed = group[p] == g[:, None]
                weights = (weight[p] * removed).sum(1) / removed.sum(1)
                yield p, removed.unflatten(1, decoder.shape), weights, torch.full_like(p, side)
