"""Who is on a picture: reading it, finding the face, and searching for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from xcos_ext.faces import detector_maker, picture_of
from xcos_ext.io.errors import GalleryError, PictureError
from xcos_ext.io.text import counted, display_name
from xcos_ext.model import XCosModel

from .enroll import Picture, find_probes, read_faces
from .hits import Hit, Hits
from .search import Progress, quiet
from .thresholds import identification_threshold

__all__ = ["Found", "find"]


@dataclass(frozen=True, eq=False)
class Found:
    """Who pictures look like; a sequence of lists of :class:`~xcos_ext.gallery.Hit`, best first, one for each probe.

    Attributes:
        hits: of the search, with maps and version.
        probes: what each row of hits is of: a picture, or all of one person's.
        threshold: from which score on a hit counts as the same person; None: not known.
        left_out: picture or file -> why it was not searched for.
        several: pictures with more than one face -> how many (0: an aligned crop that does not look like one).
        faces: that were searched.
        seconds: that the search took, without reading the pictures.
    """

    hits: Hits
    probes: list[str]
    threshold: float | None
    left_out: dict[str, str] = field(default_factory=dict)
    several: dict[str, int] = field(default_factory=dict)
    faces: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.probes)

    def __getitem__(self, row: int) -> list[Hit]:
        return self.hits[row]

    def __iter__(self) -> Iterator[list[Hit]]:
        return (self.hits[row] for row in range(len(self.probes)))

    def __str__(self) -> str:
        lines = []
        for title, hits in zip(self.probes, self, strict=True):
            lines += [title, *([] if hits else ["   nobody"])]
            for rank, hit in enumerate(hits, 1):
                limit = self.threshold
                verdict = "" if limit is None else f"  {'over' if hit.score >= limit else 'below'} the threshold"
                who = "" if hit.person is None else f"  {display_name(hit.person)}"
                lines.append(f"   {rank}  {hit.score:7.4f}  {display_name(hit.id)}{who}{verdict}")
        return "\n".join(lines)


def _pictures(photos: Any) -> tuple[list[Picture], dict[str, str]]:
    """Probes of paths, folders, archives, pictures in memory, or what :func:`find_probes` gave; one or several."""
    given = list(photos) if isinstance(photos, (list, tuple)) else [photos]
    if given and all(isinstance(one, Picture) for one in given):
        return given, {}
    if given and all(isinstance(one, str) or hasattr(one, "__fspath__") for one in given):
        return find_probes(given)
    found = []
    for i, one in enumerate(given):
        name = f"picture {i + 1}"
        pixels = picture_of(one, name)
        found.append(Picture(name, lambda pixels=pixels: pixels))  # type: ignore[misc]
    return found, {}


def find(
    gallery: Any,
    fast: XCosModel,
    photos: Any,
    k: int,
    *,
    detector: Any,
    policy: str,
    strict: bool,
    threshold: float | None,
    fpir: float | None,
    fusion: Any,
    reading: Progress | None,
    attention: str,
    **how: Any,
) -> Found:
    """:meth:`xcos_ext.Gallery.find`, with the gallery's model as it embeds fastest."""
    if threshold is not None and fpir is not None:
        raise GalleryError("threshold, fpir: expected one of them, got both")
    pictures, left_out = _pictures(photos)
    layout = gallery.layout
    own = layout.weighs(attention)
    limit = layout.threshold if threshold is None and own else threshold
    if fpir is not None:
        if layout.fmr_curve is not None and not own:
            raise GalleryError(
                f"fpir: expected the attention that the model is calibrated with, got attention={attention!r}; give a "
                "threshold"
            )
        # The best of several pictures is a draw from each; a mean strays less than one picture does.
        each = len(pictures) if fusion == "max" else 1
        limit = identification_threshold(layout.fmr_curve, fpir, len(gallery) * each)
    crops, names = [], []
    several: dict[str, int] = {}
    tick = reading or quiet
    faces = read_faces(pictures, fast.preprocessing.size, detector_maker(detector), policy=policy, strict=strict)
    for done, (picture, face, why) in enumerate(faces, 1):
        if face is None:
            left_out[picture.id] = why or "no face"
        else:
            crops.append(face.rgb)
            names.append(picture.id)
            if face.found != 1:
                several[picture.id] = face.found
        tick(done, len(pictures))
    if not crops:
        reasons = "; ".join(list(left_out.values())[:3])
        raise PictureError(f"no probe has a usable face: {reasons}" if reasons else "photos: expected one, got none")
    with torch.inference_mode():
        templates = fast.templates(fast.features_of(crops), "probe", layout.dtype)
    begin = time.perf_counter()
    hits = gallery.search(
        templates,
        k,
        groups=None if fusion is None else ["probe"] * len(names),
        fusion=fusion or "max",
        threshold=limit,
        attention=attention,
        **how,
    )
    seconds = time.perf_counter() - begin
    probes = names if fusion is None else [f"{counted(len(names), 'picture')} of one person ({fusion})"]
    return Found(hits, probes, limit, left_out, several, len(gallery), seconds)
