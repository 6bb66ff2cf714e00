"""``xcos verify``: two pictures, one verdict, and what it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xcos_ext.io.text import display_name

from . import options
from .console import DIFFERENT, SAME, TROUBLE, note, note_faces, notes_for_warnings, print_json, print_rows

if TYPE_CHECKING:
    from xcos_ext.explain import Explanation

#: What ``--json`` prints of an explanation; ``xcos explain --json`` prints all of it.
_KEYS = (
    "score",
    "threshold",
    "same",
    "fmr",
    "identical",
    "similarity",
    "attention",
    "contribution",
    "model",
    "a",
    "b",
    "doubt",
)


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
    if explanation.doubt is not None:
        rows.append(("caution", explanation.doubt))
    rows.append(("model", explanation.model.name))
    if out is not None:
        rows.append(("picture", display_name(out)))
    print_rows(*rows)
    return status(explanation)


def compare(*, aligned: bool, detector: str, **how: Any) -> Explanation:
    """:func:`xcos_ext.verify`, as the options :data:`options.pair` say it, with notes."""
    from xcos_ext.api import compare

    with notes_for_warnings():
        explanation = compare(detector="aligned" if aligned else detector, **how)
    note_faces({face.name: face.details["faces"] for face in (explanation.a, explanation.b)}, how["policy"])
    return explanation


def draw(explanation: Explanation, path: str | None) -> None:
    """Draw the decision, if that was asked for."""
    if path is not None:
        from xcos_ext.explain import save_figure

        save_figure(explanation.figure(), path)


def status(explanation: Explanation) -> int:
    """Exit status of a verdict: 0 the same person, 1 different people, 2 none."""
    return {True: SAME, False: DIFFERENT, None: TROUBLE}[explanation.same]
