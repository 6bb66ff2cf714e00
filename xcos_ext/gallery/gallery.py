"""A gallery: templates kept on disk, changed and searched at the same time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xcos_ext.deploy import for_inference
from xcos_ext.faces import detector_maker
from xcos_ext.io.arrays import refuse_masked
from xcos_ext.io.atomic import local_path
from xcos_ext.io.errors import GalleryError
from xcos_ext.io.optional import gallery_package
from xcos_ext.io.several import several
from xcos_ext.model import XCosModel, load_model
from xcos_ext.ops._checks import checked_number
from xcos_ext.ops.templates import Templates

from .dedupe import find_duplicates, symmetric
from .enroll import Enrolment, Picture, enroll, find_pictures
from .find import Found, find
from .hits import Duplicates, Hits
from .labels import checked_metadata, checked_text
from .layout import Layout
from .scoring import Fusion
from .search import WHERE, Progress, Search, Searcher, Shard, quiet
from .snapshot import Snapshot
from .store import Store, folder_bytes, lance
from .stream import Tile, stream
from .tiles import TileCache, gather
from .verify import verify

__all__ = ["Gallery"]

StrPath = str | os.PathLike[str]


class Gallery(Searcher):
    """Faces enrolled for search, in a folder on disk; :meth:`create` makes one, :meth:`open` opens one.

    Readers see one committed version (:attr:`version`), whatever is written meanwhile, until :meth:`refresh`; writing
    through this object refreshes it. One process writes at a time. Rows are stored by Lance, and templates are packed
    into tiles on the first search, so that later ones map them and start at once. Nothing is read by pickle.

    A face has a *position*: its place among the faces of the version, in the order of enrolment, from 0. Where scores
    are equal the lower position wins, always.

    Close it, or use it in a ``with`` statement: an open gallery keeps its version's files from being deleted by
    :meth:`compact`. Threads may share it. Pickled (for the workers of a ``DataLoader``) it opens the same version, with
    the same model, in the other process: GalleryError if that was compacted away meanwhile.

    Attributes:
        path: of the folder, absolute.
        layout: shapes, dtype, head and model of the templates.

    Example:
        >>> import tempfile, torch, xcos_ext
        >>> faces = xcos_ext.Templates.from_features(torch.randn(3, 8, 7, 7))  # or model.templates(F, "gallery")
        >>> gallery = Gallery.create(tempfile.mkdtemp(), faces)
        >>> gallery.add(["ann/0", "ann/1", "bob/0"], faces, persons=["ann", "ann", "bob"])
        3
        >>> gallery.search(faces[2:], k=1, where="person <> 'ann'")[0][0].id
        'bob/0'
        >>> gallery.remove(["ann/0"]), len(gallery), list(gallery.ids())
        (1, 2, ['ann/1', 'bob/0'])
    """

    def __init__(
        self,
        store: Store,
        model: Any = None,
        cache: StrPath | bool = True,
        timeout: float = 10.0,
        version: int | None = None,
    ) -> None:
        self._store = store
        self._timeout = timeout
        self.path = store.folder
        self._moving = threading.RLock()
        self._seen: Snapshot | None  # None: closed
        self._seen, self._lock = store.snapshot(version)
        try:
            self.layout: Layout = self._seen.layout
            self._model = model
            self._fast: tuple[str, XCosModel] | None = None  # fingerprint, and the copy that embeds pictures
            if model is not None:
                self.check_model(model)
            own = store.folder / "tiles" if cache is True else cache
            folder = None if isinstance(own, bool) else local_path(own, GalleryError).absolute()
            self._tiles = TileCache(folder, self.layout)
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the same version for itself, and locks it there."""
        cache = False if self._tiles.folder is None else self._tiles.folder
        return type(self), (self._store, self._model, cache, self._timeout, self.version)

    @classmethod
    def create(
        cls,
        path: StrPath,
        source: Any = None,
        *,
        dtype: torch.dtype = torch.float16,
        grid: tuple[int, int] = (7, 7),
        cache: StrPath | bool = True,
        timeout: float = 10.0,
    ) -> Gallery:
        """Make an empty gallery.

        Args:
            path: of the folder; it must not exist, or be empty.
            source: whose templates it will hold: an :class:`xcos_ext.XCosModel` (fingerprint, threshold and calibration
                are kept, too), a head, or any :class:`xcos_ext.Templates`. None: the shipped model.
            dtype: how templates are stored: float16, bfloat16, float32 or float64.
            grid: (H, W), where ``source`` is a head alone.
            cache: of packed tiles: True keeps them in the gallery's folder; a folder of their own; False: none.
            timeout: seconds to wait for another writer.

        Raises:
            GalleryError: there is a gallery already, or other files, or the folder cannot be written.
            TypeError: another source or dtype.
            MissingPackageError: the extra ``gallery`` is not installed.
        """
        source = load_model() if source is None else source
        store = Store.create(path, Layout.of(source, dtype, grid))
        gallery = cls(store, None, cache, timeout)
        gallery._model = source if hasattr(source, "templates") else None  # its own, so it need not be checked
        return gallery

    @classmethod
    def open(cls, path: StrPath, model: Any = None, *, cache: StrPath | bool = True, timeout: float = 10.0) -> Gallery:
        """Open a gallery at its newest version.

        Args:
            path: of the folder.
            model: the model or head that makes its templates; it is checked against what the gallery was made for, and
                lets :meth:`add` and :meth:`search` take features [N, C, H, W] as well.
            cache, timeout: as in :meth:`create`.

        Raises:
            GalleryError: it is not there, is of another format, or was made for another model or head.
            GalleryDamagedError: it cannot be opened.
        """
        return cls(Store(path), model, cache, timeout)

    @staticmethod
    def exists(path: StrPath) -> bool:
        """Whether there is a gallery in a folder."""
        return Store(path).exists()

    def check_model(self, model: Any) -> None:
        """Refuse a model or head that does not make this gallery's templates.

        Raises:
            GalleryError: another model, or another head.
            TypeError: neither.
        """
        if not hasattr(model, "templates"):
            raise TypeError(f"{self.path}: model: expected an XCosModel or a head, got {type(model).__name__}")
        if isinstance(model, XCosModel) and self.layout.model is not None:
            got = model.fingerprint()
            if got != self.layout.model:
                raise GalleryError(
                    f"{self.path}: model: expected the one that the gallery was made for ({self.layout.model_name}, "
                    f"{self.layout.model}), got another ({model.name}, {got})"
                )
        else:
            head = Layout.of(model, self.layout.dtype, self.layout.grid)
            self.layout.check(head.empty(), "model", str(self.path))

    # ------------------------------------------------------------------ state

    def close(self) -> None:
        """Let the version go. The object must not be used afterwards."""
        self._seen = None
        self._lock.release()

    def refresh(self) -> Gallery:
        """Move to the newest version; returns this gallery."""
        self._move_to(None)
        return self

    def _move_to(self, version: int | None) -> None:
        with self._moving:  # of two threads the one that looks later has the newer version
            self.snapshot  # noqa: B018 (refuses a closed one)
            snapshot, lock = self._store.snapshot(version)
            self._lock.release()
            self._seen, self._lock = snapshot, lock

    @property
    def version(self) -> int:
        """Number of the version that this object sees; every commit raises it."""
        return self.snapshot.version

    @property
    def snapshot(self) -> Snapshot:
        """What this object sees."""
        snapshot = self._seen
        if snapshot is None:
            raise GalleryError(f"{self.path}: expected an open gallery, got one that was closed; open it again")
        lance()  # refuses a forked process
        return snapshot

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        self.snapshot  # noqa: B018 (refuses a closed one before anything is written)
        return self._store.writer(self._timeout)

    def __len__(self) -> int:
        return self.snapshot.rows

    def __contains__(self, identity: object) -> bool:
        return isinstance(identity, str) and bool(self.positions([identity]))

    def __repr__(self) -> str:
        state = "closed" if self._seen is None else f"faces={len(self)}, version={self.version}"
        return f"Gallery({str(self.path)!r}, {state})"

    def ids(self) -> Iterator[str]:
        """All ids, by position."""
        for batch in self.snapshot.scan(["id"]):
            yield from batch.column("id").to_pylist()

    def ids_of(self, person: str) -> list[str]:
        """Ids of a person's faces, by position.

        Raises:
            GalleryError: not a text.
        """
        checked_text(person, "gallery.ids_of: person")
        theirs = gallery_package("pyarrow.compute").field("person") == person
        return [name for b in self.snapshot.scan(["id"], filter=theirs) for name in b.column("id").to_pylist()]

    def positions(self, ids: Iterable[str]) -> dict[str, int]:
        """Positions of those of the ids that there are."""
        return self.snapshot.find(several(ids, "gallery.positions: ids"))

    def get(self, ids: Sequence[str]) -> tuple[Templates, list[dict[str, Any]]]:
        """Stored templates and metadata of faces.

        Returns:
            Templates of role "gallery" [N], and a dictionary with "id", "person" and "metadata" for each.

        Raises:
            GalleryError: an id that is not in the gallery.

        Example:
            >>> import tempfile, torch, xcos_ext
            >>> faces = xcos_ext.Templates.from_features(torch.randn(1, 8, 7, 7))
            >>> gallery = Gallery.create(tempfile.mkdtemp(), faces)
            >>> _ = gallery.add(["ann/0"], faces, metadata=[{"camera": 3}])
            >>> gallery.get(["ann/0"])[1]
            [{'id': 'ann/0', 'person': None, 'metadata': {'camera': 3}}]
        """
        snapshot = self.snapshot  # one for all: another thread may refresh meanwhile
        places = _places(snapshot, _known(snapshot, ids, "gallery.get"))
        labels = snapshot.labels(places)
        rows = [dict(zip(labels, row, strict=True)) for row in zip(*labels.values(), strict=True)]
        return gather(snapshot, self._tiles, places), rows

    def templates_at(self, positions: Sequence[int]) -> Templates:
        """Stored templates by their positions, of role "gallery" [N].

        Raises:
            TypeError: a position that is no integer.
            GalleryError: a position outside.
        """
        snapshot = self.snapshot
        several(positions, "gallery.templates_at: positions", "integers", ordered=True)
        return gather(snapshot, self._tiles, _places(snapshot, positions))

    def info(self) -> dict[str, Any]:
        """Counts, sizes, head and model, as plain values."""
        snapshot = self.snapshot
        persons = snapshot.persons()
        data = folder_bytes(self._store.data)
        return {
            "path": str(self.path),
            "faces": snapshot.rows,
            "persons": len(persons.dictionary),
            "faces_without_person": persons.null_count,
            "removed_but_stored": len(snapshot.deleted),
            "version": snapshot.version,
            "fragments": len(snapshot.fragments),
            "bytes": data,
            "bytes_per_face": data / snapshot.places if snapshot.places else None,
            "template_bytes": self.layout.face_bytes,
            "tiles_bytes": 0 if self._tiles.folder is None else folder_bytes(self._tiles.folder),
            "tiles_ready": sum(self._tiles.file(f) is not None for f in snapshot.fragments),
            "grid": list(self.layout.grid),
            "channels": self.layout.channels,
            "dtype": str(self.layout.dtype).removeprefix("torch."),
            **{name: getattr(self.layout, name) for name in ("head", "model", "model_name", "threshold")},
        }

    # ------------------------------------------------------------------ writing

    def add(
        self,
        ids: Sequence[str],
        templates: Templates | Tensor,
        *,
        persons: Sequence[str | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        on_duplicate: Literal["error", "skip", "replace"] = "error",
    ) -> int:
        """Enrol faces, all of them or none, in one commit.

        Args:
            ids: N texts, each once; any Unicode but the empty text.
            templates: N, of role "gallery" or "both"; or, with a model, features F [N, C, H, W].
            persons: who they are; None: not known.
            metadata: mappings that JSON can hold, searchable through ``where``; integers of at most 64 bits.
            on_duplicate: what to do about ids that are in the gallery: refuse everything, leave the stored faces as
                they are, or put the new ones in their place (they move to the end).

        Returns:
            Number of faces written.

        Raises:
            GalleryError: wrong ids, persons or metadata, ids twice, templates of another head or that are not finite, a
                full disk.
            GalleryBusyError: another process is writing.
            TypeError: other types.
        """
        return len(self._add_named(ids, templates, persons, metadata, on_duplicate))

    def _add_named(
        self,
        ids: Sequence[str],
        templates: Any,
        persons: Sequence[str | None] | None,
        metadata: Sequence[Mapping[str, Any] | None] | None,
        on_duplicate: str,
    ) -> list[str]:
        """:meth:`add`; returns the ids of the faces written."""
        where = "gallery.add"
        if on_duplicate not in ("error", "skip", "replace"):
            raise GalleryError(f"{where}: on_duplicate: expected 'error', 'skip' or 'replace', got {on_duplicate!r}")
        names = [
            checked_text(value, f"{where}: ids[{i}]")
            for i, value in enumerate(several(ids, f"{where}: ids", ordered=True))
        ]
        persons = None if persons is None else list(several(persons, f"{where}: persons", ordered=True))
        metadata = None if metadata is None else list(several(metadata, f"{where}: metadata", "mappings", ordered=True))
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise GalleryError(f"{where}: ids: expected each once, got {_shown(twice)} more than once")
        stored = self._templates(templates, "gallery", "templates", where)
        try:
            stored = stored.as_gallery().to("cpu")
        except ValueError as error:
            raise GalleryError(
                f"{where}: templates: expected templates of role 'gallery' or 'both', got role {stored.role!r}; "
                "make them with templates(features, role='gallery')"
            ) from error
        for name, values in (("templates", stored), ("persons", persons), ("metadata", metadata)):
            if values is not None and len(values) != len(names):
                raise GalleryError(f"{where}: {name}: expected {len(names)} like ids, got {len(values)}")
        nothing = [None] * len(names)
        people = [
            None if value is None else checked_text(value, f"{where}: persons[{i}]")
            for i, value in enumerate(nothing if persons is None else persons)
        ]
        texts = [
            checked_metadata(value, f"{where}: metadata[{i}]")
            for i, value in enumerate(nothing if metadata is None else metadata)
        ]
        self.layout.check_finite(stored, "templates", where, names)
        if not names:
            return []
        with self._writing():
            newest, lock = self._store.snapshot()
            try:
                taken = newest.find(names)
            finally:
                lock.release()
            if taken and on_duplicate == "error":
                raise GalleryError(
                    f"{where}: ids: expected new ones, got {_shown([i for i in names if i in taken])}, already "
                    "enrolled; on_duplicate='skip' or 'replace' says what to do"
                )
            if taken and on_duplicate == "skip":
                kept = [i for i, name in enumerate(names) if name not in taken]
                if not kept:
                    self.refresh()  # as after every writing
                    return []
                stored, names = stored[kept], [names[i] for i in kept]
                people, texts = [people[i] for i in kept], [texts[i] for i in kept]
            table = self.layout.batch(stored, names, people, texts)
            self._store.add(table, replace=bool(taken) and on_duplicate == "replace")
        self.refresh()
        return names

    def enroll(
        self,
        photos: StrPath | Sequence[StrPath] | Sequence[Picture],
        *,
        person: str | None = None,
        detector: Any = None,
        policy: str = "prominent",
        strict: bool = False,
        batch: int = 256,
        threads: int = 2,
        on_duplicate: Literal["skip", "replace", "error"] = "skip",
        progress: Progress | None = None,
    ) -> Enrolment:
        """Enrol photographs: find the faces, make templates, commit some at a time.

        An interrupted call can be repeated: it goes on where it was. The folder that a picture lies in is its person.

        Args:
            photos: pictures, folders (all below them) and zip archives; or :class:`~xcos_ext.gallery.enroll.Picture`.
            person: who is on all of them; None: from the folders.
            detector: see :func:`xcos_ext.verify`.
            policy, strict: which of several faces, and whether aligned crops must look like one; see
                :func:`xcos_ext.faces.extract_face`.
            batch: faces a commit.
            threads: that read.
            on_duplicate: about ids that are in the gallery.
            progress: is told (pictures gone through, all).

        Returns:
            :class:`~xcos_ext.gallery.enroll.Enrolment`: what was enrolled, skipped, left out, and why.

        Raises:
            GalleryError: another model's gallery, no pictures, names twice. Commits before it stay.

        Example:
            >>> import tempfile
            >>> from PIL import Image
            >>> folder, gallery = tempfile.mkdtemp(), Gallery.create(tempfile.mkdtemp())
            >>> Image.new("RGB", (112, 112)).save(f"{folder}/wall.png")
            >>> list(gallery.enroll(folder).skipped)
            ['wall.png']
        """
        given = [photos] if isinstance(photos, (str, os.PathLike)) else list(several(photos, "photos", "paths"))
        pictures: list[Any] = given
        left_out: dict[str, str] = {}
        if not all(isinstance(one, Picture) for one in given):
            pictures, left_out = find_pictures(given, person=person)  # type: ignore[arg-type]
        how: Any = {"policy": policy, "strict": strict, "batch": batch, "threads": threads}
        done = enroll(
            self, self._own_model(), pictures, detector_maker(detector), on_duplicate=on_duplicate, progress=progress,
            **how,
        )  # fmt: skip
        return dataclasses.replace(done, left_out=left_out)

    def find(
        self,
        photos: Any,
        k: int = 5,
        *,
        detector: Any = None,
        policy: str = "prominent",
        strict: bool = False,
        threshold: float | None = None,
        fpir: float | None = None,
        fusion: Fusion | None = None,
        attention: str = "own",
        reading: Progress | None = None,
        **how: Any,
    ) -> Found:
        """Who looks like the faces of photographs: every enrolled face is scored.

        Args:
            photos: a picture in any form that :func:`xcos_ext.verify` takes, or several; also folders and archives.
            k: candidates for each.
            detector: see :func:`xcos_ext.verify`.
            policy, strict: see :meth:`enroll`.
            threshold: from which score on it is the same person; None: the model's for one pair.
            fpir: instead: the threshold at which a stranger finds anybody at most at this rate in a gallery of this
                size (:func:`~xcos_ext.gallery.identification_threshold`).
            fusion: all photographs are one person: ``"max"`` or ``"mean"`` of their scores.
            attention: as of :meth:`search`.
            reading: is told (pictures read, all).
            **how: what else :meth:`search` takes: ``by``, ``where``, ``rerank``, ``explain``, ``progress``.

        Returns:
            :class:`~xcos_ext.gallery.Found`; ``gallery.find("a.jpg")[0]`` are the hits of one picture.

        Raises:
            PictureError: no picture has a usable face.
            GalleryError, TypeError: as :meth:`search`.
        """
        return find(
            self, self._embedder(), photos, k, detector=detector, policy=policy, strict=strict, threshold=threshold,
            fpir=fpir, fusion=fusion, reading=reading, attention=attention, **how,
        )  # fmt: skip

    def _embedder(self) -> XCosModel:
        """A copy of the model that embeds faster, kept because making it takes longer than to embed a picture."""
        model = self._own_model()
        mark = model.fingerprint()
        if self._fast is None or self._fast[0] != mark:
            self.check_model(model)
            self._fast = mark, for_inference(model)
        return self._fast[1]

    def _own_model(self) -> XCosModel:
        """The model that makes this gallery's templates: it was given, or is the shipped one."""
        if not isinstance(self._model, XCosModel):
            model = load_model()
            self.check_model(model)
            self._model = model
        return self._model

    def remove(self, ids: Sequence[str]) -> int:
        """Delete faces, all of them or none, in one commit; returns their number.

        Searches do not find them any more; their bytes go with :meth:`compact`.

        Raises:
            GalleryError: an unknown id, or the folder cannot be written.
            GalleryBusyError: another process is writing.
        """
        wanted = list(dict.fromkeys(several(ids, "gallery.remove: ids")))
        with self._writing():
            snapshot = self.refresh().snapshot
            positions = _known(snapshot, wanted, "gallery.remove")
            if positions:
                self._store.delete(snapshot, _places(snapshot, positions))
        self.refresh()
        return len(positions)

    def compact(self, *, timeout: float = 30.0, progress: Callable[[str], None] | None = None) -> dict[str, int]:
        """Rewrite the gallery without removed faces, then delete all older versions and their tiles.

        Afterwards nothing of a removed face is left in the folder.

        Args:
            timeout: seconds to wait for readers of older versions.
            progress: is told what is being done.

        Returns:
            Bytes before and after, and fragments removed and added.

        Raises:
            GalleryBusyError: somebody writes, or still reads an older version; in the latter case the newest version is
                compact, and old files go with the next call.

        Example:
            >>> import tempfile, torch, xcos_ext
            >>> faces = xcos_ext.Templates.from_features(torch.randn(9, 8, 7, 7))
            >>> gallery = Gallery.create(tempfile.mkdtemp(), faces)
            >>> gallery.add([str(i) for i in range(9)], faces), gallery.remove(["3", "4"])
            (9, 2)
            >>> report = gallery.compact()
            >>> report["bytes_after"] < report["bytes_before"], gallery.verify()["ok"]
            (True, True)
        """
        tick = progress or (lambda text: None)
        with self._writing():
            # This object reads nothing meanwhile, and must not be waited for.
            self._lock.release()
            try:
                report = self._store.compact(timeout, tick)
            finally:
                self.refresh()
            tick("deleting tiles")
            self._tiles.purge({f.key for f in self.snapshot.fragments})
        return report

    def verify(self, *, progress: Progress | None = None) -> dict[str, Any]:
        """Read everything and compare it with the checksums that it was written with.

        Damaged tiles are deleted, for they are made again from the rows.

        Returns:
            ``ok``; ``faces`` read; ``damaged``: position, id (None where it cannot be read) and what is damaged, for
            each; ``unreadable``: file and positions that cannot be read at all; ``tiles_dropped``.
        """
        return verify(self._store, self.snapshot, self._tiles, progress or quiet)

    # ------------------------------------------------------------------ searching

    def _templates(
        self, templates: Templates | Tensor, role: Literal["probe", "gallery"], name: str, where: str
    ) -> Templates:
        if isinstance(templates, Tensor):
            if self._model is None:
                raise TypeError(f"{where}: {name}: expected Templates, got a tensor; features need the gallery's model")
            templates = self._model.templates(templates, role, self.layout.dtype)
        return self.layout.check(templates, name, where)

    def tiles(
        self, device: torch.device | str = "cpu", *, where: str | None = None, begin: int = 0, end: int | None = None
    ) -> Iterator[Tile]:
        """The stored templates as a stream of tiles, for scoring of one's own.

        Args:
            device: where to.
            where: filter, see :meth:`search`.
            begin, end: positions of a part.
        """
        snapshot = self.snapshot
        # The end of all is a position as well: one more than the last.
        first, last = snapshot.places_of(np.array([begin, snapshot.rows if end is None else min(end, snapshot.rows)]))
        selected = None if where is None else snapshot.select(where)
        return stream(snapshot, self._tiles, torch.device(device), selected=selected, begin=int(first), end=int(last))

    def _search(self, request: SimpleNamespace) -> Hits:
        return self._checked(Shard(), request).run()

    def _checked(self, shard: Shard, request: SimpleNamespace) -> Search:
        """A search of a shard, checked and ready to run."""
        probes = self._templates(request.probes, "probe", "probes", WHERE)
        self.layout.check_finite(probes, "probes", WHERE)
        return Search.of(self.snapshot, self._tiles, shard, probes, request)

    def dedupe(self, threshold: float | None = None, *, progress: Progress | None = None) -> Duplicates:
        """All pairs of the gallery's faces that score at least a threshold, and the groups that they make up.

        Every pair is scored; where its two orders score differently, both, and the better counts. The work is done
        where the model is that the gallery was opened with; on the CPU if with none.

        Args:
            threshold: None: the model's.
            progress: is told (pairs scored, all).

        Raises:
            TypeError: a threshold that is no number.
            GalleryError: no threshold is known; or the head's attention is not symmetric and the gallery was opened
                without its model, which has to make probes of the stored faces.

        Example:
            >>> import tempfile, torch, xcos_ext
            >>> faces = xcos_ext.Templates.from_features(torch.randn(2, 8, 7, 7))
            >>> gallery = Gallery.create(tempfile.mkdtemp(), faces)
            >>> _ = gallery.add(["a", "b", "a again"], faces[[0, 1, 0]])
            >>> gallery.dedupe(0.9).groups
            [['a', 'a again']]
        """
        t = self.layout.threshold if threshold is None else checked_number("gallery.dedupe", "threshold", threshold)
        if t is None or not math.isfinite(t):
            raise GalleryError(f"gallery.dedupe: threshold: expected a finite number, got {threshold}")
        if self._model is None and not symmetric(self.layout):
            raise GalleryError("gallery.dedupe: model: expected the gallery to be opened with its model, got none")
        return find_duplicates(self.snapshot, self._tiles, self._model, t, progress or quiet)


def _places(snapshot: Snapshot, positions: Sequence[int]) -> np.ndarray:
    refuse_masked(positions=positions)
    given = np.asarray(positions)
    if given.size and given.dtype.kind not in "iu":
        raise TypeError(f"positions: expected integers, got {given.dtype}")
    chosen = given.astype(np.int64).reshape(-1)
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < snapshot.rows):
        raise GalleryError(f"positions: expected 0 to {snapshot.rows - 1}, got {chosen.min()} to {chosen.max()}")
    return snapshot.places_of(chosen)


def _known(snapshot: Snapshot, ids: Sequence[str], where: str) -> list[int]:
    wanted = list(several(ids, f"{where}: ids", ordered=True))
    found = snapshot.find(wanted)
    missing = [i for i in dict.fromkeys(wanted) if i not in found]
    if missing:
        raise GalleryError(f"{where}: ids: expected ids that are in the gallery, got {_shown(missing)}")
    return [found[i] for i in wanted]


def _shown(names: Sequence[str], most: int = 3) -> str:
    """Some names in words."""
    text = ", ".join(repr(name if len(name) <= 60 else name[:57] + "...") for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
