"""``xcos plug``: an explainable model from a recogniser and a folder of faces."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import DeviceError, PictureError, XCosError

from .console import note, notes_for_warnings, print_json, progress
from .plug_onnx import in_words, list_maps, preprocessing_of, split_of
from .verify import check_model_path, chosen_device

if TYPE_CHECKING:
    from xcos_ext.backbones import Recogniser
    from xcos_ext.model import XCosModel

__all__ = ["Request", "run"]

_LEAST_PEOPLE = 20
_DECISION_FMR = 5e-3
_FMRS = (1e-1, 1e-2, 1e-3)
_EXPECTED_MATCHES = 30  # impostor pairs times rate, for a threshold at that rate to mean something
_ALIKE = 0.2  # mean cosine of different people; recognisers that see what they were trained on are near 0
_COMPARED = 32  # people, for that mean


@dataclass(frozen=True)
class Request:
    """The command line's options."""

    weights: str
    faces: str | None = None
    out: str | None = None
    project: int | None = None
    threshold: float | None = None
    limit: int = 1000
    as_json: bool = False
    list_maps: bool = False
    tensor: str | None = None
    output: str | None = None
    mean: str | None = None
    std: str | None = None
    scale: float | None = None
    device: str = "auto"

    @property
    def is_onnx(self) -> bool:
        """Whether the recogniser is an ONNX graph."""
        return self.weights.lower().endswith(".onnx")


def run(request: Request) -> int:
    """List the recogniser's maps; or compute statistics, plug, calibrate, write.

    Raises:
        XCosError: anything wrong with the weights, the faces or the output.
        click.UsageError: options that are missing or do not belong together.
    """
    from xcos_ext.io.atomic import check_output

    _check_options(request)
    if request.list_maps:
        return list_maps(check_model_path(request.weights), request.output, request.as_json)
    assert request.faces is not None and request.out is not None
    check_output(request.out, (".onnx",) if request.is_onnx else (".safetensors", ".onnx"))
    weights = check_model_path(request.weights)
    folder, people = _people(request.faces, request.limit)
    device = chosen_device("cpu" if request.is_onnx else request.device)
    import torch

    from xcos_ext.model import plug

    recogniser = _recogniser(request, weights).to(device)
    size = recogniser.preprocessing.size
    with torch.no_grad():
        faces = [_aligned(folder, person, size, request.faces) for person in progress(people, len(people), "reading")]
        try:
            model = plug(recogniser, faces, project=request.project, threshold=request.threshold, name=_name(request))
        except ValueError as error:
            if isinstance(error, XCosError):
                raise
            raise XCosError(str(error)) from error
        if request.is_onnx:
            _check_alike(recogniser, faces)
        pairs = len(people) * (len(people) - 1) // 2
        _calibrate(model, faces, people, request.threshold)
        _write(model.cpu(), request.out)
    _report(request, model, len(people), pairs)
    return 0


def _check_options(request: Request) -> None:
    context = click.get_current_context(silent=True)
    if not request.is_onnx:
        for name in ("tensor", "output", "mean", "std", "scale"):
            if getattr(request, name) is not None:
                raise click.UsageError(f"--{name} is for recognisers in ONNX files (.onnx)", context)
        if request.list_maps:
            raise click.UsageError("--list is for recognisers in ONNX files (.onnx)", context)
    elif request.device not in ("auto", "cpu"):
        raise DeviceError(
            f"--device: expected cpu or auto, for an ONNX graph runs on the CPU here, got {request.device!r}"
        )
    if not request.list_maps:
        for name in ("faces", "out"):
            if getattr(request, name) is None:
                raise click.UsageError(f"Missing option '--{name}'", context)


# --- the recogniser


def _recogniser(request: Request, weights: str) -> Recogniser:
    import torch

    if request.is_onnx:
        from xcos_ext.backbones import OnnxRecogniser

        return OnnxRecogniser(
            weights,
            request.tensor,
            request.output,
            preprocessing=preprocessing_of(weights, request.mean, request.std, request.scale),
        )
    from xcos_ext.model import load_recogniser

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # see verify.load
    try:
        with notes_for_warnings():
            return load_recogniser(weights)
    finally:
        torch.set_num_threads(threads)


