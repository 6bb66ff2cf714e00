"""``xcos verify``: two pictures, one verdict, and what it is made of."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import DeviceError, ModelError, XCosError

from .console import DIFFERENT, SAME, TROUBLE, note, notes_for_warnings, print_json, quiet_opencv

if TYPE_CHECKING:
    import numpy as np
    import torch

    from xcos_ext.card.calibration import FMRCurve
    from xcos_ext.deploy import OnnxModel
    from xcos_ext.explain import Explanation
    from xcos_ext.faces import AlignedFace
    from xcos_ext.model import XCosModel

__all__ = [
    "FaceOptions",
    "PairRequest",
    "Request",
    "check_model_path",
    "chosen_device",
    "compare",
    "load",
    "load_either",
    "run",
    "status",
]


@dataclass(frozen=True, kw_only=True)
class FaceOptions:
    """Options of the commands that take one face of each picture."""

    model: str | None = None
    detector: str = "cascade"
    aligned: bool = False
    policy: str = "prominent"
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class PairRequest(FaceOptions):
    """Options of the commands that compare two pictures."""

    a: str
    b: str
    threshold: float | None = None
    max_pixels: int | None = None
    as_json: bool = False


@dataclass(frozen=True, kw_only=True)
class Request(PairRequest):
    """The command line's options."""

    out: str | None = None


def check_model_path(path: str | None) -> str:
    """A weights file that is there, before torch is imported for it: one that is named, a shipped model's, the default.

    Raises:
        ModelError: it is not a readable regular file.
    """
    from xcos_ext.faces.pictures import display_name
    from xcos_ext.io.shipped import weights_file

    path = str(weights_file(path or None))
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{display_name(path)}: the model cannot be read ({reason})") from error
    if not regular:
        raise ModelError(f"{display_name(path)}: expected a weights file, got something that is not a regular file")
    return path


