"""From pictures to a gallery: read, find the face, embed, commit some hundred at a time; what is in is skipped."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch

from xcos_ext.deploy import for_inference
from xcos_ext.faces import AlignedFace, Detector, PictureTree, display_name, extract_face, read_picture
from xcos_ext.faces.pictures import read_contents
from xcos_ext.io.errors import GalleryError, PictureError
from xcos_ext.io.several import several
from xcos_ext.io.text import composed, few
from xcos_ext.model import XCosModel

from .labels import FILE_CHECKSUM, file_checksum
from .search import Progress, quiet

__all__ = ["Enrolment", "Picture", "enroll", "find_pictures", "find_probes", "read_faces"]

_AHEAD = 128  # pictures that are read before they are asked for
_COMPARED = 4096  # pictures whose labels are in memory while their files are compared with them


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture to be enrolled.

    Attributes:
        id: of the face in the gallery.
        read: gives the picture, uint8 RGB [H, W, 3], or raises PictureError.
        person: who it is; None: not known.
        metadata: to be kept with it.
        contents: gives the bytes of its file, or raises PictureError; None: there is no file.

    Example:
        >>> Picture("ann/0.png", lambda: np.zeros((112, 112, 3), np.uint8), "ann").read().shape
        (112, 112, 3)
    """

    id: str
    read: Callable[[], np.ndarray]
    person: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    contents: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class Enrolment:
    """What enrolling came to.

    Attributes:
        enrolled: ids of new faces.
        present: number of pictures that were in the gallery already.
        skipped: id -> why, of pictures without a usable face.
        several: ids of pictures with more than one face, of which one was taken -> how many.
        seconds: spent on reading, detecting, embedding and committing.
        changed: ids of pictures that were in the gallery, but from other files: replaced since, or of the same name.
            Their faces are left as they were; ``on_duplicate="replace"`` enrols them anew.
        unlike: ids of aligned crops that do not look like a face, which are enrolled nevertheless.
        left_out: files of the folders and archives that are no pictures -> why.

    Example:
        >>> Enrolment(["ann/0.png"], 0, {"wall.png": "no face found"}, {}, 0.4).skipped
        {'wall.png': 'no face found'}
    """

    enrolled: list[str]
    present: int
    skipped: dict[str, str]
    several: dict[str, int]
    seconds: float
    changed: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def find_pictures(
    paths: Iterable[str | os.PathLike[str]], *, person: str | None = None
) -> tuple[list[Picture], dict[str, str]]:
    """The pictures that files, folders and zip archives name, for a gallery.

    A file's id is its name. In folders (searched through all of their folders, linked ones too) and archives it is the
    path below them, and the folder that a picture lies in is its person. Both are in Unicode's composed form (NFC).

    Args:
        paths: of pictures, folders, archives.
        person: of all of them; None: from the folders.

    Returns:
        The pictures, and what else the folders and archives hold, name -> why it is no picture.

    Raises:
        GalleryError: a path that is not there, no pictures at all, or two with the same id.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "ann").mkdir()
        >>> for name in ("0.png", "1.heic"):
        ...     (folder / "ann" / name).touch()
        >>> pictures, left_out = find_pictures([folder])
        >>> [(picture.id, picture.person) for picture in pictures], list(left_out)
        ([('ann/0.png', 'ann')], ['ann/1.heic'])
    """
    found: dict[str, tuple[Picture, str]] = {}
    left_out: dict[str, str] = {}
    for path in several(paths, "find_pictures: paths", "paths"):
        where = display_name(path)
        for picture in _pictures_of(Path(path), person, left_out):
            if picture.id in found:
                other, more = found[picture.id][1], ""
                if other != where:
                    more = f", which {other} has too; enrol one of them under another name, or the folder above both"
                raise GalleryError(f"{where}: expected each picture name once, got {picture.id!r} again{more}")
            found[picture.id] = (picture, where)
    return [picture for picture, _ in found.values()], left_out


def find_probes(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Picture], dict[str, str]]:
    """The same for a search: ids are the paths as they were given, with those below folders and archives.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "0.png").touch()
        >>> [picture.id.removeprefix(str(folder)) for picture in find_probes([folder, folder / "0.png"])[0]]
        ['/0.png', '/0.png']
    """
    pictures: list[Picture] = []
    left_out: dict[str, str] = {}
    for path in several(paths, "find_probes: paths", "paths"):
        where = display_name(path)
        others: dict[str, str] = {}
        single = _single(Path(path))
        for picture in _pictures_of(Path(path), None, others):
            pictures.append(replace(picture, id=where if single else f"{where.rstrip('/')}/{picture.id}"))
        left_out |= {f"{where.rstrip('/')}/{name}": why for name, why in others.items()}
    return pictures, left_out


def _single(path: Path) -> bool:
    """Whether a path is that of a picture, and not of a folder or archive; GalleryError if it is of nothing."""
    try:
        return stat.S_ISREG(path.stat().st_mode) and path.suffix.lower() != ".zip"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = "no such file or folder" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise GalleryError(f"{display_name(path)}: {why}") from error


