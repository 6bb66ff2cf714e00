"""The similarity transform, the template and resampling."""

from __future__ import annotations

import numpy as np
import pytest

from xcos_ext.faces import ARCFACE_TEMPLATE, align_face, apply_transform, similarity_transform, template_for, warp
from xcos_ext.faces.alignment import compose, invert


def similarity(degrees: float, scale: float, x: float, y: float) -> np.ndarray:
    a, b = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees))
    return np.array([[a, -b, x], [b, a, y]])


@pytest.mark.parametrize("degrees", [0, 17, -90, 179])
@pytest.mark.parametrize("scale", [0.01, 1, 37])
def test_recovers_a_similarity(degrees: float, scale: float) -> None:
    matrix = similarity(degrees, scale, 300, -20)
    points = np.random.default_rng(0).normal(0, 30, (5, 2))
    got = similarity_transform(points, apply_transform(matrix, points))
    np.testing.assert_allclose(got, matrix, rtol=1e-9, atol=1e-9 * scale * 100)


def test_two_points_are_enough_and_decide_exactly() -> None:
    source, target = np.array([[0.0, 0], [10, 0]]), np.array([[5.0, 5], [5, 25]])
    np.testing.assert_allclose(apply_transform(similarity_transform(source, target), source), target, atol=1e-12)


def test_is_the_least_squares_solution() -> None:
    """No similarity nearby has smaller residuals."""
    rng = np.random.default_rng(1)
    source, target = rng.normal(0, 20, (5, 2)), rng.normal(0, 20, (5, 2))
    best = similarity_transform(source, target)
    a, b = best[0, 0], best[1, 0]
    assert best[1, 1] == pytest.approx(a)
    assert best[0, 1] == pytest.approx(-b)

    def cost(p: np.ndarray) -> float:
        m = np.array([[p[0], -p[1], p[2]], [p[1], p[0], p[3]]])
        return float(((apply_transform(m, source) - target) ** 2).sum())

    solution = np.array([a, b, best[0, 2], best[1, 2]])
    for step in np.eye(4):
        gradient = (cost(solution + 1e-5 * step) - cost(solution - 1e-5 * step)) / 2e-5
        assert gradient == pytest.approx(0, abs=1e-4)


def test_never_mirrors() -> None:
    mirrored = ARCFACE_TEMPLATE * [-1, 1]
    assert np.linalg.det(similarity_transform(mirrored, ARCFACE_TEMPLATE)[:, :2]) > 0


