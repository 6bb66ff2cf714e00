"""``xcos enroll``: photographs into a gallery."""

from __future__ import annotations

import csv
import dataclasses
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import GalleryError, XCosError

from . import options
from .console import TROUBLE, bar, note, note_some, print_json
from .inputs import check_model_path, described, load

if TYPE_CHECKING:
    from xcos_ext.gallery.enroll import Picture


@click.command("enroll")
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
    from xcos_ext.faces import create_detector, display_name
    from xcos_ext.io.optional import need

    need("lance", "a gallery", extra="gallery")
    path = check_model_path(model)
    from xcos_ext.gallery.enroll import enroll, find_pictures

    pictures = find_pictures(photos, person=person)
    if labels is not None:
        pictures = _labelled(pictures, labels)
    if not aligned:
        create_detector(detector)  # a wrong name is said now, not by a thread
    import torch

    from xcos_ext.gallery import Gallery

    loaded = load(path, device)
    if Gallery.exists(gallery):
        opened = Gallery.open(gallery, loaded)
    else:
        opened = Gallery.create(gallery, loaded, dtype=getattr(torch, dtype))
    with opened, bar("enrolling", "faces", quiet=quiet or as_json) as tick:
        result = enroll(
            opened,
            loaded,
            pictures,
            None if aligned else lambda: create_detector(detector),
            on_duplicate="replace" if replace else "skip",
            progress=tick,
            **how,
        )
        size = len(opened)
    if as_json:
        print_json(
            {
                "gallery": display_name(gallery),
                "faces": size,
                "enrolled": len(result.enrolled),
                "already_in": result.present,
                "skipped": result.skipped,
                "several_faces": result.several,
                "seconds": result.seconds,
                "model": described(loaded, path),
            }
        )
    else:
        if not quiet:
            rate = len(result.enrolled) / result.seconds if result.seconds > 0 else 0.0
            click.echo(
                f"{len(result.enrolled):,} enrolled ({rate:.0f}/s), {result.present:,} already in, "
                f"{len(result.skipped):,} skipped; {size:,} faces in {display_name(gallery)}"
            )
        note_some([f"skipped {why}" for why in result.skipped.values()], "pictures skipped")
        if result.several:
            note(f"{len(result.several):,} pictures with several faces: took the {how['policy']} one (see --face)")
    if not result.enrolled and not result.present:
        if not result.skipped:
            raise XCosError("nothing to enrol")
        return TROUBLE
    return 0


def _labelled(pictures: list[Picture], labels: str) -> list[Picture]:
    """Pictures with the persons and metadata of a CSV file; columns but picture and person are metadata."""
    from xcos_ext.faces import display_name

    name = display_name(labels)
    rows = _rows(labels, name)
    unknown = sorted(set(rows) - {p.id for p in pictures})
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise GalleryError(f"{name}: expected pictures that are being enrolled, got {unknown[0]!r}{more}")
    result = []
    for picture in pictures:
        row = rows.get(picture.id)
        if row is not None:
            metadata = {key: value for key, value in row.items() if key not in ("picture", "person", None)}
            picture = dataclasses.replace(picture, person=row.get("person") or picture.person, metadata=metadata)
        result.append(picture)
    return result


def _rows(path: str, name: str) -> dict[str, dict[str, str]]:
    """Rows of a CSV file by their column ``picture``."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or "picture" not in reader.fieldnames:
                raise GalleryError(
                    f"{name}: expected CSV with a column 'picture', got {reader.fieldnames or 'nothing'}"
                )
            return {row["picture"]: row for row in reader}
    except OSError as error:
        raise GalleryError(f"{name}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise GalleryError(f"{name}: expected CSV in UTF-8 ({error})") from error
