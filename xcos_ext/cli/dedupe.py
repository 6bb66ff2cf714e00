"""``xcos dedupe``: faces of a gallery that look like the same person."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict

import click

from . import options
from .console import bar, print_json
from .inputs import check_model_path, load, open_gallery, write_text

_NAMED = 20  # groups shown on the terminal; all are in the JSON


@click.command("dedupe")
@options.gallery
@options.model
@options.device
@click.option(
    "--threshold", type=options.finite, metavar="T", help="Pairs that score T or more; by default the model's."
)
@click.option("--out", metavar="CSV", type=options.written(".csv"), help="Write the pairs.")
@options.quiet
@options.as_json
def run(
    gallery: str,
    model: str | None,
    device: str,
    threshold: float | None,
    out: str | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Find faces of GALLERY that look like the same person: every pair is scored."""
    path = check_model_path(model)
    loaded = load(path, device)
    with open_gallery(gallery, loaded) as opened, bar("comparing", "pairs", quiet=quiet or as_json) as tick:
        result = opened.dedupe(threshold, progress=tick)
        faces = len(opened)
    if out is not None:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["id_a", "id_b", "person_a", "person_b", "score"])
        writer.writerows([*pair.ids, *pair.persons, repr(pair.score)] for pair in result.pairs)
        write_text(out, text.getvalue())
    if as_json:
        print_json(
            {
                "faces": faces,
                "compared": result.compared,
                "threshold": result.threshold,
                "pairs": [asdict(pair) for pair in result.pairs],
                "groups": result.groups,
            }
        )
        return 0
    for group in result.groups[:_NAMED]:
        click.echo(f"{len(group)} alike: {', '.join(repr(i) for i in group[:6])}{', ...' if len(group) > 6 else ''}")
    if len(result.groups) > _NAMED:
        click.echo(f"... and {len(result.groups) - _NAMED:,} more groups (--json or --out lists them)")
    across = [p for p in result.pairs if None not in p.persons and p.persons[0] != p.persons[1]]
    click.echo(
        f"{len(result.pairs):,} of {result.compared:,} pairs score {result.threshold:.4f} or more, "
        f"{len(across):,} of them across persons; {len(result.groups):,} groups"
    )
    return 0
