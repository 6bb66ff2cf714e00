"""``xcos verify``: two pictures, one verdict, and what it is made of."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.errors import ModelError, XCosError

from .console import DIFFERENT, SAME, note, notes_for_warnings, print_json, quiet_opencv

if TYPE_CHECKING:
    from xcos_ext.nn import FMRCurve, XCosModel

__all__ = ["FaceOptions", "Request", "check_model_path", "load", "run"]


@dataclass(frozen=True, kw_only=True)
class FaceOptions:
    """Options of the commands that take one face of each picture."""

    model: str | None = None
    detector: str = "cascade"
    aligned: bool = False
    policy: str = "prominent"


@dataclass(frozen=True, kw_only=True)
class Request(FaceOptions):
    """The command line's options."""

    a: str
    b: str
    threshold: float | None = None
    max_pixels: int | None = None
    out: str | None = None
    as_json: bool = False


def check_model_path(path: str | None) -> str:
    """A weights file that is there, before torch is imported for it; without a name, the shipped one.

    Raises:
        ModelError: it is not a readable regular file.
    """
    from xcos_ext.faces.pictures import display_name
    from xcos_ext.shipped import default_weights

    if not path:
        return str(default_weights())
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{display_name(path)}: the model cannot be read ({reason})") from error
    if not regular:
        raise ModelError(f"{display_name(path)}: expected a weights file, got something that is not a regular file")
    return path


def load(path: str) -> XCosModel:
    """Load a model, its warnings turned into notes.

    Loading is thousands of tiny operations. On one thread they take half a second; on several, each waits for
    the slowest, and on a busy machine that was seen to take half a minute.
    """
    import torch

    from xcos_ext.nn import load_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with notes_for_warnings():
            return load_model(path)
    finally:
        torch.set_num_threads(threads)


def run(request: Request) -> int:
    """Verify, print, draw.

    Returns:
        0 for the same person, 1 for different people.

    Raises:
        XCosError: anything wrong with the pictures, the model or the output.
    """
    # Cheap checks first: a typing error should not cost the seconds that loading torch and a network takes.
    quiet_opencv()
    from xcos_ext.faces import MAX_PIXELS, create_detector, display_name, extract_face, read_picture

    if request.out is not None:
        from xcos_ext.explain import check_figure_path
        from xcos_ext.faces import need

        check_figure_path(request.out)
        need("matplotlib", "drawing")
    model_path = check_model_path(request.model)
    max_pixels = request.max_pixels or MAX_PIXELS
    pictures = [read_picture(path, max_pixels=max_pixels) for path in (request.a, request.b)]
    detector = None if request.aligned else create_detector(request.detector)

    model = load(model_path)
    threshold = model.threshold if request.threshold is None else request.threshold
    if threshold is None:
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
    import torch

    with torch.inference_mode():
        features = model.features(model.preprocessing([face.rgb for face in faces]))
        result = model.score(features[:1], features[1:], return_maps=True)

    from xcos_ext.explain.decision import contribution, one_pair

    try:
        maps = one_pair(result)
    except ValueError as error:
        raise XCosError(f"{display_name(model_path)}: the model gave an unusable result ({error})") from error
    parts = contribution(maps.similarity, maps.attention, threshold)
    same = maps.score >= threshold
    curve = model.fmr_curve
    fmr = None if curve is None else curve.at(maps.score)
    if request.out is not None:
        from xcos_ext.explain import save_figure, verification_figure

        names = (os.path.basename(faces[0].name), os.path.basename(faces[1].name))
        save_figure(
            verification_figure(
                faces[0].rgb,
                faces[1].rgb,
                result,
                threshold,
                names=names,
                note=model.name,
                meaning="" if fmr is None else f"false match rate at this score {fmr}",
            ),
            request.out,
        )
    if request.as_json:
        data: dict[str, Any] = {
            "score": maps.score,
            "threshold": threshold,
            "same": same,
            "fmr": None
            if fmr is None or curve is None
            else fmr._asdict()
            | {"smallest_resolved": curve.smallest, "impostor_pairs": curve.pairs, "people": curve.people},
            "similarity": maps.similarity.tolist(),
            "attention": maps.attention.tolist(),
            "contribution": parts.tolist(),
            "model": {
                "name": model.name,
                "file": display_name(model_path),
                "fingerprint": model.fingerprint(),
            },
            "a": _described(faces[0]),
            "b": _described(faces[1]),
        }
        print_json(data)
    else:
        for name, value in (
            ("score", f"{maps.score:.4f}"),
            ("threshold", f"{threshold:.4f}"),
            ("verdict", "same person" if same else "different people"),
        ):
            click.echo(f"{name:<10} {value}")
        if fmr is not None and curve is not None:
            click.echo(f"{'meaning':<10} false match rate at this score {fmr} ({_sample(curve)})")
        click.echo(f"{'model':<10} {model.name}")
        if request.out is not None:
            click.echo(f"{'picture':<10} {display_name(request.out)}")
    return SAME if same else DIFFERENT


_PLAIN = {"prominent": "most prominent", "largest": "largest", "centre": "most central", "only": "only one"}


def _sample(curve: FMRCurve) -> str:
    people = "" if curve.people is None else f" of {curve.people:,} people"
    return f"{curve.pairs:,} impostor pairs{people}"


def _described(face: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"picture": face.name, "faces": face.found}
    if face.face is not None:
        data["box"] = list(face.face.box)
        data["landmarks"] = face.face.landmarks.tolist()
        data["detection_score"] = face.face.score
    return data
