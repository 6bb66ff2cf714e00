"""``xcos models``: recognisers and detectors by name."""

from __future__ import annotations

import click

from xcos_ext.io.models import REGISTRY, entry_named, fetch
from xcos_ext.io.text import byte_size, display_name

from . import options
from .console import echo, print_json, print_rows


@options.command("list")
@options.as_json
def list_models(as_json: bool) -> int:
    """What --model and --detector know by name, whose it is, and whether it is here."""
    entries = list(REGISTRY.values())
    if as_json:
        fields = ("name", "kind", "about", "file", "sha256", "size", "licence", "commercial", "urls")
        print_json([{f: getattr(e, f) for f in fields} | {"here": e.here(), "path": str(e.path())} for e in entries])
        return 0
    rows = [("", "name", "kind", "size", "licence", "what")]
    for entry in entries:
        size = byte_size(entry.size or entry.path().stat().st_size)
        licence = entry.licence if entry.commercial else f"{entry.licence}, not commercial"
        rows.append(("*" if entry.here() else "", entry.name, entry.kind, size, licence, entry.about))
    print_rows(*rows, width=1, gap=2)
    echo("* on this machine; the others are fetched on first use")
    return 0


@options.command("fetch")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--accept-license", "accepted", is_flag=True, help="Of a file whose licence does not allow every use.")
def fetch_models(names: tuple[str, ...], accepted: bool) -> int:
    """Fetch the files of names now, e.g. for a machine without a network: its cache folder is XCOS_CACHE."""
    entries = [entry_named(name) for name in names]
    for entry in entries:
        echo(display_name(fetch(entry, accept_licence=accepted)))
    return 0


@options.command("path")
@click.argument("name")
def path_of_model(name: str) -> int:
    """Where the file of a name is, or would be once it is fetched."""
    echo(display_name(entry_named(name).path()))
    return 0
