"""``xcos report``: a list of pairs on one page."""

from __future__ import annotations

import os
from typing import Any

import click

from xcos_ext.io.text import byte_size, counted, display_name

from . import options
from .console import TROUBLE, bar, note, print_json, print_rows
from .inputs import check_model_path, described, load


@options.command("report")
@click.argument("pairs", type=click.Path(), metavar="PAIRS.csv")
@click.option("--html", required=True, metavar="FILE", type=options.Written(".html", ".htm"), help="The page to write.")
@click.option(
    "--root",
    metavar="DIR|ZIP",
    type=click.Path(),
    help="Where the pictures' paths start.  [default: the folder of PAIRS.csv]",
)
@click.option("--title", metavar="TEXT", help="Of the page.  [default: the list's name]")
@options.faces
@options.threshold
@options.max_pixels
@options.threads
@options.quiet
@options.as_json
def run(
    pairs: str,
    html: str,
    root: str | None,
    title: str | None,
    model: str | None,
    detector: str,
    aligned: bool,
    device: str,
    max_pixels: int | None,
    quiet: bool,
    as_json: bool,
    **how: Any,
) -> int:
    """Compare the pairs of a list and write them on one page, to be sorted by score and by cell.

    PAIRS.csv has a header and the columns a, b, optionally genuine (1 or 0), and any others, which are shown. Pairs
    whose pictures have no face are listed with the reason.
    """
    from xcos_ext.explain.pairs_file import PairsFile, pictures_below
    from xcos_ext.explain.pairs_report import write_report
    from xcos_ext.faces import detector_maker
    from xcos_ext.io.atomic import check_apart
    from xcos_ext.io.optional import need

    need("PIL.Image", "a page with pictures")
    path = check_model_path(model)
    listed = PairsFile(pairs)
    base = os.path.dirname(os.path.abspath(pairs)) if root is None else root
    read = pictures_below(base, max_pixels=max_pixels)
    files = (name for pair in listed for name in (pair.a, pair.b))
    check_apart({"--html": html}, ((f"the picture {display_name(file)}", os.path.join(base, file)) for file in files))
    maker = detector_maker("aligned" if aligned else detector)
    loaded = load(path, device)
    with bar("comparing", "pairs") as tick:
        summary = write_report(
            html,
            loaded,
            listed,
            read,
            detector=maker,
            title=title or os.path.splitext(os.path.basename(pairs))[0],
            label_names=listed.label_names,
            file=display_name(path),
            progress=tick,
            **how,
        )
    page = display_name(html)
    if as_json:
        print_json({**summary.as_dict(), "page": page, "model": described(loaded, path)})
    elif not quiet:
        rate = summary.pairs / summary.seconds if summary.seconds > 0 else 0.0
        rows = [("pairs", f"{summary.pairs:,} ({summary.compared:,} compared, {summary.failed:,} not)")]
        if summary.threshold is None:
            rows.append(("verdicts", "none: the model knows no decision threshold (see --threshold)"))
        else:
            verdicts = f"{summary.same:,} same person, {summary.different:,} different people"
            rows.append(("verdicts", f"{verdicts} at threshold {summary.threshold:.4f}"))
            if summary.impostor:
                rows.append(("", f"{summary.false_matches:,} of {summary.impostor:,} impostor pairs match"))
            if summary.genuine:
                rows.append(("", f"{summary.false_non_matches:,} of {summary.genuine:,} genuine pairs do not match"))
        rows.append(("time", f"{summary.seconds:.1f} s, {rate:,.0f} pairs/s, {counted(summary.pictures, 'picture')}"))
        rows.append(("page", f"{page} ({byte_size(summary.bytes)})"))
        print_rows(*rows)
    if summary.without_face:
        note(f"pictures that could not be used: {summary.without_face:,}; their pairs are on the page with the reason")
    if summary.several_faces:
        note(f"pictures with several faces: {summary.several_faces:,}; took the {how['policy']} one (see --face)")
    if summary.not_like_a_face:
        note(f"pictures that do not look like a face: {summary.not_like_a_face:,}; their pairs are marked on the page")
    if summary.identical:
        note(f"pairs of identical pictures: {summary.identical:,}; their scores say nothing about the person")
    if not summary.compared:
        note("not one pair could be compared")
        return TROUBLE
    return 0
