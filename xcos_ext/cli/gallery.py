"""``xcos gallery`` and ``xcos dedupe``: looking after a gallery."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import click

from xcos_ext.io.errors import GalleryError
from xcos_ext.io.text import byte_size

from .console import TROUBLE, bar, note, print_json
from .verify import check_model_path, chosen_device, load

__all__ = ["compact", "dedupe", "info", "remove", "verify"]

_NAMED = 20  # rows shown on the terminal; all are in the JSON


def _open(path: str, model: Any = None) -> Any:
    from xcos_ext.io.optional import need

    need("lance", "a gallery", extra="gallery")
    from xcos_ext.gallery import Gallery

    return Gallery.open(path, model)


def info(path: str, as_json: bool) -> int:
    """Counts, sizes, model."""
    with _open(path) as gallery:
        data = gallery.info()
    if as_json:
        print_json(data)
        return 0
    each = "" if data["bytes_per_face"] is None else f", {data['bytes_per_face']:.0f} bytes a face"
    rows = [
        ("faces", f"{data['faces']:,} of {data['persons']:,} persons"),
        ("version", f"{data['version']}, {data['fragments']} fragments, {data['removed_but_stored']:,} removed faces"),
        ("on disk", f"{byte_size(data['bytes'])}{each}; packed tiles {byte_size(data['tiles_bytes'])}"),
        ("template", f"{data['grid'][0]}x{data['grid'][1]}, {data['channels']} channels, {data['dtype']}"),
        ("head", str(data["head"])),
        ("model", f"{data['model_name'] or 'not recorded'} {data['model'] or ''}".strip()),
        ("threshold", "not known" if data["threshold"] is None else f"{data['threshold']:.4f}"),
    ]
    for name, value in rows:
        click.echo(f"{name:<10} {value}")
    if data["removed_but_stored"]:
        note("removed faces are still on disk until xcos gallery compact")
    return 0


def remove(gallery: str, ids: Sequence[str], persons: Sequence[str], ids_from: str | None, as_json: bool) -> int:
    """Delete faces by id or by person."""
    chosen = list(ids)
    if ids_from is not None:
        try:
            with click.open_file(ids_from, encoding="utf-8") as file:
                chosen += [line.rstrip("\n") for line in file if line.rstrip("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise GalleryError(f"{ids_from}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    with _open(gallery) as opened:
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
        click.echo(f"{count:,} removed, {left:,} left; xcos gallery compact deletes them from the disk")
    return 0


def compact(path: str, timeout: float, as_json: bool) -> int:
    """Rewrite without removed faces and delete old versions."""
    with _open(path) as gallery:
        report = gallery.compact(timeout=timeout)
        faces = len(gallery)
    if as_json:
        print_json({**report, "faces": faces})
    else:
        click.echo(
            f"{faces:,} faces, {byte_size(report['bytes_before'])} before, {byte_size(report['bytes_after'])} now"
        )
    return 0


def verify(path: str, quiet: bool, as_json: bool) -> int:
    """Compare everything with its checksums; 2 if something is damaged."""
    with _open(path) as gallery, bar("verifying", "faces", quiet=quiet or as_json) as tick:
        report = gallery.verify(progress=tick)
    if as_json:
        print_json(report)
    else:
        for row in report["damaged"][:_NAMED]:
            click.echo(f"damaged: position {row['position']}, id {row['id']!r} ({', '.join(row['damaged'])})")
        if len(report["damaged"]) > _NAMED:
            click.echo(f"... and {len(report['damaged']) - _NAMED:,} more (--json lists them)")
        for file in report["unreadable"]:
            click.echo(f"unreadable: {file['reason']}")
        for name in report["tiles_dropped"]:
            click.echo(f"packed tiles {name} were damaged: deleted, the next search makes them again")
        click.echo(f"{report['faces']:,} faces read: {'all as written' if report['ok'] else 'DAMAGED'}")
    return 0 if report["ok"] else TROUBLE


def dedupe(
    gallery: str,
    model: str | None,
    threshold: float | None,
    out: str | None,
    quiet: bool,
    as_json: bool,
    device: str = "auto",
) -> int:
    """Pairs of alike faces of a gallery."""
    if out is not None:
        from xcos_ext.io.atomic import check_output

        check_output(out, (".csv",))
    path = check_model_path(model)
    place = chosen_device(device)
    loaded = load(path).to(place)
    with _open(gallery, loaded) as opened, bar("comparing", "pairs", quiet=quiet or as_json) as tick:
        result = opened.dedupe(threshold, progress=tick)
        faces = len(opened)
    across = [p for p in result.pairs if None not in p.persons and p.persons[0] != p.persons[1]]
    if out is not None:
        _write_csv(out, result)
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
    click.echo(
        f"{len(result.pairs):,} of {result.compared:,} pairs score {result.threshold:.4f} or more, "
        f"{len(across):,} of them across persons; {len(result.groups):,} groups"
    )
    return 0


def _write_csv(path: str, result: Any) -> None:
    from xcos_ext.io.atomic import write_atomically

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["id_a", "id_b", "person_a", "person_b", "score"])
    for pair in result.pairs:
        writer.writerow([*pair.ids, *("" if p is None else p for p in pair.persons), repr(pair.score)])
    data = text.getvalue().encode()

    def write(file: BinaryIO) -> None:
        file.write(data)

    write_atomically(path, write)
