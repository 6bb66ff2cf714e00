"""The picture of a pair: what was kept of each face, what is left of it without either set, and the two maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xcos_ext.explain.explainers.interface import PairModel
from xcos_ext.explain.plotting import AGAINST, FAINT, FOR, INK, bare_axes, colour_map, new_figure
from xcos_ext.io.optional import need
from xcos_ext.io.text import shorten

from .decoder import reconstruct
from .explainer import ReconstructionExplainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["reconstruction_figure"]

_PALE = "#f4f4f4"
_TITLES = (
    "picture",
    "what the network kept",
    "without the\nsimilar set",
    "without the\ndissimilar set",
    "similar: speaks\nfor the same person",
    "dissimilar: speaks\nfor different people",
)


@torch.no_grad()
def reconstruction_figure(
    explainer: ReconstructionExplainer,
    model: PairModel,
    face_a: np.ndarray,
    face_b: np.ndarray,
    *,
    names: tuple[str, str] = ("A", "B"),
    note: str = "",
) -> Figure:
    """Draw a pair as the model sees it.

    A row for each face: the picture; its reconstruction; the reconstruction with the similar set, and with the
    dissimilar set, replaced by the data-set mean; the two maps over the grey picture. All four maps have one scale, so
    what hardly counts is hardly seen.

    Args:
        explainer: its decoder, units and threshold are used.
        model: of the score.
        face_a: the first aligned face, uint8 RGB [H, W, 3].
        face_b: the second.
        names: of the two pictures.
        note: a small line at the bottom.

    Returns:
        A figure on the Agg canvas; write it with :func:`xcos_ext.explain.save_figure`.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: faces of another size, no threshold, or a model that the decoder does not belong to.
    """
    colors = need("matplotlib.colors", "drawing")
    images = model.preprocessing([face_a, face_b])
    decoder = explainer.decoder_for(model)
    images = images.to(decoder.mean.device)
    swapped = images.flip(0)
    features = model.features(images)
    similar, dissimilar = explainer.sets(model, features, features.flip(0))
    drawings = [
        reconstruct(decoder, features),
        reconstruct(decoder, features, entries=similar),
        reconstruct(decoder, features, entries=dissimilar),
    ]
    maps = [part.cpu().numpy() for part in explainer(model, images, swapped)]
    score = float(model.score(features[:1], features[1:])[0])
    threshold = model.threshold if explainer.threshold is None else explainer.threshold
    assert threshold is not None  # the explainer refuses models without
    most = max(float(max(part.max() for part in maps)), 1e-12)

    figure = new_figure(11.6, 5.0)
    side, gap, left, low = 0.147, 0.0085, 0.036, 0.085
    tall = side * 11.6 / 5.0
    for row, (name, face) in enumerate(zip(names, (face_a, face_b), strict=True)):
        bottom = low + (1 - row) * (tall + 0.022)
        figure.text(0.012, bottom + tall / 2, shorten(name, 28), rotation=90, ha="center", va="center", fontsize=11,
                    color=INK, parse_math=False)  # fmt: skip
        pictures: list[Any] = [face, *(d[row].permute(1, 2, 0).cpu().numpy() for d in drawings)]
        for column, title in enumerate(_TITLES):
            axes = bare_axes(figure, left + column * (side + gap) + 0.006 * (column > 3), bottom, side, tall)
            if column < 4:
                axes.imshow(pictures[column])
            else:
                _draw_map(axes, face, maps[column - 4][row] / most, (FOR, AGAINST)[column - 4], colors)
            if row == 0:
                colour = {4: FOR, 5: AGAINST}.get(column, INK)
                axes.set_title(title, fontsize=10.5, color=colour, pad=5)
    for place, colour in ((4, FOR), (5, AGAINST)):
        x = left + place * (side + gap) + 0.006
        box = bare_axes(figure, x, 0.052, side, 0.018)
        box.imshow(np.linspace(0, 1, 256)[None], cmap=colour_map((_PALE, colour)), aspect="auto")
        figure.text(x, 0.014, "0", fontsize=8, color=FAINT)
        figure.text(x + side, 0.014, "most of the four maps", fontsize=8, color=FAINT, ha="right")
    same = score >= threshold
    figure.text(left, 0.93, "same person" if same else "different people", fontsize=16, fontweight="bold",
                color=FOR if same else AGAINST)  # fmt: skip
    sign = "\u2265" if same else "<"
    summary = f"score {score:.3f} {sign} threshold {threshold:.3f}"
    figure.text(left + 6 * side + 5 * gap + 0.006, 0.935, summary, fontsize=12.5, color=INK, ha="right")
    if note:
        figure.text(left, 0.014, note, fontsize=8, color=FAINT, parse_math=False)
    return figure


def _draw_map(axes: Any, face: np.ndarray, values: np.ndarray, colour: str, colors: Any) -> None:
    """A map in 0..1 over the pale grey picture: strong values cover it."""
    grey = face.astype(np.float64) @ (0.299, 0.587, 0.114) / 255
    pale = np.repeat((0.45 + 0.55 * grey)[:, :, None], 3, 2)
    strength = np.clip(values, 0, 1)[:, :, None] ** 0.8
    axes.imshow(np.clip(pale * (1 - 0.85 * strength) + 0.85 * strength * np.array(colors.to_rgb(colour)), 0, 1))
