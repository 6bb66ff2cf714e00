"""``xcos dedupe``: faces of a gallery that look like the same person."""

from __future__ import annotations

from dataclasses import asdict

import click

from xcos_ext.io.tables import csv_text
from xcos_ext.io.text import counted, few

from . import options
from .console import bar, echo, echo_some, print_json
from .inputs import check_model_path, load, open_gallery, write_text


@options.command("dedupe")
@options.gallery
@options.model
@options.device
@click.option(
    "--threshold", type=options.finite, metavar="T", help="Pairs that score T or more; by default the model's."
)
@click.option("--out", metavar="CSV", type=options.Written(".csv"), help="Write the pairs.")
@options.quiet
@options.as_json
def run(
    gallery: str, model: str | None, device: str, threshold: float | None, out: str | None, quiet: bool, as_json: bool
) -> int:
    """Find faces of GALLERY that look like the same person: every pair is scored."""
    loaded = load(check_model_path(model), device)
    with open_gallery(gallery, loaded) as opened, bar("comparing", "pairs") as tick:
        result = opened.dedupe(threshold, progress=tick)
        faces = len(opened)
    if out is not None:
        rows = ([*pair.ids, *pair.persons, pair.score] for pair in result.pairs)
        write_text(out, csv_text(["id_a", "id_b", "person_a", "person_b", "score"], rows))
    if as_json:
        data = {name: getattr(result, name) for name in ("compared", "threshold", "groups")}
        print_json({"faces": faces, "pairs": [asdict(pair) for pair in result.pairs], **data})
        return 0
    groups = [f"{len(group)} alike: {few(map(repr, group), 6)}" for group in result.groups]
    echo_some(groups, "groups (--json or --out lists them)")
    across = [p for p in result.pairs if None not in p.persons and p.persons[0] != p.persons[1]]
    if quiet:
        return 0
    echo(
        f"{len(result.pairs):,} of {result.compared:,} pairs score {result.threshold:.4f} or more, "
        f"{len(across):,} of them across persons; {counted(len(result.groups), 'group')}"
    )
    return 0
