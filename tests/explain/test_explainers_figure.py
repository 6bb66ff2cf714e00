"""The picture of several explainers' maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xcos_ext.explain import save_figure
from xcos_ext.explain.explainers import Saliency, explainers_figure

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
stats = pytest.importorskip("scipy.stats")

FACES = tuple(np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8))


def maps(size: int, shift: float = 0.0) -> Saliency:
    torch.manual_seed(size)
    values = torch.randn(1, size, size) + shift
    return Saliency(values, -values)


def test_a_panel_for_every_map(tmp_path: Path) -> None:
    given = {"cells": maps(7), "pixels": maps(112), "odd$name": Saliency(torch.zeros(9, 5), torch.ones(9, 5))}
    figure = explainers_figure(*FACES, given, names=("x$y$", "B" * 99), heading="score 0.5", note="model")
    images = [axes for axes in figure.axes if axes.images]
    assert len(images) == 2 + 2 * len(given)
    assert {axes.get_title() for axes in figure.axes} >= set(given)
    written = tmp_path / "maps.png"
    save_figure(figure, written, dpi=50)
    with Image.open(written) as picture:
        assert picture.size[0] > picture.size[1] > 100
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1 and box.y1 <= 1 for box in boxes)


def test_colours_are_ranks() -> None:
    """Only a map's order is drawn: whatever keeps it changes nothing; ties share their middle rank."""

    def painted(made: Saliency) -> np.ndarray:
        figure = explainers_figure(*FACES, {"m": made})
        return np.stack([np.asarray(axes.images[1].get_array()) for axes in figure.axes if len(axes.images) == 2])

    one = maps(7)
    same = Saliency(torch.exp(3 * one.similar) - 100, one.dissimilar * 1e-3)
    np.testing.assert_array_equal(painted(one), painted(same))
    alpha = painted(one)[..., 3]
    ranks = stats.rankdata(one.similar.numpy().ravel()).reshape(7, 7)
    assert (alpha[0][ranks <= 25] == 0).all() and (np.diff(alpha[0].ravel()[ranks.ravel().argsort()]) >= 0).all()
    assert ((alpha[0] == 0) | (alpha[1] == 0)).all()  # the two are each other's negative here
    assert (painted(Saliency(torch.ones(7, 7), torch.ones(7, 7)))[..., 3] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"face_a": FACES[0].astype(float)}, r"^face_a: expected uint8 \[H, W, 3\], got float64"),
        ({"face_b": FACES[0][..., 0]}, r"^face_b: expected uint8"),
        ({"maps": {}}, r"^maps: expected at least one explainer's, got none"),
        ({"maps": {"m": Saliency(torch.ones(2, 7, 7), torch.ones(2, 7, 7))}}, r"got \[2, 7, 7\] \(m, similar\)"),
        (
            {"maps": {"m": Saliency(torch.ones(7, 7), torch.full((7, 7), torch.nan))}},
            r"NaN or infinite ones \(m, dissimilar\)",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {"face_a": FACES[0], "face_b": FACES[1], "maps": {"m": maps(7)}} | change
    with pytest.raises(ValueError, match=message):
        explainers_figure(**given)