def _pictures_of(path: Path, person: str | None, left_out: dict[str, str]) -> list[Picture]:
    """The pictures of one path, at least one; the rest of a folder or archive is put into ``left_out``."""
    if _single(path):
        # Read when it is asked for, wherever os.chdir has gone by then; can be pickled.
        later: Any = {"path": path.absolute(), "name": display_name(path)}
        read, contents = partial(read_picture, **later), partial(read_contents, **later)
        return [Picture(composed(display_name(path.name)), read, person, contents=contents)]
    try:
        tree = PictureTree(path)
    except (OSError, ValueError) as error:
        raise GalleryError(str(error)) from error
    others = {display_name(name): why for name, why in tree.left_out.items()}
    left_out |= others
    if not tree.names:
        told = f"; left out: {few(others, 3)}" if others else ""
        raise GalleryError(f"{display_name(path)}: expected pictures, got none{told}")
    found = []
    for name in tree.names:
        folder = PurePosixPath(name).parent.name
        who = person if person is not None else display_name(folder) if folder else None
        read, contents = partial(tree.read, name), partial(tree.contents, name)
        found.append(Picture(display_name(name), read, who, contents=contents))
    return found


#: A picture, its aligned face or None, and why there is none.
ReadPicture = tuple[Picture, AlignedFace | None, str | None]


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
        (picture, :class:`~xcos_ext.faces.AlignedFace` or None, why there is none).

    Raises:
        TypeError: a detector, or its name, instead of a function that makes detectors.

    Example:
        >>> aligned = Picture("ann", lambda: np.zeros((112, 112, 3), np.uint8))
        >>> [(face.rgb.shape, face.found, why) for _, face, why in read_faces([aligned], (112, 112), None)]
        [((112, 112, 3), 0, None)]
    """
    if not callable(detector) and detector is not None:
        got = type(detector).__name__
        raise TypeError(f"detector: expected a function that makes one, such as create_detector, or None, got {got}")
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
            return picture, None, str(error)
        return picture, face, None

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
    gallery: Any,
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
        gallery: a :class:`~xcos_ext.Gallery`, opened with ``model`` or without; its own method calls this.
        model: in evaluation mode; of the gallery's fingerprint.
        pictures: see :func:`find_pictures`.
        detector, policy, strict, threads: see :func:`read_faces`.
        batch: faces a commit.
        on_duplicate: about ids that are in the gallery: ``"skip"`` does not decode those pictures, but tells from the
            checksums of their files, which enrolling keeps in the metadata (``"file_xxh3"``), which have changed.
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
    known = [p for p in pictures if p.id in there] if on_duplicate == "skip" else []
    present = len(pictures) - len(todo)
    fast = for_inference(model)
    enrolled: list[str] = []
    skipped: dict[str, str] = {}
    several_faces: dict[str, int] = {}
    unlike: list[str] = []
    chosen: list[tuple[Picture, np.ndarray]] = []

    def commit() -> None:
        if not chosen:
            return
        some = [picture for picture, _ in chosen]
        with torch.inference_mode():
            features = fast.features_of([crop for _, crop in chosen])
            templates = fast.templates(features, "gallery", gallery.layout.dtype)
        # Not all of them, where another process has enrolled some meanwhile.
        enrolled.extend(
            gallery._add_named(
                [p.id for p in some],
                templates,
                [p.person for p in some],
                [_with_checksum(p) for p in some],
                on_duplicate,
            )
        )
        chosen.clear()

    tick = progress or quiet
    changed = _changed(gallery, known, there, lambda done: tick(done, len(pictures)))
    tick(present, len(pictures))
    crops = read_faces(todo, model.preprocessing.size, detector, policy=policy, strict=strict, threads=threads)
    for done, (picture, face, problem) in enumerate(crops, present + 1):
        if face is None:
            skipped[picture.id] = problem or "no face"
        else:
            if face.found > 1:
                several_faces[picture.id] = face.found
            elif not face.found:
                unlike.append(picture.id)
            chosen.append((picture, face.rgb))
            if len(chosen) >= batch:
                commit()
        tick(done, len(pictures))
    commit()
    present = len(pictures) - len(enrolled) - len(skipped)
    return Enrolment(enrolled, present, skipped, several_faces, time.perf_counter() - begin, changed, unlike)


def _checksum(picture: Picture) -> str | None:
    """Of its file, where it has one that can be read."""
    with contextlib.suppress(PictureError):
        return None if picture.contents is None else file_checksum(picture.contents())
    return None


def _with_checksum(picture: Picture) -> dict[str, Any]:
    checksum = _checksum(picture)
    return dict(picture.metadata) | ({} if checksum is None else {FILE_CHECKSUM: checksum})


def _changed(
    gallery: Any, pictures: Sequence[Picture], there: Mapping[str, int], tick: Callable[[int], None]
) -> list[str]:
    """Ids of those whose files are not those that the gallery's faces are from, as far as the gallery knows them."""
    snapshot = gallery.snapshot
    changed: list[str] = []
    for start in range(0, len(pictures), _COMPARED):
        some = pictures[start : start + _COMPARED]
        places = snapshot.places_of(np.array([there[p.id] for p in some], np.int64))
        labels = snapshot.labels(places)["metadata"]
        for done, (picture, metadata) in enumerate(zip(some, labels, strict=True), start):
            kept = metadata.get(FILE_CHECKSUM)
            if kept is not None and _checksum(picture) not in (None, kept):
                changed.append(picture.id)
            tick(done)
    return changed
