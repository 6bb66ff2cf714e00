"""``xcos report``: a list of pairs on one page."""

from __future__ import annotations

import os
from dataclasses import dataclass

import click

from .console import TROUBLE, bar, note, print_json, quiet_opencv
from .verify import FaceOptions, check_model_path, chosen_device, load

__all__ = ["Request", "run"]


@dataclass(frozen=True, kw_only=True)
class Request(FaceOptions):
    """The command line's options."""

    pairs: str
    html: str
    root: str | None = None
    title: str | None = None
    threshold: float | None = None
    max_pixels: int | None = None
    threads: int = 2
    quiet: bool = False
    as_json: bool = False


def run(request: Request) -> int:
    """Read the list, compare, write the page.

    Returns:
        0, or 2 if not one pair could be compared (the page says why).

    Raises:
        XCosError: anything wrong with the list, the model or the page.
    """
    quiet_opencv()
    from functools import partial

    from xcos_ext.explain.pairs_file import PairsFile, pictures_below
    from xcos_ext.explain.pairs_report import write_report
    from xcos_ext.faces import create_detector, display_name
    from xcos_ext.io.atomic import check_output
    from xcos_ext.io.optional import need

    check_output(request.html, (".html", ".htm"))
    need("PIL.Image", "a page with pictures")
    model_path = check_model_path(request.model)
    pairs = PairsFile(request.pairs)
    root = request.root if request.root is not None else os.path.dirname(os.path.abspath(request.pairs))
    read = pictures_below(root, max_pixels=request.max_pixels)
    detector = None if request.aligned else partial(create_detector, request.detector)
    if detector is not None:
        detector()  # a wrong name is said before torch is loaded
    device = chosen_device(request.device)
    model = load(model_path).to(device)
    with bar("comparing", "pairs", quiet=request.quiet or request.as_json) as tick:
        summary = write_report(
            request.html,
            model,
            pairs,
            read,
            detector=detector,
            policy=request.policy,
            threshold=request.threshold,
            title=request.title or os.path.splitext(os.path.basename(request.pairs))[0],
            label_names=pairs.label_names,
            file=display_name(model_path),
            threads=request.threads,
            progress=tick,
        )
    page = display_name(request.html)
    if request.as_json:
        print_json(
            {
                **summary.as_dict(),
                "page": page,
                "model": {"name": model.name, "file": display_name(model_path), "fingerprint": model.fingerprint()},
            }
        )
    elif not request.quiet:
        rate = summary.pairs / summary.seconds if summary.seconds > 0 else 0.0
        click.echo(f"{'pairs':<10} {summary.pairs:,} ({summary.compared:,} compared, {summary.failed:,} not)")
        if summary.threshold is None:
            click.echo(f"{'verdicts':<10} none: the model knows no decision threshold (see --threshold)")
        else:
            click.echo(
                f"{'verdicts':<10} {summary.same:,} same person, {summary.different:,} different people at threshold "
                f"{summary.threshold:.4f}"
            )
            for count, of, what in (
                (summary.false_matches, summary.impostor, "impostor pairs match"),
                (summary.false_non_matches, summary.genuine, "genuine pairs do not match"),
            ):
                if of:
                    click.echo(f"{'':<10} {count:,} of {of:,} {what}")
        click.echo(f"{'time':<10} {summary.seconds:.1f} s, {rate:,.0f} pairs/s, {summary.pictures:,} pictures")
        click.echo(f"{'page':<10} {page} ({summary.bytes / 1e6:.1f} MB)")
    if summary.without_face:
        note(f"pictures that could not be used: {summary.without_face:,}; their pairs are on the page with the reason")
    if summary.several_faces:
        note(f"pictures with several faces: {summary.several_faces:,}; took the {request.policy} one (see --face)")
    if summary.identical:
        note(f"pairs of identical pictures: {summary.identical:,}; their scores say nothing about the person")
    if not summary.compared:
        note("not one pair could be compared")
        return TROUBLE
    return 0