def _name(request: Request) -> str | None:
    """A graph's model is called after its file, which its architecture does not tell."""
    if not request.is_onnx:
        return None
    axes = "" if request.project is None else f"-{request.project}"
    return f"{os.path.splitext(os.path.basename(request.weights))[0]}+closed-form{axes}"


# --- faces


def _chosen(people: tuple[str, ...], limit: int) -> list[str]:
    """At most ``limit`` people, spread evenly over the sorted names."""
    count = min(limit, len(people))
    return [people[i * len(people) // count] for i in range(count)]


def _people(faces: str, limit: int) -> tuple[Any, list[str]]:
    """The folder and the people whose pictures are used."""
    from xcos_ext.faces import PersonFolder, display_name

    try:
        folder = PersonFolder(faces)
    except (OSError, ValueError) as error:
        raise PictureError(str(error)) from error
    people = _chosen(folder.people, limit)
    if len(people) < _LEAST_PEOPLE:
        raise PictureError(
            f"{display_name(faces)}: expected pictures of at least {_LEAST_PEOPLE} people (some hundred are "
            f"better), <person>/<picture>, got {len(people)}"
        )
    return folder, people


def _aligned(folder: Any, person: str, size: tuple[int, int], faces: str) -> Any:
    from xcos_ext.faces import display_name

    key = folder.of(person)[0]
    rgb = folder.read(key)
    if rgb.shape[:2] != size:
        raise PictureError(
            f"{display_name(faces)}: {key}: expected an aligned crop of {size[1]} x {size[0]} pixels, got "
            f"{rgb.shape[1]} x {rgb.shape[0]}"
        )
    return rgb


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
            f"--std, --scale)? Now: {in_words(recogniser.preprocessing)}"
        )


# --- calibration and output


def _calibrate(model: XCosModel, faces: list[Any], people: list[str], threshold: float | None) -> None:
    import torch

    pairs = len(people) * (len(people) - 1) // 2
    rates = [rate for rate in _FMRS if rate * pairs >= _EXPECTED_MATCHES]
    if _DECISION_FMR * pairs >= _EXPECTED_MATCHES:
        from xcos_ext.evaluation import calibrate

        batches = range(0, len(faces), 32)
        features = torch.cat(
            [model.features_of(faces[first : first + 32]) for first in progress(batches, len(batches), "calibrating")]
        )
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
    if not out.lower().endswith(".onnx"):
        from xcos_ext.model import save_model

        save_model(model, out)
        return
    from xcos_ext.deploy import export_onnx
    from xcos_ext.deploy.onnx_export import OPSET

    # Not below the opset of a backbone that is a graph: its operators need not be rewritten then.
    opset = getattr(model.backbone, "opset", None)
    export_onnx(model, out, opset=None if opset is None else max(OPSET, opset))


def _report(request: Request, model: XCosModel, people: int, pairs: int) -> None:
    from xcos_ext.faces import display_name

    assert request.out is not None
    split = split_of(model)
    if request.as_json:
        print_json(
            {
                "model": {"name": model.name, "file": display_name(request.out), "fingerprint": model.fingerprint()},
                "people": people,
                "impostor_pairs": pairs,
                "threshold": model.threshold,
                "decision_fmr": _DECISION_FMR if request.threshold is None and model.threshold is not None else None,
                "fmr_thresholds": {f"{rate:g}": t for rate, t in sorted(model.fmr_thresholds.items())},
                **({"split": split} if split else {}),
            }
        )
        return
    rule = (
        "given"
        if request.threshold is not None
        else f"false match rate {_DECISION_FMR:g} over {pairs:,} impostor pairs"
    )
    shown = "none" if model.threshold is None else f"{model.threshold:.4f} ({rule})"
    for name, value in (
        ("model", f"{display_name(request.out)} ({model.name})"),
        *split.items(),
        ("faces", f"{people} people, one picture each"),
        ("threshold", shown),
    ):
        click.echo(f"{name:<10} {value}")
