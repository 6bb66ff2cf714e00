"""``xcos verify``: two pictures, one verdict, and what it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xcos_ext.io.errors import XCosError
from xcos_ext.io.text import display_name

from . import options
from .console import DIFFERENT, SAME, TROUBLE, note, note_faces, print_json, print_rows
from .inputs import check_model_path, load_either

if TYPE_CHECKING:
    import numpy as np

    from xcos_ext.explain import Explanation
    from xcos_ext.faces import AlignedFace

#: What ``--json`` prints of an explanation; ``xcos explain --json`` prints all of it.
_KEYS = ("score", "threshold", "same", "fmr", "identical", "similarity", "attention", "contribution", "model", "a", "b")


@options.command("verify")
@options.pair
@options.figure("--out", "the decision")
@options.as_json
def run(out: str | None, as_json: bool, **pair: Any) -> int:
    """Are the faces of pictures A and B the same person's?"""
    explanation = compare(**pair)
    if explanation.identical is not None:
        from xcos_ext.explain.explanation import IDENTICAL

        note(IDENTICAL[explanation.identical])
    draw(explanation, out)
    if as_json:
        data = explanation.as_dict()
        print_json({key: data[key] for key in _KEYS})
        return status(explanation)
    score, threshold = explanation.printed
    rows = [("score", score), ("threshold", threshold), ("verdict", explanation.verdict)]
    if 0 in (explanation.a.details["faces"], explanation.b.details["faces"]):
        rows.append(("meaning", "none: a false match rate is one of faces"))
    elif explanation.identical is not None:
        rows.append(("meaning", "none: a false match rate is one of different pictures"))
    elif explanation.fmr is not None and explanation.curve is not None:
        rows.append(("meaning", f"false match rate at this score {explanation.fmr} ({explanation.curve.sample})"))
    rows.append(("model", explanation.model.name))
    if out is not None:
        rows.append(("picture", display_name(out)))
    print_rows(*rows)
    return status(explanation)


def compare(
    a: str,
    b: str,
    *,
    model: str | None,
    detector: str,
    aligned: bool,
    policy: str,
    strict: bool,
    device: str,
    threshold: float | None,
    max_pixels: int | None,
    needs_threshold: bool = True,
) -> Explanation:
    """Read both pictures, find the faces, score them; arguments are those of :data:`options.pair`.

    Raises:
        XCosError: anything wrong with the pictures or the model; ``needs_threshold`` and there is none.
    """
    # Cheap checks first: a typing error should not cost the seconds that loading torch and a network takes.
    from xcos_ext.faces import MAX_PIXELS, create_detector, extract_face, read_picture

    path = check_model_path(model)
    pictures = [(display_name(name), read_picture(name, max_pixels=max_pixels or MAX_PIXELS)) for name in (a, b)]
    finder = None if aligned else create_detector(detector)
    loaded = load_either(path, device)
    if needs_threshold and loaded.threshold is None and threshold is None:
        raise XCosError(
            f"{display_name(path)}: the model knows no decision threshold; give --threshold, or make a model "
            "that has one with xcos plug"
        )
    size = loaded.preprocessing.size
    first, second = (
        extract_face(rgb, finder, name=name, policy=policy, size=size, strict=strict) for name, rgb in pictures
    )
    from xcos_ext.explain import explain

    try:
        explanation = explain(
            loaded,
            first.rgb,
            second.rgb,
            threshold=threshold,
            names=(first.name, second.name),
            landmarks_a=_landmarks_in_crop(first),
            landmarks_b=_landmarks_in_crop(second),
            details=(_described(first), _described(second)),
            file=display_name(path),
        )
    except ValueError as error:
        raise XCosError(f"{display_name(path)}: the model gave an unusable result ({error})") from error
    note_faces({face.name: face.found for face in (first, second)}, policy)
    return explanation


def draw(explanation: Explanation, path: str | None) -> None:
    """Draw the decision, if that was asked for."""
    if path is not None:
        from xcos_ext.explain import save_figure

        save_figure(explanation.figure(), path)


def status(explanation: Explanation) -> int:
    """Exit status of a verdict: 0 the same person, 1 different people, 2 none."""
    return {True: SAME, False: DIFFERENT, None: TROUBLE}[explanation.same]


def _described(face: AlignedFace) -> dict[str, Any]:
    data: dict[str, Any] = {"faces": face.found}
    if face.likelihood is not None:
        data["face_likelihood"] = face.likelihood
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
    height, width, _ = face.rgb.shape
    return apply_transform(
        similarity_transform(face.face.landmarks, template_for((height, width))), face.face.landmarks
    )
