"""``xcos explain``: one decision taken apart, in words, as a page and as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.text import display_name, number, percent, signed

from . import options
from .console import echo, note, print_json, print_rows
from .inputs import write_text
from .verify import compare, draw, status

if TYPE_CHECKING:
    from xcos_ext.explain import Explanation


@options.command("explain")
@options.pair
@click.option(
    "--html",
    metavar="FILE",
    type=options.Written(".html", ".htm"),
    help="Write a page: hover a cell to see what it did.",
)
@options.figure("--figure", "the decision")
@options.as_json
def run(html: str | None, figure: str | None, as_json: bool, **pair: Any) -> int:
    """Why does the model say what it says about the faces of A and B?

    Exit status as verify's; 2 also where the model has no threshold and so there is no verdict.
    """
    explanation = compare(**pair, needs_threshold=False)
    if html is not None:
        write_text(html, explanation.to_html())
    draw(explanation, figure)
    if as_json:
        print_json(explanation.as_dict())
    else:
        for line in (*str(explanation).splitlines(), "", *_table(explanation), ""):
            echo(line)
        files = [(kind, display_name(path)) for kind, path in (("page", html), ("picture", figure)) if path is not None]
        print_rows(("model", explanation.as_dict()["model"]["name"]), *files)
    if explanation.same is None:
        note("no verdict: the model knows no decision threshold; give --threshold, or make a model that has one")
    return status(explanation)


def _table(explanation: Explanation) -> list[str]:
    """The parts of the face as lines of text."""
    meaning = "contribution" if explanation.threshold is not None else "W S"
    lines = [f"{'part':<12} {'mean S':>7} {'attention':>10} {meaning:>13}"]
    for region in explanation.regions:
        numbers = f"{number(region.similarity, 2):>7} {percent(region.share):>10} {signed(region.contribution):>13}"
        lines.append(f"{region.name:<12} {numbers}  {region.word}")
    return lines
