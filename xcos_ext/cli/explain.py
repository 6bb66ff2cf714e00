"""``xcos explain``: one decision taken apart, in words, as a page and as a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import click

from .console import note, print_json
from .verify import PairRequest, compare, status

if TYPE_CHECKING:
    from xcos_ext.explain import Explanation

__all__ = ["Request", "run"]


@dataclass(frozen=True, kw_only=True)
class Request(PairRequest):
    """The command line's options."""

    html: str | None = None
    figure: str | None = None


def run(request: Request) -> int:
    """Compare, explain, write.

    Returns:
        0 for the same person, 1 for different people, 2 without a verdict (no threshold); what was asked for is
        written in any case.

    Raises:
        XCosError: anything wrong with the pictures, the model or the outputs.
    """
    from xcos_ext.faces import display_name
    from xcos_ext.io.atomic import check_output, write_atomically
    from xcos_ext.io.optional import need

    if request.html is not None:
        check_output(request.html, (".html", ".htm"))
    if request.figure is not None:
        from xcos_ext.explain import check_figure_path

        check_figure_path(request.figure)
        need("matplotlib", "drawing")
    explanation = compare(request, needs_threshold=False)
    if request.html is not None:
        page = explanation.to_html().encode("utf-8")

        def write(file: BinaryIO) -> None:
            file.write(page)

        write_atomically(request.html, write)
    if request.figure is not None:
        from xcos_ext.explain import save_figure

        save_figure(explanation.figure(), request.figure)
    if request.as_json:
        print_json(explanation.as_dict())
    else:
        click.echo(str(explanation))
        click.echo()
        for line in table(explanation):
            click.echo(line)
        click.echo()
        click.echo(f"{'model':<10} {explanation.as_dict()['model']['name']}")
        for kind, path in (("page", request.html), ("picture", request.figure)):
            if path is not None:
                click.echo(f"{kind:<10} {display_name(path)}")
    if explanation.same is None:
        note("no verdict: the model knows no decision threshold; give --threshold, or make a model that has one")
    return status(explanation)


def table(explanation: Explanation) -> list[str]:
    """The parts of the face as lines of text."""
    from xcos_ext.io.text import percent, signed

    meaning = "contribution" if explanation.threshold is not None else "W S"
    lines = [f"{'part':<12} {'mean S':>7} {'attention':>10} {meaning:>13}"]
    for region in explanation.regions:
        similarity = signed(region.similarity, 2).lstrip("+")
        numbers = f"{similarity:>7} {percent(region.share):>10} {signed(region.contribution):>13}"
        lines.append(f"{region.name:<12} {numbers}  {region.word}")
    return lines
