"""Regions of a face as cells, and pasting them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xcos_ext.evaluation.faithfulness import REGIONS, SIZES, paste, region_mask, to_cells, to_pixels
from xcos_ext.evaluation.faithfulness.pasting import pixel_mask, soft_mask

SIDES = [("left eye", "right eye"), ("left cheek", "right cheek")]


def pictures(count: int, seed: int, dtype: torch.dtype = torch.uint8, size: int = 112) -> torch.Tensor:
    drawn = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype)


@pytest.mark.parametrize("region", REGIONS)
def test_sizes_grow_and_hold_each_other(region: str) -> None:
    masks = [region_mask(region, size) for size in SIZES]
    assert [mask.shape for mask in masks] == [(7, 7)] * 3
    small, medium, large = masks
    assert (medium | small).equal(medium) and (large | medium).equal(large)
    assert 0 < small.sum() <= medium.sum() < large.sum() < 25
    assert {tuple(cell) for cell in medium.nonzero().tolist()} == set(REGIONS[region]["medium"])


def test_sides_are_mirror_pictures() -> None:
    for size in SIZES:
        for left, right in SIDES:
            assert region_mask(left, size).flip(1).equal(region_mask(right, size))
        for middle in ("both eyes", "nose", "mouth", "forehead", "chin"):
            assert region_mask(middle, size).flip(1).equal(region_mask(middle, size))


def test_landmarks_lie_in_their_regions() -> None:
    from xcos_ext.faces import ARCFACE_TEMPLATE

    parts = ("left eye", "right eye", "nose", "mouth", "mouth")
    for region, (x, y) in zip(parts, ARCFACE_TEMPLATE, strict=True):
        assert region_mask(region)[int(y // 16), int(x // 16)], region


def test_other_grids() -> None:
    fine = region_mask("mouth", "small", (14, 14))
    assert fine.sum() == 4 and fine[10:12, 6:8].all()
    assert region_mask("both eyes", "large", (112, 112)).equal(
        pixel_mask(region_mask("both eyes", "large"), (112, 112))
    )
    with pytest.raises(ValueError, match="grid: expected one fine enough for mouth, small"):
        region_mask("mouth", "small", (2, 2))


def test_pixel_mask_of_a_grid_that_does_not_divide() -> None:
    mask = torch.tensor([[True, False, True]])
    # The middles of five pixels lie at 0.1, 0.3, 0.5, 0.7 and 0.9 of the width: thirds end at 0.33 and 0.67.
    assert pixel_mask(mask, (2, 5)).tolist() == [[True, True, False, True, True]] * 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_hard_paste_is_a_copy(dtype: torch.dtype) -> None:
    a, b = pictures(2, 0, dtype), pictures(2, 1, dtype)
    masks = torch.stack([region_mask("nose"), region_mask("left cheek", "large")])
    made = paste(a, b, masks)
    expected = a.clone()
    for n, region, size in ((0, "nose", "medium"), (1, "left cheek", "large")):
        for row, column in REGIONS[region][size]:
            square = np.s_[n, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            expected[square] = b[square]
            assert made.pixels[n, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].all()
    assert made.images.equal(expected) and made.images.dtype == dtype
    assert made.pixels.sum((1, 2)).tolist() == [2 * 256, 4 * 256]
    one = paste(a, b, masks[0])
    assert one.images[0].equal(made.images[0]) and one.pixels[1].equal(one.pixels[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("region", ["mouth", "chin", "left cheek"])
def test_soft_paste_stays_inside_the_mask(dtype: torch.dtype, matched: bool, region: str) -> None:
    a, b = pictures(1, 2, dtype), pictures(1, 3, dtype)
    made = paste(a, b, region_mask(region), blend="soft", match_colour=matched)
    outside = ~made.pixels.unsqueeze(1).expand_as(a)
    assert made.images[outside].equal(a[outside])
    weight = soft_mask(made.pixels, 4)
    assert ((weight > 0) == made.pixels).all() and weight.max() == 1
    if not matched:
        exact = a.double() + weight.double().unsqueeze(1) * (b.double() - a.double())
        assert (made.images.double() - exact).abs().max() <= (0.5 + 1e-4 if dtype == torch.uint8 else 1e-4)


def test_soft_mask_rises_evenly_and_not_along_the_pictures_edge() -> None:
    pixels = pixel_mask(region_mask("left cheek"), (112, 112)).unsqueeze(0)  # columns 0 to 31, rows 64 to 79
    weight = soft_mask(pixels, 4)[0]
    assert weight[72, :25].eq(1).all()
    ramp = weight[72, 24:33].tolist()
    assert ramp == sorted(ramp, reverse=True) and ramp[-1] == 0 and np.allclose(np.diff(ramp[1:]), -1 / 7)


def test_matched_colours_have_the_receivers_moments() -> None:
    a = pictures(2, 4, torch.float32) * 0.3 + 90
    b = pictures(2, 5, torch.float32) * 0.2
    made = paste(a, b, region_mask("both eyes"), match_colour=True)
    for n in range(2):
        for channel in range(3):
            inside = made.images[n, channel][made.pixels[n]]
            replaced = a[n, channel][made.pixels[n]]
            assert inside.mean().item() == pytest.approx(replaced.mean().item(), rel=1e-4)
            assert inside.std().item() == pytest.approx(replaced.std().item(), rel=1e-3)
            donor = b[n, channel][made.pixels[n]]
            assert np.corrcoef(inside, donor)[0, 1] > 0.999
    flat = paste(a, torch.full_like(b, 7.0), region_mask("nose"), match_colour=True)
    assert torch.isfinite(flat.images).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"donors": pictures(1, 0)}, ValueError, r"images, donors: expected the same \[N, 3, H, W\]"),
        ({"donors": pictures(2, 0, torch.float32)}, TypeError, "images, donors: expected both uint8 or floating"),
        ({"mask": torch.zeros(7, 7)}, TypeError, "mask: expected bool, got torch.float32"),
        ({"mask": torch.zeros(3, 7, 7, dtype=torch.bool)}, ValueError, r"mask: expected \[h, w\] or \[2, h, w\]"),
        ({"mask": torch.zeros(7, 200, dtype=torch.bool)}, ValueError, "mask: expected"),
        ({"blend": "fuzzy"}, ValueError, "blend: expected one of hard, soft, got 'fuzzy'"),
        (
            {"blend": "soft", "mask": torch.eye(112).bool()},
            ValueError,
            "mask: expected at least 7 pixels in height and w",
        ),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"images": pictures(2, 0), "donors": pictures(2, 1), "mask": region_mask("nose")}
    with pytest.raises(error, match=message):
        paste(**(arguments | change))  # type: ignore[arg-type]


def test_unknown_regions_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"region: expected one of left eye, .*, got 'ear'"):
        region_mask("ear")
    with pytest.raises(ValueError, match="size: expected one of small, medium, large, got 'huge'"):
        region_mask("nose", "huge")


def test_resolutions() -> None:
    cells = torch.rand(2, 7, 7)
    pixels = to_pixels(cells, (112, 112))
    assert pixels.shape == (2, 112, 112)
    # Between two middles the values change evenly; beyond the outermost ones they stay.
    row = pixels[0, 7]
    assert row[0] == row[7] and torch.allclose(row[8:24].diff(), row[9] - row[8], atol=1e-5)
    assert torch.allclose(to_cells(cells.repeat_interleave(16, 1).repeat_interleave(16, 2), (7, 7)), cells)
    drawn = torch.rand(2, 112, 112)
    assert torch.allclose(to_cells(drawn, (7, 7)), drawn.view(2, 7, 16, 7, 16).mean((2, 4)))
    assert to_cells(cells, (7, 7)) is cells and to_pixels(drawn, (112, 112)) is drawn
    assert to_cells(torch.rand(1, 4, 4), (7, 7)).shape == (1, 7, 7)
    # Mirror pictures stay equal to the last bit, or rounding would break the ties of a symmetric map.
    symmetric = drawn + drawn.flip(2)
    pooled = to_cells(symmetric, (7, 7))
    assert pooled.equal(pooled.flip(2))
