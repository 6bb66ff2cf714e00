"""What ``xcos plug`` says and asks of recognisers in ONNX files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from xcos_ext.io.errors import XCosError

from .console import one_line, print_json

if TYPE_CHECKING:
    from xcos_ext.card.preprocessing import Preprocessing
    from xcos_ext.model import XCosModel

__all__ = ["few", "in_words", "list_maps", "preprocessing_of", "split_of"]

_BUILT_IN = 255  # what a pixel is divided by unless --scale says otherwise


def few(numbers: Sequence[float]) -> str:
    """Numbers in short, once where all are alike."""
    shown = [f"{number:.4g}" for number in numbers]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def in_words(preprocessing: Preprocessing) -> str:
    """What pixels of 0 and 255 become."""
    low = [0 - m / s for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)]
    high = [(1 - m) / s for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)]
    return f"RGB {few(low)} .. {few(high)}"


def preprocessing_of(weights: str, mean: str | None, std: str | None, scale: float | None) -> Preprocessing | None:
    """``(rgb * scale - mean) / std`` as the options say it; None: as the graph says it.

    Raises:
        XCosError: numbers that make no preprocessing.
    """
    if mean is None and std is None and scale is None:
        return None
    from xcos_ext.card.preprocessing import ARCFACE, Preprocessing
    from xcos_ext.onnx.files import read_onnx
    from xcos_ext.onnx.graph import Graph

    factor = 1 / _BUILT_IN if scale is None else scale
    if not (math.isfinite(factor) and factor > 0):
        raise XCosError(f"--scale: expected a positive number, got {scale}")
    unit = factor * _BUILT_IN
    # Without --mean and --std, pixels are scaled and nothing else.
    means = [m / unit for m in _three("--mean", mean, 0.0)]
    deviations = [s / unit for s in _three("--std", std, 1.0)]
    size = Graph(read_onnx(weights), weights).size or ARCFACE.size
    try:
        return Preprocessing(size, (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2]))
    except ValueError as error:
        raise XCosError(f"--mean, --std: {error}") from error


def _three(option: str, text: str | None, default: float) -> list[float]:
    try:
        numbers = [default] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise XCosError(f"{option}: expected a number or three (R,G,B), got {text!r}")
    return numbers * (3 // len(numbers))


def list_maps(weights: str, output: str | None, as_json: bool) -> int:
    """Show where a graph may be split, and what it does to its pictures."""
    from xcos_ext.backbones import feature_maps
    from xcos_ext.faces import display_name
    from xcos_ext.onnx.files import read_onnx
    from xcos_ext.onnx.graph import Graph
    from xcos_ext.onnx.pixels import normalisation_of

    maps = feature_maps(weights, output=output)
    own = normalisation_of(Graph(read_onnx(weights), weights))
    if as_json:
        print_json(
            {
                "file": display_name(weights),
                "maps": [
                    {
                        "name": m.name,
                        "shape": list(m.shape),
                        "op": m.op,
                        "distance": m.distance,
                        "affine": m.affine,
                        "chosen": m.chosen,
                    }
                    for m in maps
                ],
                "normalisation": None if own is None else {"scale": list(own.scale), "shift": list(own.shift)},
            }
        )
        return 0
    if not maps:
        raise XCosError(
            f"{display_name(weights)}: no usable feature map: none of 4x4 to 16x16 cells that the output depends on "
            "alone"
        )
    rows = [("", "tensor", "shape", "made by", "behind it", "closed form")]
    for m in maps:
        shape = "x".join(map(str, m.shape))
        name, op = one_line(m.name), one_line(m.op)  # a file may call them anything
        rows.append(("*" if m.chosen else "", name, shape, op, str(m.distance), "yes" if m.affine else "no"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo("* taken unless --tensor names another; behind it: operators up to the embedding")
    if own is not None:
        click.echo(f"the graph normalises its pictures itself: x * {few(own.scale)} + {few(own.shift)}")
    return 0


def split_of(model: XCosModel) -> dict[str, str]:
    """Of a graph: which tensors were taken, and which pixels it is given."""
    from xcos_ext.backbones import OnnxRecogniser

    backbone = model.backbone
    if not isinstance(backbone, OnnxRecogniser):
        return {}
    own = backbone.normalisation
    inside = "" if own is None else f", which the graph normalises (x * {few(own.scale)} + {few(own.shift)})"
    return {
        "map": f"{one_line(backbone.tensor)} ({'x'.join(map(str, backbone.grid_shape))})",
        "embedding": f"{one_line(backbone.output)} ({backbone.embedding_size})",
        "pixels": in_words(backbone.preprocessing) + inside,
    }
