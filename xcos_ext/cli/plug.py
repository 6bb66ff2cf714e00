"""``xcos plug``: an explainable model from a recogniser, which may be an ONNX graph, and a folder of faces."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import DeviceError, PictureError, XCosError
from xcos_ext.io.text import display_name

from . import options
from .console import echo, note, note_faces, note_some, one_line, print_json, print_rows, progress
from .inputs import check_model_path, described, is_graph, load_recogniser

if TYPE_CHECKING:
    from xcos_ext.backbones import Recogniser
    from xcos_ext.card.preprocessing import Preprocessing
    from xcos_ext.faces import AlignedFace, PersonFolder
    from xcos_ext.model import XCosModel

_LEAST_PEOPLE = 20
_DECISION_FMR = 5e-3
_FMRS = (1e-1, 1e-2, 1e-3)
_EXPECTED_MATCHES = 30  # impostor pairs times rate, for a threshold at that rate to mean something
_ALIKE = 0.2  # mean cosine of different people; recognisers that see what they were trained on are near 0
_COMPARED = 32  # people, for that mean
_PIXEL = 255  # what a pixel is divided by unless --scale says otherwise


@options.command("plug")
@click.argument("weights", type=click.Path())
@click.option(
    "--faces",
    metavar="DIR|ZIP",
    type=click.Path(),
    help="Aligned crops (112 x 112) of some hundred people: <person>/<picture>, in a folder or zip archive.",
)
@click.option(
    "--out",
    metavar="FILE",
    type=options.Written(".safetensors", ".onnx"),
    help="The model to write: .safetensors or .onnx (a graph).",
)
@options.number("--project", metavar="K", help="Keep K principal axes per cell, e.g. 32.")
@click.option(
    "--threshold", type=options.finite, metavar="T", help="The decision threshold; by default from the faces."
)
@options.number("--limit", default=1000, least=2, help="Use at most N people.")
@click.option("--list", "list_maps", is_flag=True, help="ONNX: show where the graph may be split; needs no faces.")
@click.option("--tensor", metavar="NAME", help="ONNX: the feature map.  [default: the one that --list marks]")
@click.option("--output", metavar="NAME", help="ONNX: the embedding.  [default: the graph's only output [N, D]]")
@click.option(
    "--mean",
    type=options.three,
    metavar="M[,M,M]",
    help="ONNX: the network gets (RGB * scale - mean) / std.  [default: what the graph asks for, else 0.5]",
)
@click.option("--std", type=options.three, metavar="S[,S,S]", help="ONNX: see --mean.")
@click.option(
    "--scale", type=options.finite, metavar="F", help="ONNX: see --mean; 1 for pixels 0..255.  [default: 1/255]"
)
@options.device
@options.as_json
def run(
    weights: str,
    faces: str | None,
    out: str | None,
    project: int | None,
    threshold: float | None,
    limit: int,
    list_maps: bool,
    device: str,
    as_json: bool,
    **onnx: Any,
) -> int:
    """Make an explainable model of a face recogniser, without training.

    WEIGHTS is a recogniser's state dict, or an ONNX graph, which runs on the CPU and whose model is a graph too. One
    picture of each person gives the mean of every cell; every pair of different people gives the threshold.
    """
    from xcos_ext.io.atomic import check_output

    graph = is_graph(weights)
    for name, value in {"list": list_maps or None, **onnx}.items():
        if value is not None and not graph:
            raise click.UsageError(f"--{name} is for recognisers in ONNX files (.onnx)", click.get_current_context())
    if graph and device not in ("auto", "cpu"):
        raise DeviceError(f"device: expected cpu or auto, for an ONNX graph runs on the CPU here, got {device!r}")
    if list_maps:
        return _list_maps(check_model_path(weights), onnx["output"], as_json)
    if faces is None or out is None:
        missing = "--faces" if faces is None else "--out"
        raise click.UsageError(f"Missing option '{missing}'", click.get_current_context())
    if graph:
        check_output(out, (".onnx",))
    path = check_model_path(weights)
    folder, people = _people(faces, limit)
    import torch

    from xcos_ext.model import plug

    named = None
    if graph:  # called after its file, which its architecture does not tell
        recogniser = _onnx_recogniser(path, **onnx)
        axes = "" if project is None else f"-{project}"
        named = f"{os.path.splitext(os.path.basename(weights))[0]}+closed-form{axes}"
    else:
        recogniser = load_recogniser(path, device)
    with torch.no_grad():
        faces_of = [_aligned(folder, who, recogniser.preprocessing.size) for who in progress(people, "reading")]
        crops = [face.rgb for face in faces_of]
        model = plug(recogniser, crops, project=project, threshold=threshold, name=named)
        if graph:
            _check_alike(recogniser, crops)
        pairs = len(people) * (len(people) - 1) // 2
        _calibrate(model, crops, people, threshold, pairs)
        _write(model.cpu(), out)
    noted = note_faces({face.name: face.found for face in faces_of})
    _report(model, out, len(people), pairs, threshold, noted["not_like_a_face"], as_json)
    return 0


# --- faces


def _people(faces: str, limit: int) -> tuple[PersonFolder, list[str]]:
    """The folder and the people whose pictures are used: at most ``limit``, spread evenly over the sorted names."""
    from xcos_ext.faces import PersonFolder

    folder = PersonFolder(faces)
    note_some([f"left out {name}: {why}" for name, why in folder.left_out.items()], "left out")
    count = min(limit, len(folder.people))
    people = [folder.people[i * len(folder.people) // count] for i in range(count)]
    if len(people) < _LEAST_PEOPLE:
        raise PictureError(
            f"{display_name(faces)}: expected pictures of at least {_LEAST_PEOPLE} people (some hundred are "
            f"better), <person>/<picture>, got {len(people)}"
        )
    return folder, people


def _aligned(folder: PersonFolder, person: str, size: tuple[int, int]) -> AlignedFace:
    from xcos_ext.faces import extract_face

    key = folder.of(person)[0]
    return extract_face(folder.read(key), None, name=f"{display_name(folder.path)}: {key}", size=size)


def _check_alike(recogniser: Recogniser, faces: list[Any]) -> None:
    """Say so where different people look alike to the recogniser, as they do when its pixels are wrong."""
    import torch

    images = recogniser.preprocessing(faces[:: max(1, len(faces) // _COMPARED)])
    units = torch.nn.functional.normalize(recogniser(images), dim=1)
    count = len(units)
    mean = (float((units.sum(0) ** 2).sum()) - count) / (count * (count - 1))
    if mean > _ALIKE:
        note(
            f"different people have a mean cosine of {mean:.2f}, expected about 0: is the preprocessing right (--mean, "
            f"--std, --scale)? Now: {_in_words(recogniser.preprocessing)}"
        )


# --- calibration and output


def _calibrate(model: XCosModel, faces: list[Any], people: list[str], threshold: float | None, pairs: int) -> None:
    import torch

    if _DECISION_FMR * pairs >= _EXPECTED_MATCHES:
        from xcos_ext.evaluation import calibrate

        batches = range(0, len(faces), 32)
        features = torch.cat(
            [model.features_of(faces[first : first + 32]) for first in progress(batches, "calibrating")]
        )
        rates = [rate for rate in _FMRS if rate * pairs >= _EXPECTED_MATCHES]
        model.set_calibration(calibrate(model, features, people, decision_fmr=_DECISION_FMR, fmrs=rates))
        if threshold is not None:
            model.threshold = threshold
    elif threshold is None:
        note(
            f"{len(people)} people are too few to find a threshold at a false match rate of {_DECISION_FMR:g} "
            "(110 are enough); verify will need --threshold"
        )


def _write(model: XCosModel, out: str) -> None:
    """The model as weights, or as a graph from two pictures to score and maps."""
    if not is_graph(out):
        from xcos_ext.model import save_model

        save_model(model, out)
        return
    from xcos_ext.deploy import export_onnx
    from xcos_ext.deploy.onnx_export import OPSET

    # Not below the opset of a backbone that is a graph: its operators need not be rewritten then.
    opset = getattr(model.backbone, "opset", None)
    export_onnx(model, out, opset=None if opset is None else max(OPSET, opset))


def _report(
    model: XCosModel, out: str, people: int, pairs: int, threshold: float | None, unlike: list[str], as_json: bool
) -> None:
    split = _split_of(model)
    if as_json:
        data = {
            "model": described(model, out),
            "people": people,
            "impostor_pairs": pairs,
            "threshold": model.threshold,
            "decision_fmr": _DECISION_FMR if threshold is None and model.threshold is not None else None,
            "fmr_thresholds": {f"{rate:g}": t for rate, t in sorted(model.fmr_thresholds.items())},
            "not_like_a_face": unlike,
        }
        print_json(data | ({"split": split} if split else {}))
        return
    rule = f"false match rate {_DECISION_FMR:g} over {pairs:,} impostor pairs" if threshold is None else "given"
    print_rows(
        ("model", f"{display_name(out)} ({model.name})"),
        *split.items(),
        ("faces", f"{people} people, one picture each"),
        ("threshold", "none" if model.threshold is None else f"{model.threshold:.4f} ({rule})"),
    )


# --- recognisers in ONNX files


def _onnx_recogniser(weights: str, tensor: str | None, output: str | None, **pixels: Any) -> Recogniser:
    from xcos_ext.backbones import OnnxRecogniser

    return OnnxRecogniser(weights, tensor, output, preprocessing=preprocessing_of(weights, **pixels))


def _few(numbers: Sequence[float]) -> str:
    """Numbers in short, once where all are alike."""
    shown = [f"{number:.4g}" for number in numbers]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def _in_words(preprocessing: Preprocessing) -> str:
    """What pixels of 0 and 255 become."""
    low = [0 - m / s for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)]
    high = [(1 - m) / s for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)]
    return f"RGB {_few(low)} .. {_few(high)}"


def preprocessing_of(
    weights: str, mean: Sequence[float] | None, std: Sequence[float] | None, scale: float | None
) -> Preprocessing | None:
    """``(rgb * scale - mean) / std`` as the options say it; None: as the graph says it.

    Raises:
        ValueError: numbers that make no preprocessing.
    """
    if mean is None and std is None and scale is None:
        return None
    from xcos_ext.card.preprocessing import ARCFACE, Preprocessing
    from xcos_ext.onnx.files import read_onnx
    from xcos_ext.onnx.graph import Graph

    if scale is not None and scale <= 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    unit = 1 if scale is None else scale * _PIXEL
    # Without --mean and --std, pixels are scaled and nothing else.
    red, green, blue = (m / unit for m in mean or (0, 0, 0))
    deviations = [s / unit for s in std or (1, 1, 1)]
    size = Graph(read_onnx(weights), weights).size or ARCFACE.size
    return Preprocessing(size, (red, green, blue), (deviations[0], deviations[1], deviations[2]))


def _list_maps(weights: str, output: str | None, as_json: bool) -> int:
    """Show where a graph may be split, and what it does to its pictures."""
    from xcos_ext.backbones import feature_maps
    from xcos_ext.onnx.files import read_onnx
    from xcos_ext.onnx.graph import Graph
    from xcos_ext.onnx.pixels import normalisation_of

    maps = feature_maps(weights, output=output)
    own = normalisation_of(Graph(read_onnx(weights), weights))
    if as_json:
        fields = ("name", "shape", "op", "distance", "affine", "chosen")
        listed = [{name: getattr(m, name) for name in fields} for m in maps]
        pixels = None if own is None else {"scale": list(own.scale), "shift": list(own.shift)}
        print_json({"file": display_name(weights), "maps": listed, "normalisation": pixels})
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
    print_rows(*rows, width=1, gap=2)
    echo("* taken unless --tensor names another; behind it: operators up to the embedding")
    if own is not None:
        echo(f"the graph normalises its pictures itself: x * {_few(own.scale)} + {_few(own.shift)}")
    return 0


def _split_of(model: XCosModel) -> dict[str, str]:
    """Of a graph: which tensors were taken, and which pixels it is given."""
    from xcos_ext.backbones import OnnxRecogniser

    backbone = model.backbone
    if not isinstance(backbone, OnnxRecogniser):
        return {}
    own = backbone.normalisation
    inside = "" if own is None else f", which the graph normalises (x * {_few(own.scale)} + {_few(own.shift)})"
    return {
        "map": f"{one_line(backbone.tensor)} ({'x'.join(map(str, backbone.grid_shape))})",
        "embedding": f"{one_line(backbone.output)} ({backbone.embedding_size})",
        "pixels": _in_words(backbone.preprocessing) + inside,
    }
