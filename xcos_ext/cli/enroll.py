"""``xcos enroll``: photographs into a gallery."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from xcos_ext.io.errors import GalleryError, XCosError

from .console import TROUBLE, bar, note, print_json, quiet_opencv
from .verify import FaceOptions, check_model_path, chosen_device, load

if TYPE_CHECKING:
    from xcos_ext.gallery.enroll import Picture

__all__ = ["Request", "run"]

_NAMED = 5  # skipped pictures named on the terminal; all are in the JSON


@dataclass(frozen=True, kw_only=True)
class Request(FaceOptions):
    """The command line's options."""

    gallery: str
    photos: tuple[str, ...]
    person: str | None = None
    labels: str | None = None
    dtype: str = "float16"
    batch: int = 256
    replace: bool = False
    threads: int = 2
    quiet: bool = False
    as_json: bool = False


def _labels(path: str) -> dict[str, dict[str, str]]:
    """Rows of a CSV file by their column ``picture``."""
    from xcos_ext.faces import display_name

    name = display_name(path)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or "picture" not in reader.fieldnames:
                raise GalleryError(
                    f"{name}: expected CSV with a column 'picture', got {reader.fieldnames or 'nothing'}"
                )
            rows = {row["picture"]: row for row in reader}
    except OSError as error:
        raise GalleryError(f"{name}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise GalleryError(f"{name}: expected CSV in UTF-8 ({error})") from error
    return rows


def _labelled(pictures: list[Picture], rows: Mapping[str, Mapping[str, str]], name: str) -> list[Picture]:
    """Pictures with the persons and metadata of a CSV file; its other columns are metadata."""
    unknown = set(rows) - {p.id for p in pictures}
    if unknown:
        raise GalleryError(
            f"{name}: expected pictures that are being enrolled, got {sorted(unknown)[0]!r}"
            f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}"
        )
    result = []
    for picture in pictures:
        row = rows.get(picture.id)
        if row is not None:
            metadata = {key: value for key, value in row.items() if key not in ("picture", "person", None)}
            picture = dataclasses.replace(picture, person=row.get("person") or picture.person, metadata=metadata)
        result.append(picture)
    return result


def run(request: Request) -> int:
    """Find pictures, enrol them, say what came of it.

    Returns:
        0, or 2 if not one picture is in the gallery afterwards.

    Raises:
        XCosError: anything wrong with the gallery, the model, the labels or the disk.
    """
    quiet_opencv()
    from xcos_ext.faces import create_detector, display_name
    from xcos_ext.io.optional import need

    need("lance", "a gallery", extra="gallery")
    model_path = check_model_path(request.model)
    from xcos_ext.gallery.enroll import enroll, find_pictures

    pictures = find_pictures(request.photos, person=request.person)
    if request.labels is not None:
        pictures = _labelled(pictures, _labels(request.labels), display_name(request.labels))
    if not request.aligned:
        create_detector(request.detector)  # a wrong name is said now, not by a thread
    import torch

    from xcos_ext.gallery import Gallery

    device = chosen_device(request.device)
    model = load(model_path).to(device)
    if Gallery.exists(request.gallery):
        gallery = Gallery.open(request.gallery, model)
    else:
        gallery = Gallery.create(request.gallery, model, dtype=getattr(torch, request.dtype))
    with gallery, bar("enrolling", "faces", quiet=request.quiet or request.as_json) as tick:
        result = enroll(
            gallery,
            model,
            pictures,
            None if request.aligned else lambda: create_detector(request.detector),
            policy=request.policy,
            batch=request.batch,
            threads=request.threads,
            on_duplicate="replace" if request.replace else "skip",
            progress=tick,
        )
        size = len(gallery)
    rate = len(result.enrolled) / result.seconds if result.seconds > 0 else 0.0
    if request.as_json:
        print_json(
            {
                "gallery": display_name(request.gallery),
                "faces": size,
                "enrolled": len(result.enrolled),
                "already_in": result.present,
                "skipped": result.skipped,
                "several_faces": result.several,
                "seconds": result.seconds,
                "model": {"name": model.name, "file": display_name(model_path), "fingerprint": model.fingerprint()},
            }
        )
    else:
        if not request.quiet:
            click.echo(
                f"{len(result.enrolled):,} enrolled ({rate:.0f}/s), {result.present:,} already in, "
                f"{len(result.skipped):,} skipped; {size:,} faces in {display_name(request.gallery)}"
            )
        for why in list(result.skipped.values())[:_NAMED]:
            note(f"skipped {why}")
        if len(result.skipped) > _NAMED:
            note(f"... and {len(result.skipped) - _NAMED:,} more pictures skipped (--json lists them)")
        if result.several:
            note(f"{len(result.several):,} pictures with several faces: took the {request.policy} one (see --face)")
    if not result.enrolled and not result.present:
        if not result.skipped:
            raise XCosError("nothing to enrol")
        return TROUBLE
    return 0