def is_graph(path: str) -> bool:
    """Whether a model's file is called an ONNX graph."""
    return path.lower().endswith(".onnx")


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names, tried; warnings are turned into notes.

    Raises:
        DeviceError: it cannot be used.
    """
    from xcos_ext.devices import choose_device

    try:
        with notes_for_warnings():
            return choose_device(name)
    except DeviceError as error:
        raise DeviceError(f"--{error}") from error  # the argument is an option here


def load_either(path: str, device: str) -> XCosModel | OnnxModel:
    """Load a model in torch, or a pair graph, for which torch is not imported, where ``--device`` says.

    Raises:
        DeviceError: the device cannot be used.
        ModelError: a file that cannot be used, or a graph of another kind.
    """
    if not is_graph(path):
        place = chosen_device(device)
        return load(path).to(place)
    from xcos_ext.faces import display_name

    graph = _graph(path, device)
    if graph.kind != "pair":
        raise ModelError(
            f"{display_name(path)}: expected a graph of kind 'pair' (xcos export onnx --kind pair), got {graph.kind!r}"
        )
    return graph


def _graph(path: str, device: str) -> OnnxModel:
    from xcos_ext.deploy import OnnxModel
    from xcos_ext.onnx.session import CPU, providers_on

    try:
        providers = providers_on(device)
    except DeviceError as error:
        raise DeviceError(f"--{error}") from error
    if providers == list(CPU):
        return OnnxModel(path)
    try:
        return OnnxModel(path, providers=providers)
    except ModelError as error:
        if device != "auto":
            raise DeviceError(f"--device: expected a GPU that can be used, got {device!r}: {error}") from error
        graph = OnnxModel(path)  # a file that is wrong is said here
        note(f"the GPU is not used, the CPU computes: {error}")
        return graph


def load(path: str) -> XCosModel:
    """Load a model, its warnings turned into notes.

    Loading is thousands of tiny operations. On one thread they take half a second; on several, each waits for
    the slowest, and on a busy machine that was seen to take half a minute.
    """
    import torch

    from xcos_ext.model import load_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with notes_for_warnings():
            return load_model(path)
    finally:
        torch.set_num_threads(threads)


def compare(request: PairRequest, *, needs_threshold: bool = True) -> Explanation:
    """Read both pictures, find the faces, score them.

    Args:
        request: what to compare.
        needs_threshold: whether a model without a threshold is an error.

    Raises:
        XCosError: anything wrong with the pictures or the model.
    """
    # Cheap checks first: a typing error should not cost the seconds that loading torch and a network takes.
    quiet_opencv()
    from xcos_ext.faces import MAX_PIXELS, create_detector, display_name, extract_face, read_picture

    model_path = check_model_path(request.model)
    max_pixels = request.max_pixels or MAX_PIXELS
    pictures = [read_picture(path, max_pixels=max_pixels) for path in (request.a, request.b)]
    detector = None if request.aligned else create_detector(request.detector)

    model = load_either(model_path, request.device)
    if needs_threshold and model.threshold is None and request.threshold is None:
        raise XCosError(
            f"{display_name(model_path)}: the model knows no decision threshold; give --threshold, or make a model "
            "that has one with xcos plug"
        )
    faces = []
    for path, rgb in zip((request.a, request.b), pictures, strict=True):
        size = model.preprocessing.size
        face = extract_face(rgb, detector, name=display_name(path), policy=request.policy, size=size)
        if face.found > 1:
            note(f"{face.name}: {face.found} faces found, took the {_PLAIN[request.policy]} (see --face)")
        faces.append(face)

    from xcos_ext.explain import explain

    a, b = faces
    try:
        return explain(
            model,
            a.rgb,
            b.rgb,
            threshold=request.threshold,
            names=(a.name, b.name),
            landmarks_a=_landmarks_in_crop(a),
            landmarks_b=_landmarks_in_crop(b),
            details=(_described(a), _described(b)),
            file=display_name(model_path),
        )
    except ValueError as error:
        raise XCosError(f"{display_name(model_path)}: the model gave an unusable result ({error})") from error


def status(explanation: Explanation) -> int:
    """Exit status of a verdict: 0 the same person, 1 different people, 2 none."""
    return {True: SAME, False: DIFFERENT, None: TROUBLE}[explanation.same]


def run(request: Request) -> int:
    """Verify, print, draw.

    Returns:
        0 for the same person, 1 for different people.

    Raises:
        XCosError: anything wrong with the pictures, the model or the output.
    """
    if request.out is not None:
        from xcos_ext.explain import check_figure_path
        from xcos_ext.io.optional import need

        check_figure_path(request.out)
        need("matplotlib", "drawing")
    explanation = compare(request)
    if request.out is not None:
        from xcos_ext.explain import save_figure

        save_figure(explanation.figure(), request.out)
    if request.as_json:
        data = explanation.as_dict()
        print_json({key: data[key] for key in _KEYS})
    else:
        for name, value in (
            ("score", f"{explanation.score:.4f}"),
            ("threshold", f"{explanation.threshold:.4f}"),
            ("verdict", explanation.verdict),
        ):
            click.echo(f"{name:<10} {value}")
        if explanation.fmr is not None and explanation.curve is not None:
            sample = _sample(explanation.curve)
            click.echo(f"{'meaning':<10} false match rate at this score {explanation.fmr} ({sample})")
        click.echo(f"{'model':<10} {explanation.model.name}")
        if request.out is not None:
            from xcos_ext.faces import display_name

            click.echo(f"{'picture':<10} {display_name(request.out)}")
    return status(explanation)


#: What ``--json`` prints of an explanation; ``xcos explain --json`` prints all of it.
_KEYS = ("score", "threshold", "same", "fmr", "similarity", "attention", "contribution", "model", "a", "b")

_PLAIN = {"prominent": "most prominent", "largest": "largest", "centre": "most central", "only": "only one"}


def _sample(curve: FMRCurve) -> str:
    people = "" if curve.people is None else f" of {curve.people:,} people"
    return f"{curve.pairs:,} impostor pairs{people}"


def _described(face: AlignedFace) -> dict[str, Any]:
    data: dict[str, Any] = {"faces": face.found}
    if face.face is not None:
        data["box"] = list(face.face.box)
        if face.face.landmarks is not None:
            data["landmarks"] = face.face.landmarks.tolist()
        data["detection_score"] = face.face.score
    return data


def _landmarks_in_crop(face: AlignedFace) -> np.ndarray | None:
    """Where the points that the face was cut out by lie in the crop."""
    from xcos_ext.faces import apply_transform, similarity_transform, template_for

    if face.face is None or face.face.landmarks is None:
        return None
    size = (int(face.rgb.shape[0]), int(face.rgb.shape[1]))
    return apply_transform(similarity_transform(face.face.landmarks, template_for(size)), face.face.landmarks)
