"""An approximate index by faiss as the first stage of a search: candidates without going through the whole gallery."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from xcos_ext.io.atomic import OutputError, write_atomically
from xcos_ext.io.errors import GalleryError
from xcos_ext.io.optional import need
from xcos_ext.ops.templates import Templates

from .gallery import Gallery
from .snapshot import Snapshot

__all__ = ["FaissIndex"]

_TRAIN = 65_536  # faces, evenly chosen, from which an index learns its lists


def _faiss() -> Any:
    return need("faiss", "an approximate index", extra="faiss")


def _vectors(templates: Templates) -> np.ndarray:
    """Unit cells in a row, fp32 [N, cells * C]: their products are scores with uniform attention, times cells."""
    return templates.features.flatten(1).to(torch.float32).cpu().numpy()


class FaissIndex:
    """Finds the candidates of ``Gallery.search(..., rerank=R, coarse=index)`` by the score with uniform attention.

    It holds one state of a gallery, in memory, and refuses any other. How many true hits it finds depends on its kind
    and on ``lists``: have the search measure it (``recall_probes``).

    Attributes:
        index: faiss' own.
        mark: of the gallery's rows.
        lists: inverted lists that a probe looks into, where there are such (faiss' nprobe).

    Example:
        >>> import tempfile, torch, xcos_ext
        >>> faces = xcos_ext.Templates.from_features(torch.randn(3, 8, 7, 7))
        >>> gallery = xcos_ext.Gallery.create(tempfile.mkdtemp(), faces)
        >>> _ = gallery.add(["ann", "bob", "eve"], faces)
        >>> gallery.search(faces[1:2], k=1, rerank=2, coarse=FaissIndex.build(gallery), recall_probes=1)
        Hits(probes=1, k=1, approximate, recall 1.0000 on 1 probes, version=2)
    """

    def __init__(self, index: Any, mark: str, lists: int = 16) -> None:
        self.index = index
        self.mark = mark
        self.lists = lists

    @classmethod
    def build(
        cls,
        gallery: Gallery,
        kind: str | None = None,
        *,
        lists: int = 16,
    ) -> FaissIndex:
        """Index a gallery at the version that it shows.

        Args:
            gallery: with at least one face.
            kind: as ``faiss.index_factory`` understands it; None: inverted lists of 8-bit vectors, ``IVF<n>,SQ8`` with
                2 sqrt(N) lists (1 byte a feature; ``Flat`` below 1,000 faces).
            lists: lists a probe looks into.

        Raises:
            GalleryError: an empty gallery, or a kind that faiss does not know.
            MissingPackageError: the extra ``faiss`` is not installed.
        """
        faiss = _faiss()
        snapshot = gallery.snapshot
        if snapshot.rows == 0:
            raise GalleryError("faiss: gallery: expected at least one face, got none")
        if kind is None:
            kind = "Flat" if snapshot.rows < 1000 else f"IVF{int(2 * math.sqrt(snapshot.rows))},SQ8"
        columns = gallery.layout.channels * gallery.layout.grid[0] * gallery.layout.grid[1]
        try:
            index = faiss.index_factory(columns, kind, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                chosen = np.linspace(0, snapshot.rows - 1, min(_TRAIN, snapshot.rows)).astype(np.int64)
                index.train(_vectors(gallery.templates_at(chosen.tolist())))
            if not kind.startswith("IVF"):
                index = faiss.IndexIDMap(index)
            for tile in gallery.tiles():
                vectors = _vectors(tile.templates)
                places = np.arange(tile.first, tile.first + len(vectors))
                if tile.excluded is not None:
                    kept = ~tile.excluded.numpy()
                    vectors, places = vectors[kept], places[kept]
                index.add_with_ids(vectors, places)
        except RuntimeError as error:
            raise GalleryError(f"faiss: kind: expected one that faiss can build, got {kind!r} ({error})") from error
        return cls(index, snapshot.mark, lists)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index, and what it was made of beside it (``.json``)."""
        path = Path(path)
        about = path.with_name(path.name + ".json")
        text = json.dumps({"mark": self.mark, "lists": self.lists})

        def write(file: BinaryIO) -> None:
            _faiss().write_index(self.index, _faiss().PyCallbackIOWriter(file.write))
            # An index without what it was made of is refused; one beside another's would not be.
            about.unlink(missing_ok=True)

        try:
            write_atomically(path, write)
            write_atomically(about, lambda file: file.write(text.encode()))
        except (OSError, RuntimeError, OutputError) as error:
            raise GalleryError(f"{path}: cannot be written ({error})") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FaissIndex:
        """The index that :meth:`save` wrote. Load files that you trust: faiss' reader is not made for hostile ones.

        Raises:
            GalleryError: it is not there, or is not such an index.
        """
        path = Path(path)
        try:
            about = json.loads(path.with_name(path.name + ".json").read_text())
            return cls(_faiss().read_index(str(path)), str(about["mark"]), int(about["lists"]))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise GalleryError(f"{path}: expected an index that was saved here ({error})") from error

    def check(self, snapshot: Snapshot) -> None:
        """Refuse another state of the gallery.

        Raises:
            GalleryError: faces were added or removed since.
        """
        if snapshot.mark != self.mark:
            raise GalleryError(
                "coarse: expected an index of this version of the gallery, got one of another; build it again"
            )

    def candidates(self, probes: Templates, count: int) -> Tensor:
        """Places of the best by the index, int64 [P, count]; -1 where it finds fewer."""
        faiss = _faiss()
        with_lists = faiss.try_extract_index_ivf(self.index)
        if with_lists is not None:
            with_lists.nprobe = self.lists
        _, found = self.index.search(_vectors(probes), count)
        return torch.from_numpy(found)
