"""``xcos enroll``: photographs into a gallery."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import click

from xcos_ext.io.errors import GalleryError
from xcos_ext.io.optional import gallery_package
from xcos_ext.io.tables import csv_rows
from xcos_ext.io.text import composed, counted, display_name

from . import options
from .console import TROUBLE, bar, echo, note_faces, note_some, print_json
from .inputs import check_model_path, described, load

if TYPE_CHECKING:
    import torch

    from xcos_ext.gallery import Gallery
    from xcos_ext.gallery.enroll import Picture
    from xcos_ext.model import XCosModel

_CHANGED = (
    "it is in the gallery from a file with other contents, and stays as it is; --replace enrols this one instead, "
    "another name keeps both"
)


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
    "--dtype",
    values=["float16", "bfloat16", "float32"],
    help="Of the templates; an enrolled gallery's cannot be changed.  [default: the gallery's; float16 of a new one]",
)
@options.number("--batch", default=256, most=options.MOST_AT_ONCE, help="Faces a commit.")
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
    dtype: str | None,
    replace: bool,
    quiet: bool,
    as_json: bool,
    **how: Any,
) -> int:
    """Enrol photographs in GALLERY: files, folders (all below them) and zip archives.

    GALLERY is a folder, made if it is not there. Running the command again goes on where it was interrupted.
    Pictures without a face are listed and left out, and so is what is no picture.
    """
    gallery_package("lance")
    path = check_model_path(model)
    from xcos_ext.faces import detector_maker
    from xcos_ext.gallery.enroll import find_pictures

    pictures, left_out = find_pictures(photos, person=None if person is None else composed(person))
    if labels is not None:
        pictures = _labelled(pictures, labels)
    maker = detector_maker("aligned" if aligned else detector)
    import torch

    loaded = load(path, device)
    kind = None if dtype is None else getattr(torch, dtype)
    with _opened(gallery, loaded, kind) as opened, bar("enrolling", "faces") as tick:
        known: Literal["replace", "skip"] = "replace" if replace else "skip"
        result = opened.enroll(pictures, detector=maker or "aligned", on_duplicate=known, progress=tick, **how)
        size = len(opened)
    noted = note_faces(result.several | dict.fromkeys(result.unlike, 0), how["policy"])
    if as_json:
        counts = {"faces": size, "enrolled": len(result.enrolled), "already_in": result.present}
        named = {"skipped": result.skipped, "left_out": left_out, "changed": result.changed, **noted}
        last = {"seconds": result.seconds, "model": described(loaded, path)}
        print_json({"gallery": display_name(gallery), **counts, **named, **last})
    else:
        if not quiet:
            rate = len(result.enrolled) / result.seconds if result.seconds > 0 else 0.0
            echo(
                f"{len(result.enrolled):,} enrolled ({rate:.0f}/s), {result.present:,} already in, "
                f"{len(result.skipped):,} skipped; {counted(size, 'face')} in {display_name(gallery)}"
            )
        note_some([f"skipped {why}" for why in result.skipped.values()], "pictures skipped")
        note_some([f"left out {name}: {why}" for name, why in left_out.items()], "files left out")
        note_some([f"not enrolled {name}: {_CHANGED}" for name in result.changed], "changed pictures")
    return 0 if result.enrolled or result.present else TROUBLE


def _opened(path: str, model: XCosModel, dtype: torch.dtype | None) -> Gallery:
    """The gallery, made where it is not there: by this process, or by one that was faster."""
    import torch

    from xcos_ext.gallery import Gallery

    if not Gallery.exists(path):
        try:
            return Gallery.create(path, model, dtype=dtype or torch.float16)
        except GalleryError:
            if not Gallery.exists(path):
                raise
    opened = Gallery.open(path, model)
    if dtype not in (None, opened.layout.dtype):
        opened.close()
        own, got = (str(kind).removeprefix("torch.") for kind in (opened.layout.dtype, dtype))
        raise GalleryError(f"dtype: expected {own}, the gallery's, got {got}")
    return opened


def _labelled(pictures: list[Picture], labels: str) -> list[Picture]:
    """Pictures with the persons and metadata of a CSV file; columns but picture and person are metadata."""
    name = display_name(labels)
    rows = csv_rows(labels, GalleryError)
    _, header = next(rows)
    if "picture" not in header or len(set(header)) < len(header):
        got = ", ".join(map(repr, header)) or "nothing"
        raise GalleryError(f"{name}: expected CSV with a column 'picture', each column once, got {got}")
    found = {picture.id: picture for picture in pictures}
    labelled: set[str] = set()
    unknown: list[str] = []
    for line, values in rows:
        row = dict(zip(header, values, strict=True))
        picture_id, person = composed(row.pop("picture")), composed(row.pop("person", ""))
        if picture_id in labelled:
            raise GalleryError(f"{name}, line {line}: expected each picture once, got {picture_id!r} again")
        labelled.add(picture_id)
        if picture_id in found:
            person = person or found[picture_id].person or ""
            found[picture_id] = dataclasses.replace(found[picture_id], person=person or None, metadata=row)
        else:
            unknown.append(picture_id)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise GalleryError(f"{name}: expected pictures that are being enrolled, got {min(unknown)!r}{more}")
    return list(found.values())
