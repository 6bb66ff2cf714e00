"""Faces with swapped regions, and faces of nobody: what is pasted, and whose each cell is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from recipes.mixing import mixed, warped
from recipes.swaps import SwapConfig, drawn_masks, swapped

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- masks and pastes


def test_masks_are_one_or_two_rectangles_of_cells() -> None:
    masks = drawn_masks(5000, (7, 7), generator())
    assert masks.dtype == torch.bool and masks.shape == (5000, 7, 7)
    sizes = masks.flatten(1).sum(1)
    assert sizes.min() >= 1 and sizes.max() <= 24
    share = masks.float().mean(0)
    assert 0.8 * share.max() < share.min()  # every cell has its turn, the border's too
    assert torch.equal(masks, drawn_masks(5000, (7, 7), generator()))


def test_masks_fit_small_grids() -> None:
    assert drawn_masks(20, (1, 2), generator()).any((1, 2)).all()


def plain(**options: float) -> SwapConfig:
    """Hard borders, own light, always another person's region, unless said otherwise."""
    given: dict[str, float] = {"share": 1.0, "own": 0.0, "soft": 0.0, "matched": 0.0}
    return dataclasses.replace(SwapConfig(), **(given | options))


def test_a_cell_shows_its_owner_and_nothing_else_changes() -> None:
    images = 255 * torch.rand(6, 3, 28, 28, generator=generator(2))
    made = swapped(images, torch.arange(6), (7, 7), plain(), generator())
    assert not made.whole.any()
    for face in range(6):
        assert len(made.owner[face].unique()) == 2  # one donor each
        for row, column in np.ndindex(7, 7):
            cell = np.s_[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            assert torch.equal(made.images[face][cell], images[int(made.owner[face, row, column])][cell])


def test_without_a_share_faces_stay_whole() -> None:
    images = torch.rand(5, 3, 28, 28, generator=generator(2))
    made = swapped(images, torch.arange(5), (7, 7), plain(share=0.0), generator())
    assert made.whole.all() and torch.equal(made.images, images)
    assert torch.equal(made.owner, torch.arange(5)[:, None, None].expand(5, 7, 7))


def test_own_regions_come_from_the_twin() -> None:
    images = torch.rand(4, 3, 28, 28, generator=generator(2))
    twins = torch.tensor([1, 0, 2, 3])  # the last two have none
    made = swapped(images, twins, (7, 7), plain(own=1.0), generator())
    owners = [set(owner.unique().tolist()) for owner in made.owner]
    assert owners[:2] == [{0, 1}, {0, 1}]
    assert all(len(owner) == 2 for owner in owners[2:])


def test_matched_regions_take_the_light_of_the_face_and_soft_borders_mix() -> None:
    dark, bright = torch.full((1, 3, 28, 28), 40.0), torch.full((1, 3, 28, 28), 200.0)
    noise = torch.randn(2, 3, 28, 28, generator=generator(3))
    images = torch.cat((dark, bright)) + noise
    matched = swapped(images, torch.arange(2), (7, 7), plain(matched=1.0), generator())
    assert matched.images[0].max() < 60 and matched.images[1].min() > 180
    soft = swapped(images, torch.arange(2), (7, 7), plain(soft=1.0), generator())
    assert ((soft.images[0] > 60) & (soft.images[0] < 180)).any()


# --- mixtures


def test_mixtures_lie_between_both_faces_and_some_faces_stay_as_they_are() -> None:
    dark, bright = torch.full((200, 3, 112, 112), 60.0), torch.full((200, 3, 112, 112), 200.0)
    ramp = torch.linspace(-20, 20, 112)
    dark, bright = dark + ramp, bright + ramp.flip(0)
    made = mixed(dark, bright, generator())
    kept = (made == dark).flatten(1).all(1).float().mean()
    assert 0.3 < kept < 0.6
    # The partner takes the face's brightness: both ramps now run from 40 to 80, and nothing is near 200.
    assert made.min() > 38 and made.max() < 82


def test_warping_moves_pixels_a_little_and_not_all_pictures() -> None:
    rows = torch.arange(112.0).view(1, 1, 112, 1).expand(64, 3, 112, 112)
    moved = (warped(rows, generator()) - rows)[:, 0, 20:-20, 20:-20].abs().amax((1, 2))
    assert 0.2 < (moved < 1e-3).float().mean() < 0.6
    assert moved.max() < 14
