"""``xcos enroll``: photographs into a gallery."""

from __future__ import annotations

import csv
import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import click

from xcos_ext.io.errors import GalleryError
from xcos_ext.io.optional import gallery_package
from xcos_ext.io.text import display_name

from . import options
from .console import TROUBLE, bar, echo, note_faces, note_some, print_json
from .inputs import check_model_path, described, detector_maker, load

if TYPE_CHECKING:
    from xcos_ext.gallery.enroll import Picture


@options.command("enroll")
@options.gallery
@click.argument("photos", nargs=-1, required=True, type=click.Path(), metavar="PHOTOS...")
@options.faces
@click.option("--person", metavar="NAME", help="Who is on all of them; by default the folder each lies in.")
@click.option(
    "--labels",
    metavar="CSV",
    type=click.Path(),
    help="Columns picture (path below its folder or archive), person, and any others, which become metadata.",
)
@options.choice(
    "--dtype", values=["float16", "bfloat16", "float32"], default="float16", help="Of the templates, for a new gallery."
)
@options.number("--batch", default=256, help="Faces a commit.")
@click.option("--replace", is_flag=True, help="Enrol pictures again that are in; by default they are skipped.")
@options.threads
@options.quiet
@options.as_json
def run(
    gallery: str,
    photos: tuple[str, ...],
    model: str | None,
    detector: str,
    aligned: bool,
    device: str,
    person: str | None,
    labels: str | None,
    dtype: str,
    replace: bool,
    quiet: bool,
    as_json: bool,
    **how: Any,
) -> int:
    """Enrol photographs in GALLERY: files, folders (all below them) and zip archives.

    GALLERY is a folder, made if it is not there. Running the command again goes on where it was interrupted.
    Pictures without a face are listed and left out.
    """
    gallery_package("lance")
    path = check_model_path(model)
    from xcos_ext.gallery.enroll import enroll, find_pictures

    pictures = find_pictures(photos, person=person)
    if labels is not None:
        pictures = _labelled(pictures, labels)
    make_detector = detector_maker(detector, aligned)
    import torch

    from xcos_ext.gallery import Gallery

    loaded = load(path, device)
    if Gallery.exists(gallery):
        opened = Gallery.open(gallery, loaded)
    else:
        opened = Gallery.create(gallery, loaded, dtype=getattr(torch, dtype))
    with opened, bar("enrolling", "faces") as tick:
        known: Literal["replace", "skip"] = "replace" if replace else "skip"
        result = enroll(opened, loaded, pictures, make_detector, on_duplicate=known, progress=tick, **how)
        size = len(opened)
    noted = note_faces(result.several | dict.fromkeys(result.unlike, 0), how["policy"])
    if as_json:
        counts = {"faces": size, "enrolled": len(result.enrolled), "already_in": result.present}
        named = {"skipped": result.skipped, **noted, "seconds": result.seconds}
        print_json({"gallery": display_name(gallery), **counts, **named, "model": described(loaded, path)})
    else:
        if not quiet:
            rate = len(result.enrolled) / result.seconds if result.seconds > 0 else 0.0
            echo(
                f"{len(result.enrolled):,} enrolled ({rate:.0f}/s), {result.present:,} already in, "
                f"{len(result.skipped):,} skipped; {size:,} faces in {display_name(gallery)}"
            )
        note_some([f"skipped {why}" for why in result.skipped.values()], "pictures skipped")
    return 0 if result.enrolled or result.present else TROUBLE


def _labelled(pictures: list[Picture], labels: str) -> list[Picture]:
    """Pictures with the persons and metadata of a CSV file; columns but picture and person are metadata."""
    name = display_name(labels)
    try:
        with open(labels, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if "picture" not in (reader.fieldnames or ()):
                raise GalleryError(
                    f"{name}: expected CSV with a column 'picture', got {reader.fieldnames or 'nothing'}"
                )
            rows = {row.pop("picture"): row for row in reader}
    except (UnicodeDecodeError, csv.Error) as error:
        raise GalleryError(f"{name}: expected CSV in UTF-8 ({error})") from error
    unknown = sorted(set(rows) - {p.id for p in pictures})
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise GalleryError(f"{name}: expected pictures that are being enrolled, got {unknown[0]!r}{more}")
    found = {picture.id: picture for picture in pictures}
    for picture_id, row in rows.items():
        person = row.pop("person", None) or found[picture_id].person
        metadata = {column: value for column, value in row.items() if column is not None}  # None: what is too much
        found[picture_id] = dataclasses.replace(found[picture_id], person=person, metadata=metadata)
    return list(found.values())
