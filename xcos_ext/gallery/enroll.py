"""From pictures to a gallery: read, find the face, embed, commit some hundred at a time; what is in is skipped."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch

from xcos_ext.deploy import for_inference
from xcos_ext.faces import Detector, PictureTree, display_name, extract_face, read_picture
from xcos_ext.io.errors import GalleryError, PictureError
from xcos_ext.model import XCosModel

from .gallery import Gallery
from .search import Progress, quiet

__all__ = ["Enrolment", "Picture", "enroll", "find_pictures", "read_faces"]

_AHEAD = 128  # pictures that are read before they are asked for


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture to be enrolled.

    Attributes:
        id: of the face in the gallery.
        read: gives the picture, uint8 RGB [H, W, 3], or raises PictureError.
        person: who it is; None: not known.
        metadata: to be kept with it.

    Example:
        >>> Picture("ann/0.png", lambda: np.zeros((112, 112, 3), np.uint8), "ann").read().shape
        (112, 112, 3)
    """

    id: str
    read: Callable[[], np.ndarray]
    person: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Enrolment:
    """What enrolling came to.

    Attributes:
        enrolled: ids of new faces.
        present: number of pictures that were in the gallery already.
        skipped: id -> why, of pictures without a usable face.
        several: ids of pictures with more than one face, of which one was taken -> how many.
        seconds: spent on reading, detecting, embedding and committing.
        unlike: ids of aligned crops that do not look like a face, which are enrolled nevertheless.

    Example:
        >>> Enrolment(["ann/0.png"], 0, {"wall.png": "no face found"}, {}, 0.4).skipped
        {'wall.png': 'no face found'}
    """

    enrolled: list[str]
    present: int
    skipped: dict[str, str]
    several: dict[str, int]
    seconds: float
    unlike: list[str] = field(default_factory=list)


def find_pictures(paths: Iterable[str | os.PathLike[str]], *, person: str | None = None) -> list[Picture]:
    """The pictures that files, folders and zip archives name.

    A file's id is its name. In folders (searched through all of their folders) and archives it is the path below them,
    and the folder that a picture lies in is its person.

    Args:
        paths: of pictures, folders, archives.
        person: of all of them; None: from the folders.

    Raises:
        GalleryError: a path that is not there, no pictures at all, or two with the same id.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "ann").mkdir()
        >>> (folder / "ann" / "0.png").touch()
        >>> [(picture.id, picture.person) for picture in find_pictures([folder])]
        [('ann/0.png', 'ann')]
    """
    found: dict[str, Picture] = {}
    for path in paths:
        here = list(_pictures_of(Path(path), person))
        if not here:
            raise GalleryError(f"{display_name(path)}: expected pictures, got none")
        for picture in here:
            if picture.id in found:
                raise GalleryError(
                    f"{display_name(path)}: expected each picture name once, got {picture.id!r} again; enrol one of "
                    "them under another name"
                )
            found[picture.id] = picture
    return list(found.values())


def _pictures_of(path: Path, person: str | None) -> Iterator[Picture]:
    if path.is_file() and path.suffix.lower() != ".zip":
        yield Picture(display_name(path.name), lambda: read_picture(path), person)
        return
    try:
        tree = PictureTree(path)
    except (OSError, ValueError) as error:
        raise GalleryError(str(error)) from error
    for name in tree.names:
        who = person if person is not None else PurePosixPath(name).parent.name or None
        read = partial(read_picture, path / name) if path.is_dir() else partial(tree.read, name)
        yield Picture(display_name(name), read, None if who is None else display_name(who))


#: A picture, its aligned crop or None, the faces found (0: an aligned crop that does not look like one), and why there
#: is no crop.
ReadPicture = tuple[Picture, np.ndarray | None, int, str | None]