def test_bad_points() -> None:
    good = ARCFACE_TEMPLATE
    with pytest.raises(ValueError, match=r"source, target: expected \[N, 2\] with N >= 2, got \(5, 3\)"):
        similarity_transform(np.zeros((5, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"got \(5, 2\) and \(4, 2\)"):
        similarity_transform(good, good[:4])
    with pytest.raises(ValueError, match="all points are the same"):
        similarity_transform(np.full((5, 2), 7.0), good)
    with pytest.raises(ValueError, match="expected finite coordinates"):
        similarity_transform(good * np.nan, good)


def test_inverse_and_composition() -> None:
    a, b = similarity(20, 2, 3, 4), similarity(-50, 0.3, 7, -1)
    points = np.random.default_rng(2).normal(0, 9, (6, 2))
    np.testing.assert_allclose(apply_transform(invert(a), apply_transform(a, points)), points, atol=1e-12)
    np.testing.assert_allclose(
        apply_transform(compose(a, b), points), apply_transform(a, apply_transform(b, points)), atol=1e-12
    )


def test_template_scales_about_pixel_edges() -> None:
    np.testing.assert_allclose(template_for((112, 112)), ARCFACE_TEMPLATE)
    np.testing.assert_allclose(template_for((224, 224)), 2 * ARCFACE_TEMPLATE + 0.5)
    with pytest.raises(ValueError, match="read-only"):
        ARCFACE_TEMPLATE[0, 0] = 1


def ramp(height: int, width: int, slope: tuple[float, float], start: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.clip(np.rint(start + slope[0] * x + slope[1] * y), 0, 255).astype(np.uint8)


def test_identity_and_shift() -> None:
    image = np.random.default_rng(3).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    assert (align_face(image, ARCFACE_TEMPLATE) == image).all()
    moved = align_face(image, ARCFACE_TEMPLATE + np.array([10, 4]))
    assert (moved[:-4, :-10] == image[4:, 10:]).all()
    assert (moved[-4:] == 0).all()  # beyond the picture


@pytest.mark.parametrize("scale", [0.9, 0.5, 0.26, 0.1, 0.031, 2.7])
def test_a_ramp_stays_where_it_is(scale: float) -> None:
    """Averaging before shrinking must not shift the picture, not even by half a pixel."""
    image = ramp(900, 1200, (0.12, 0.09), 20)
    matrix = similarity(11, scale, -3, 5)
    got = warp(image, matrix, (60, 80)).astype(float)
    y, x = np.mgrid[:60, :80]
    at = apply_transform(invert(matrix), np.stack([x.ravel(), y.ravel()], 1).astype(float))
    expected = (20 + 0.12 * at[:, 0] + 0.09 * at[:, 1]).reshape(60, 80)
    margin = 1.5 / scale  # whole blocks, and the border's interpolation
    inside = (at > margin).all(1) & (at[:, 0] < 1199 - margin) & (at[:, 1] < 899 - margin)
    assert inside.any()
    assert np.abs(got.ravel() - expected.ravel())[inside].max() < 1.2


def test_shrinking_averages() -> None:
    """A fine checkerboard becomes grey, not aliased."""
    y, x = np.mgrid[:1000, :1000]
    image = (255 * ((x + y) % 2)).astype(np.uint8)
    got = warp(image, similarity(0, 0.05, 0, 0), (50, 50))[2:-2, 2:-2]
    assert np.abs(got.astype(int) - 128).max() <= 3


def test_far_outside_and_borders() -> None:
    image = np.full((50, 60, 3), 200, np.uint8)
    away = similarity(0, 1, 5000, 0)
    assert (warp(image, away, (20, 30)) == 0).all()
    assert warp(image, away, (20, 30)).shape == (20, 30, 3)
    assert (warp(image, away, (20, 30), extend=True) == 200).all()
    assert (warp(image[:, :, 0], similarity(30, 0.2, 8, 8), (20, 30), extend=True) == 200).all()


def test_wider_than_opencv_can_warp() -> None:
    image = np.zeros((40, 40_000, 3), np.uint8)
    image[:, 39_000:] = 90
    assert (warp(image, similarity(0, 1, -39_500, 0), (20, 20)) == 90).all()


def test_align_refuses_other_inputs() -> None:
    image = np.zeros((112, 112, 3), np.uint8)
    with pytest.raises(ValueError, match=r"rgb: expected a uint8 array \[H, W, 3\], got float64"):
        align_face(image.astype(float), ARCFACE_TEMPLATE)
    for name, given in (
        ("rgb", (np.ma.masked_array(image), ARCFACE_TEMPLATE)),
        ("landmarks", (image, np.ma.ones((5, 2)))),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected an array without a mask"):
            align_face(*given)
    with pytest.raises(ValueError, match=r"landmarks: expected five finite points \[5, 2\], got shape \[4, 2\]"):
        align_face(image, ARCFACE_TEMPLATE[:4])
    for degrees in range(0, 360, 30):  # however the head leans, left and right are told apart
        turned = apply_transform(similarity(degrees, 2.5, 200, 100), ARCFACE_TEMPLATE)
        assert align_face(image, turned).shape == (112, 112, 3)
        with pytest.raises(ValueError, match=r"landmarks: expected .* got eyes the other way round"):
            align_face(image, turned[[1, 0, 2, 4, 3]])
    profile = ARCFACE_TEMPLATE * (-0.01, 1) + (50, 0)  # where both eyes all but coincide, either may seem the left one
    assert align_face(image, profile).shape == (112, 112, 3)


def test_other_sizes_of_crop() -> None:
    image = np.random.default_rng(4).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    assert align_face(image, ARCFACE_TEMPLATE * 2, (96, 80)).shape == (96, 80, 3)
