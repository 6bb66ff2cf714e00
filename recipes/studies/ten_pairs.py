"""Draws docs/images/ten_pairs.png: what the maps say of ten real pairs, chosen by their place in the lists.

    python -m recipes.studies.ten_pairs slim --lfw lfw112.zip --pairs pairs.txt --cfp cfp_dev.zip --detector yunet.onnx

Frontal, profile, covered and pasted faces of people whom nobody here trained on. The photographs are for research only,
so an outline stands for them, with what was drawn or pasted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Polygon, Rectangle

from recipes.altered import LENSES, MASK
from recipes.common import Padded, say
from recipes.measure_default import ALTERATIONS, tested
from xcos_ext.evaluation.datasets import LFW, PairList
from xcos_ext.evaluation.faithfulness import paste, region_mask
from xcos_ext.explain import contribution, save_figure
from xcos_ext.faces import extract_face
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosModel, load_model

TARGET = Path(__file__).resolve().parents[2] / "docs" / "images" / "ten_pairs.png"
_FACE = ((38, 52), (74, 52), (56, 72), (42, 92), (71, 92))  # the ArcFace template's five points
_CELL = 16


class Pair(NamedTuple):
    """Attributes: what is shown, both crops (uint8 RGB [112, 112, 3]), and what was changed in the first one: polygons
    in pixels, a mask of cells."""

    title: str
    first: np.ndarray
    second: np.ndarray
    drawn: Sequence[Sequence[tuple[int, int]]] = ()
    pasted: torch.Tensor | None = None


def nth(pairs: PairList, genuine: bool, number: int) -> int:
    """Place of a genuine or impostor pair."""
    return int(np.flatnonzero(np.asarray(pairs.genuine) == genuine)[number])


def ten_pairs(lfw: LFW, cfp: dict[str, PairList], detector: Padded) -> list[Pair]:
    """The pairs; from each list the first ones of their kind."""

    def read(pairs: PairList, place: int) -> tuple[np.ndarray, np.ndarray]:
        keys = pairs.keys[pairs.first[place]], pairs.keys[pairs.second[place]]
        if pairs is lfw:
            return lfw.read(keys[0]), lfw.read(keys[1])
        first, second = (extract_face(pairs.read(key), detector, name=key).rgb for key in keys)
        return first, second

    found = []
    for name, pairs, genuine, number in (
        ("LFW, same person", lfw, True, 0),
        ("LFW, two people", lfw, False, 0),
        ("CFP frontal, same person", cfp["FF"], True, 0),
        ("CFP profile, same person", cfp["FP"], True, 0),
        ("CFP profile, same person", cfp["FP"], True, 50),
        ("CFP profile, two people", cfp["FP"], False, 0),
    ):
        found.append(Pair(name, *read(pairs, nth(pairs, genuine, number))))
    for name, drawn, number in (("with a drawn mask", (MASK,), 1), ("with drawn sunglasses", LENSES, 2)):
        first, second = read(lfw, nth(lfw, True, number))
        found.append(Pair(f"LFW, same person, {name}", ALTERATIONS[name](first, 0), second, drawn))
    for region, number in (("both eyes", 3), ("mouth", 4)):
        first, second = read(lfw, nth(lfw, True, number))
        other = read(lfw, nth(lfw, False, number))[0]
        cells = region_mask(region)
        face, donor = (torch.from_numpy(side).permute(2, 0, 1)[None].contiguous() for side in (first, other))
        made = paste(face, donor, cells).images[0].permute(1, 2, 0).contiguous().numpy()
        found.append(Pair(f"LFW, same person, {region} of another", made, second, pasted=cells))
    return found


def sketch(axes: Any, pair: Pair) -> None:
    """An outline of a face, with what was changed."""
    axes.add_patch(Ellipse((56, 64), 82, 112, fill=False, color="#777777", lw=1))
    for x, y in _FACE[:2]:
        axes.add_patch(Ellipse((x, y), 14, 7, fill=False, color="#777777", lw=1))
    axes.plot([56, 52, 58], [54, 74, 76], color="#777777", lw=1)
    axes.plot(*zip(*_FACE[3:], strict=True), color="#777777", lw=1)
    for shape in pair.drawn:
        axes.add_patch(Polygon(shape, color="#8fb8d0", alpha=0.8))
    if pair.pasted is not None:
        for row, column in pair.pasted.nonzero().tolist():
            axes.add_patch(Rectangle((column * _CELL, row * _CELL), _CELL, _CELL, color="#d55e00", alpha=0.45, lw=0))
    axes.set(xlim=(0, 112), ylim=(112, 0), aspect="equal", xticks=[], yticks=[])


@torch.no_grad()
def draw(model: XCosModel, pairs: Sequence[Pair]) -> Figure:
    """A pair a column: outline, S, W, and what each cell adds to the decision."""
    if model.threshold is None:
        raise XCosError("model: expected one with a decision threshold")
    figure = Figure(figsize=(2.05 * len(pairs), 8.8), layout="constrained")
    rows = figure.subplots(4, len(pairs))
    for column, pair in enumerate(pairs):
        first, second = model.features_of([pair.first, pair.second]).split(1)
        made = model.score(first, second, return_maps=True)
        s, w = made.similarity[0].numpy(), made.attention[0].numpy()
        parts = 100 * contribution(s, w, model.threshold)
        score = float(made.score)
        verdict = "match" if score >= model.threshold else "no match"
        title = pair.title.replace(", ", ",\n", 2)
        rows[0, column].set_title(f"{title}\n{score:.2f}: {verdict}", fontsize=9)
        sketch(rows[0, column], pair)
        for row, (values, colours, low, high, digits) in enumerate(
            (
                (s, "cividis", 0, 1, 2),
                (100 * w, "Greys", 0, 8, 1),
                (parts, "PuOr", -2, 2, 1),
            ),
            1,
        ):
            axes = rows[row, column]
            axes.imshow(values, cmap=colours, vmin=low, vmax=high)
            middle = (low + high) / 2
            for (y, x), value in np.ndenumerate(values):
                far = abs(value - middle) > 0.25 * (high - low)
                dark = far if colours == "PuOr" else (value > middle) == (colours == "Greys")
                axes.text(x, y, f"{value:.{digits}f}", ha="center", va="center", fontsize=5, color="w" if dark else "k")
            axes.set(xticks=[], yticks=[])
            if pair.pasted is not None:
                for y, x in pair.pasted.nonzero().tolist():
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, color="#d55e00", lw=0.8))
    for row, label in enumerate(("the first face", "S", "W, %", f"W (S \u2212 {model.threshold:.2f}), \u00d7 100")):
        rows[row, 0].set_ylabel(label)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's file, or the shipped one's name")
    for name in ("lfw", "pairs", "cfp", "detector"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args(arguments)
    try:
        model = load_model(options.model).requires_grad_(False)
        lfw, cfp, detector = tested(options.lfw, options.pairs, options.cfp, options.detector)
        save_figure(draw(model, ten_pairs(lfw, cfp, detector)), options.out)
    except (XCosError, OSError, ValueError) as error:
        say(f"ten_pairs: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
