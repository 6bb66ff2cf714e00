"""CorrRISE (arXiv 2305.08546): which pixels go with a high score when random patches of A are hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import at_once, check_count, check_pairs, features_of, split
from .interface import PairModel, Saliency
from .masking import Fill, check_fill, fill_pictures, masked_scores

__all__ = ["CorrRISE", "average_ranks", "patch_masks"]

_MASKS_AT_ONCE = 1024  # as fp32: 51 MB of 112x112


def patch_masks(
    masks: int, patches: int, size: int, picture: tuple[int, int], generator: torch.Generator | None = None
) -> Tensor:
    """Random masks: bool [masks, H, W], False in ``patches`` squares of ``size`` pixels that lie fully inside.

    Squares may overlap; their corners are drawn uniformly, independent of each other.

    Raises:
        ValueError: patches that are larger than the picture.
    """
    if size > min(picture):
        raise ValueError(f"size: expected patches of at most {min(picture)} pixels, the picture's side, got {size}")
    shown = torch.ones(masks, *picture, dtype=torch.bool)
    inside = []
    for pixels in picture:
        first = torch.randint(pixels - size + 1, (masks, patches, 1), generator=generator)
        place = torch.arange(pixels)
        inside.append((place >= first) & (place < first + size))
    for number in range(patches):
        shown &= ~(inside[0][:, number].unsqueeze(2) & inside[1][:, number].unsqueeze(1))
    return shown


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..M along the last dimension of [N, M]; equal values share the mean of theirs. fp64."""
    ordered = values.sort(1).values
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above + 1).double() / 2


class CorrRISE:
    """Correlation, over random masks, of a pixel being shown with the rank of the score.

    As published (arXiv 2305.08546): the same masks for every pair, each hiding three patches of 30x30 pixels; the
    scores' ranks; per pixel the Pearson correlation of "is shown" with them; its positive part is what is similar, its
    negative part what is not. 500 forward passes per picture; B's features are computed once. A pixel that no mask
    hides, or a score that no mask changes, gives 0.

    Args:
        masks: random masks.
        patches: hidden squares per mask.
        size: their side in pixels.
        fill: what is shown there: ``"black"``, ``"mean"`` (A's mean colour) or ``"blur"``.
        seed: of the masks, which depend on nothing else than the picture's size.
        clip: as published. False: the maps keep their order where the correlation has the other sign, too.
        batch_size: pictures per forward pass; None: 16 on a CPU, else 256.

    Raises:
        ValueError: an option out of range.
    """

    name = "corrrise"

    def __init__(
        self,
        masks: int = 500,
        patches: int = 3,
        size: int = 30,
        *,
        fill: Fill = "black",
        seed: int = 0,
        clip: bool = True,
        batch_size: int | None = None,
    ) -> None:
        self.masks = check_count("masks", masks, 2)
        self.patches = check_count("patches", patches)
        self.size = check_count("size", size)
        self.fill = check_fill(fill)
        self.seed = seed
        self.clip = clip
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)
        self._kept: Tensor | None = None  # masks of the last size of picture

    def keep(self, picture: tuple[int, int]) -> Tensor:
        """The masks for pictures of (height, width): bool [masks, H, W], on the CPU."""
        if self._kept is None or tuple(self._kept.shape[1:]) != picture:
            generator = torch.Generator().manual_seed(self.seed)
            self._kept = patch_masks(self.masks, self.patches, self.size, picture, generator)
        return self._kept

    @torch.no_grad()
    def __call__(self, model: PairModel, a: Tensor, b: Tensor) -> Saliency:
        """Maps over A's pixels [N, H, W]: correlations.

        Raises:
            TypeError: something else than floating-point tensors.
            ValueError: images that are not [N, 3, H, W], or smaller than the patches.
        """
        check_pairs(model, a, b)
        size = at_once(self.batch_size, a.device)
        keep = self.keep((a.shape[2], a.shape[3])).to(a.device)
        fill = fill_pictures(self.fill, a, model.preprocessing)
        scores = masked_scores(model, a, features_of(model, b, size), keep, fill, size)
        return split(self._correlation(scores, keep.flatten(1)).view(-1, *a.shape[2:]), self.clip)

    @staticmethod
    def _correlation(scores: Tensor, keep: Tensor) -> Tensor:
        """Pearson's r of the ranks of [N, M] with every column of [M, P]: [N, P], fp32."""
        ranks = average_ranks(scores)
        ranks -= ranks.mean(1, keepdim=True)
        # Ranks without their mean are multiples of 1/2, so fp32 adds up those of shown pixels without rounding.
        low = ranks.float()
        product = scores.new_zeros(scores.shape[0], keep.shape[1], dtype=torch.float32)
        for part, rows in zip(low.split(_MASKS_AT_ONCE, 1), keep.split(_MASKS_AT_ONCE), strict=True):
            product.addmm_(part, rows.float())
        shown = keep.sum(0).double()
        spread = (shown * (keep.shape[0] - shown) / keep.shape[0]).sqrt() * ranks.norm(dim=1, keepdim=True)
        return torch.where(spread > 0, product / spread.clamp_min(1e-30), 0.0).float()