def read_faces(
    pictures: Sequence[Picture],
    size: tuple[int, int],
    detector: Callable[[], Detector] | None,
    *,
    policy: str = "prominent",
    strict: bool = False,
    threads: int = 2,
) -> Iterator[ReadPicture]:
    """Aligned faces of pictures, in order, read and detected in threads.

    Args:
        pictures: what to read.
        size: (height, width) of the crops.
        detector: makes a detector, one for each thread; None: the pictures are aligned crops.
        policy, strict: which of several faces, and whether aligned crops must look like one; see
            :func:`xcos_ext.faces.extract_face`.
        threads: that read.

    Yields:
        (picture, crop or None, faces found, why there is no crop).

    Example:
        >>> aligned = Picture("ann", lambda: np.zeros((112, 112, 3), np.uint8))
        >>> [(crop.shape, found, problem) for _, crop, found, problem in read_faces([aligned], (112, 112), None)]
        [((112, 112, 3), 0, None)]
    """
    local = threading.local()

    def work(picture: Picture) -> ReadPicture:
        try:
            found = None
            if detector is not None:
                found = getattr(local, "detector", None)
                if found is None:  # detectors keep working memory: they are not for several threads
                    found = local.detector = detector()
            face = extract_face(picture.read(), found, name=picture.id, policy=policy, size=size, strict=strict)
        except PictureError as error:
            return picture, None, 0, str(error)
        return picture, face.rgb, face.found, None

    with ThreadPoolExecutor(max(1, threads), "xcos-reader") as pool:
        source = iter(pictures)
        waiting = deque(pool.submit(work, picture) for picture in islice(source, _AHEAD))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(work, picture) for picture in islice(source, 1))
                yield done
        finally:
            for future in waiting:
                future.cancel()


def enroll(
    gallery: Gallery,
    model: XCosModel,
    pictures: Sequence[Picture],
    detector: Callable[[], Detector] | None = None,
    *,
    policy: str = "prominent",
    strict: bool = False,
    batch: int = 256,
    threads: int = 2,
    on_duplicate: Literal["skip", "replace", "error"] = "skip",
    progress: Progress | None = None,
) -> Enrolment:
    """Enrol pictures, some at a time, so that an interrupted run can be repeated and goes on where it was.

    Args:
        gallery: opened with ``model`` or without.
        model: in evaluation mode; of the gallery's fingerprint.
        pictures: see :func:`find_pictures`.
        detector, policy, strict, threads: see :func:`read_faces`.
        batch: faces a commit.
        on_duplicate: about ids that are in the gallery: ``"skip"`` does not even read those pictures.
        progress: is told (pictures gone through, all).

    Returns:
        :class:`Enrolment`. Pictures without a face are listed there and never enrolled.

    Raises:
        GalleryError: another model's gallery, an id that is in it (``"error"``), a full disk. Commits before it stay.
    """
    if batch < 1:
        raise GalleryError(f"enroll: batch: expected 1 or more, got {batch}")
    gallery.check_model(model)
    begin = time.perf_counter()
    there = gallery.positions(p.id for p in pictures)
    if there and on_duplicate == "error":
        raise GalleryError(f"enroll: pictures: expected new ids, got {next(iter(there))!r}, which is enrolled")
    todo = [p for p in pictures if on_duplicate == "replace" or p.id not in there]
    present = len(pictures) - len(todo)
    fast = for_inference(model)
    enrolled: list[str] = []
    skipped: dict[str, str] = {}
    several: dict[str, int] = {}
    unlike: list[str] = []
    chosen: list[tuple[Picture, np.ndarray]] = []

    def commit() -> None:
        if not chosen:
            return
        some = [picture for picture, _ in chosen]
        with torch.inference_mode():
            features = fast.features_of([crop for _, crop in chosen])
            templates = fast.templates(features, "gallery", gallery.layout.dtype)
        gallery.add(
            [p.id for p in some],
            templates,
            persons=[p.person for p in some],
            metadata=[p.metadata for p in some],
            on_duplicate=on_duplicate,
        )
        enrolled.extend(p.id for p in some)
        chosen.clear()

    tick = progress or quiet
    tick(present, len(pictures))
    crops = read_faces(todo, model.preprocessing.size, detector, policy=policy, strict=strict, threads=threads)
    for done, (picture, crop, faces, problem) in enumerate(crops, present + 1):
        if crop is None:
            skipped[picture.id] = problem or "no face"
        else:
            if faces > 1:
                several[picture.id] = faces
            elif not faces:
                unlike.append(picture.id)
            chosen.append((picture, crop))
            if len(chosen) >= batch:
                commit()
        tick(done, len(pictures))
    commit()
    return Enrolment(enrolled, present, skipped, several, time.perf_counter() - begin, unlike)
