"""``xcos explain``: one decision taken apart, in words, as a page and as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import options
from .console import note, print_json, print_rows
from .inputs import write_text
from .verify import compare, status

if TYPE_CHECKING:
    from xcos_ext.explain import Explanation


@click.command("explain")
@options.pair
@click.option(
    "--html",
    metavar="FILE",
    type=options.written(".html", ".htm"),
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
    if figure is not None:
        from xcos_ext.explain import save_figure

        save_figure(explanation.figure(), figure)
    if as_json:
        print_json(explanation.as_dict())
    else:
        from xcos_ext.faces import display_name

        click.echo("\n".join((str(explanation), "", *_table(explanation), "")))
        files = (("page", html), ("picture", figure))
        print_rows(
            [
                ("model", explanation.as_dict()["model"]["name"]),
                *((kind, display_name(path)) for kind, path in files if path is not None),
            ]
        )
    if explanation.same is None:
        note("no verdict: the model knows no decision threshold; give --threshold, or make a model that has one")
    return status(explanation)


def _table(explanation: Explanation) -> list[str]:
    """The parts of the face as lines of text."""
    from xcos_ext.io.text import percent, signed

    meaning = "contribution" if explanation.threshold is not None else "W S"
    lines = [f"{'part':<12} {'mean S':>7} {'attention':>10} {meaning:>13}"]
    for region in explanation.regions:
        similarity = signed(region.similarity, 2).lstrip("+")
        numbers = f"{similarity:>7} {percent(region.share):>10} {signed(region.contribution):>13}"
        lines.append(f"{region.name:<12} {numbers}  {region.word}")
    return lines
