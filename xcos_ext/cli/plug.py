"""``xcos plug``: an explainable model from a recogniser and a folder of faces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from xcos_ext.errors import PictureError, XCosError

from .console import note, notes_for_warnings, print_json, progress
from .verify import check_model_path

__all__ = ["Request", "run"]

_LEAST_PEOPLE = 20
_DECISION_FMR = 5e-3
_FMRS = (1e-1, 1e-2, 1e-3)
_EXPECTED_MATCHES = 30  # impostor pairs times rate, for a threshold at that rate to mean something


@dataclass(frozen=True)
class Request:
    """The command line's options."""

    weights: str
    faces: str
    out: str
    project: int | None = None
    threshold: float | None = None
    limit: int = 1000
    as_json: bool = False


def _chosen(people: tuple[str, ...], limit: int) -> list[str]:
    """At most ``limit`` people, spread evenly over the sorted names."""
    count = min(limit, len(people))
    return [people[i * len(people) // count] for i in range(count)]


def run(request: Request) -> int:
    """Compute statistics, plug, calibrate, write.

    Raises:
        XCosError: anything wrong with the weights, the faces or the output.
    """
    from xcos_ext.explain.files import check_output
    from xcos_ext.faces import display_name

    check_output(request.out, (".safetensors",))
    weights = check_model_path(request.weights)
    from xcos_ext.datasets import PersonFolder

    try:
        folder = PersonFolder(request.faces)
    except (OSError, ValueError) as error:
        raise PictureError(str(error)) from error
    people = _chosen(folder.people, request.limit)
    if len(people) < _LEAST_PEOPLE:
        raise PictureError(
            f"{display_name(request.faces)}: expected pictures of at least {_LEAST_PEOPLE} people (some hundred are "
            f"better), <person>/<picture>, got {len(people)}"
        )
    import torch

    from xcos_ext.nn import load_recogniser, plug, save_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # see verify.load
    try:
        with notes_for_warnings():
            recogniser = load_recogniser(weights)
    finally:
        torch.set_num_threads(threads)
    size = recogniser.preprocessing.size

    def aligned(person: str) -> Any:
        key = folder.of(person)[0]
        rgb = folder.read(key)
        if rgb.shape[:2] != size:
            raise PictureError(
                f"{display_name(request.faces)}: {key}: expected an aligned crop of {size[1]} x {size[0]} pixels, got "
                f"{rgb.shape[1]} x {rgb.shape[0]}"
            )
        return rgb

    with torch.no_grad():
        faces = [aligned(person) for person in progress(people, len(people), "reading")]
        try:
            model = plug(recogniser, faces, project=request.project, threshold=request.threshold)
        except ValueError as error:
            if isinstance(error, XCosError):
                raise
            raise XCosError(str(error)) from error
        pairs = len(people) * (len(people) - 1) // 2
        rates = [rate for rate in _FMRS if rate * pairs >= _EXPECTED_MATCHES]
        if _DECISION_FMR * pairs >= _EXPECTED_MATCHES:
            from xcos_ext.evaluation import calibrate

            batches = range(0, len(faces), 32)
            features = torch.cat(
                [
                    model.features(model.preprocessing(faces[first : first + 32]))
                    for first in progress(batches, len(batches), "calibrating")
                ]
            )
            model.set_calibration(calibrate(model, features, people, decision_fmr=_DECISION_FMR, fmrs=rates))
            if request.threshold is not None:
                model.threshold = request.threshold
        elif request.threshold is None:
            note(
                f"{len(people)} people are too few to find a threshold at a false match rate of {_DECISION_FMR:g} "
                "(110 are enough); verify will need --threshold"
            )
    save_model(model, request.out)
    if request.as_json:
        print_json(
            {
                "model": {"name": model.name, "file": display_name(request.out), "fingerprint": model.fingerprint()},
                "people": len(people),
                "impostor_pairs": pairs,
                "threshold": model.threshold,
                "decision_fmr": _DECISION_FMR if request.threshold is None and model.threshold is not None else None,
                "fmr_thresholds": {f"{rate:g}": t for rate, t in sorted(model.fmr_thresholds.items())},
            }
        )
        return 0
    rule = (
        "given"
        if request.threshold is not None
        else f"false match rate {_DECISION_FMR:g} over {pairs:,} impostor pairs"
    )
    shown = "none" if model.threshold is None else f"{model.threshold:.4f} ({rule})"
    for name, value in (
        ("model", f"{display_name(request.out)} ({model.name})"),
        ("faces", f"{len(people)} people, one picture each"),
        ("threshold", shown),
    ):
        click.echo(f"{name:<10} {value}")
    return 0
