"""``xcos gallery``: looking after a gallery."""

from __future__ import annotations

from functools import partial

import click

from xcos_ext.io.errors import GalleryError
from xcos_ext.io.text import byte_size, counted

from . import options
from .console import TROUBLE, bar, echo, echo_some, note, print_json, print_rows
from .inputs import open_gallery

_LONGEST = 1 << 16  # characters of an id


@options.command("info")
@options.gallery
@options.as_json
def info(gallery: str, as_json: bool) -> int:
    """Faces, persons, sizes, and the model that it belongs to."""
    with open_gallery(gallery) as opened:
        data = opened.info()
    if as_json:
        print_json(data)
        return 0
    each = "" if data["bytes_per_face"] is None else f", {data['bytes_per_face']:.0f} bytes a face"
    removed = data["removed_but_stored"]
    print_rows(
        ("faces", f"{data['faces']:,} of {counted(data['persons'], 'person')}"),
        ("version", f"{data['version']}, {counted(data['fragments'], 'fragment')}, {counted(removed, 'removed face')}"),
        ("on disk", f"{byte_size(data['bytes'])}{each}; packed tiles {byte_size(data['tiles_bytes'])}"),
        ("template", f"{data['grid'][0]}x{data['grid'][1]}, {data['channels']} channels, {data['dtype']}"),
        ("head", str(data["head"])),
        ("model", f"{data['model_name'] or 'not recorded'} {data['model'] or ''}".strip()),
        ("threshold", "not known" if data["threshold"] is None else f"{data['threshold']:.4f}"),
    )
    if removed:
        note("removed faces are still on disk until xcos gallery compact")
    return 0


@options.command("remove")
@options.gallery
@click.argument("ids", nargs=-1)
@click.option("--person", "persons", multiple=True, metavar="NAME", help="All faces of a person; repeatable.")
@click.option("--ids-from", metavar="FILE", type=click.Path(allow_dash=True), help="Ids, one a line; - is stdin.")
@options.as_json
def remove(gallery: str, ids: tuple[str, ...], persons: tuple[str, ...], ids_from: str | None, as_json: bool) -> int:
    """Remove faces: all that are named, or none if one is not there."""
    chosen = list(ids)
    if ids_from is not None:
        try:
            with click.open_file(ids_from, encoding="utf-8-sig") as file:
                for line in iter(partial(file.readline, _LONGEST), ""):
                    if len(line) == _LONGEST:
                        raise GalleryError(f"{ids_from}: expected an id a line, got one of {_LONGEST:,} characters")
                    if line.rstrip("\r\n"):
                        chosen.append(line.rstrip("\r\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise GalleryError(f"{ids_from}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    with open_gallery(gallery) as opened:
        for person in persons:
            found = opened.ids_of(person)
            if not found:
                raise GalleryError(f"--person: expected a person of the gallery, got {person!r}")
            chosen += found
        if not chosen:
            raise GalleryError("ids: expected at least one, or --person or --ids-from, got none")
        count = opened.remove(chosen)
        left = len(opened)
    if as_json:
        print_json({"removed": count, "faces": left})
    else:
        echo(f"{count:,} removed, {left:,} left; xcos gallery compact deletes them from the disk")
    return 0


@options.command("compact")
@options.gallery
@click.option(
    "--timeout",
    type=options.Real(min=0),
    default=30.0,
    metavar="SECONDS",
    help="To wait for readers of old versions.",
)
@options.as_json
def compact(gallery: str, timeout: float, as_json: bool) -> int:
    """Delete removed faces from the disk, with all old versions."""
    with open_gallery(gallery) as opened:
        report = opened.compact(timeout=timeout)
        faces = len(opened)
    if as_json:
        print_json({**report, "faces": faces})
    else:
        before, after = byte_size(report["bytes_before"]), byte_size(report["bytes_after"])
        echo(f"{counted(faces, 'face')}, {before} before, {after} now")
    return 0


@options.command("verify")
@options.gallery
@options.quiet
@options.as_json
def verify(gallery: str, quiet: bool, as_json: bool) -> int:
    """Compare everything with the checksums it was written with; exit status 2 if something is damaged."""
    with open_gallery(gallery) as opened, bar("verifying", "faces") as tick:
        report = opened.verify(progress=tick)
    if as_json:
        print_json(report)
    else:
        damaged = [
            f"damaged: position {row['position']}, id {row['id']!r} ({', '.join(row['damaged'])})"
            for row in report["damaged"]
        ]
        echo_some(damaged, "damaged faces (--json lists them)")
        for file in report["unreadable"]:
            echo(f"unreadable: {file['reason']}")
        for name in report["tiles_dropped"]:
            echo(f"packed tiles {name} were damaged: deleted, the next search makes them again")
        if not (quiet and report["ok"]):
            echo(f"{counted(report['faces'], 'face')} read: {'all as written' if report['ok'] else 'DAMAGED'}")
    return 0 if report["ok"] else TROUBLE
