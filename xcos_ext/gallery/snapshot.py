"""One committed version of a gallery, as its readers see it. Nothing here knows how faces are scored."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.io.errors import GalleryDamagedError, GalleryError
from xcos_ext.io.optional import gallery_package
from xcos_ext.io.text import first_line as text_line

from .labels import CHECKED_LABELS, LABELS, checked_labels
from .layout import Layout, damaged_rows, iter_slices
from .locks import ReaderLock

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DATA", "Fragment", "Snapshot", "engine_failed", "first_line", "ranges", "reading"]

#: Folder of Lance's data set in a gallery's folder.
DATA = "templates.lance"

_IO_BYTES = 128 << 20  # read ahead of what is being used
#: Parts of an SQL condition in which a parenthesis means nothing: texts, names, comments.
_TEXTS = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|--[^\n]*|/\*.*?\*/""", re.DOTALL)
_IDS_AT_ONCE = 4096  # that are looked up, or whose labels are


@dataclass(frozen=True, eq=False)
class Fragment:
    """Rows that were written together; they never change, but some may be deleted."""

    number: int  # Lance's
    key: str  # names the fragment's data for good, whatever is deleted
    first: int  # place of its first row
    rows: int  # all of them
    deleted: np.ndarray  # offsets of the deleted ones, ascending
    paths: tuple[str, ...]  # of its data files


class Snapshot:
    """One committed version, as its readers see it whatever is written meanwhile.

    A row's *place* counts all rows, deleted ones included; its *position* counts the others only, and is what users
    see. Both rise in the order in which rows were added.
    """

    def __init__(self, dataset: Any, layout: Layout, lock: ReaderLock, again: Callable[[int], Snapshot]) -> None:
        self.dataset = dataset
        self.version = int(dataset.version)
        self.layout = layout
        self._lock = lock  # lives as long as whoever still reads
        self._again = again  # opens a version, which another process has to lock anew
        self.fragments: list[Fragment] = []
        self.places = 0
        for fragment in dataset.get_fragments():
            paths = tuple(file.path for file in fragment.data_files())
            rows = fragment.physical_rows
            deleted = np.empty(0, np.int64)
            if fragment.num_deletions:
                live = self._addresses(fragments=[fragment]) & 0xFFFFFFFF
                deleted = np.setdiff1d(np.arange(rows), live, assume_unique=True)
            key = hashlib.blake2b("/".join(paths).encode(), digest_size=16).hexdigest()
            self.fragments.append(Fragment(fragment.fragment_id, key, self.places, rows, deleted, paths))
            self.places += rows

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again, (self.version,)

    def _addresses(self, **options: Any) -> np.ndarray:
        """Row addresses of a scan: fragment number * 2^32 + offset, in order."""
        table = self.dataset.scanner(columns=[], with_row_address=True, scan_in_order=True, **options).to_table()
        return table.column("_rowaddr").to_numpy().astype(np.int64)

    @functools.cached_property
    def deleted(self) -> np.ndarray:
        """Places of the deleted rows, ascending."""
        return np.concatenate([np.empty(0, np.int64), *(f.first + f.deleted for f in self.fragments)])

    @property
    def rows(self) -> int:
        """Faces that can be found."""
        return self.places - len(self.deleted)

    @functools.cached_property
    def mark(self) -> str:
        """Names what the places hold: equal for versions of the same rows."""
        parts = [f"{f.key}:{f.rows}" for f in self.fragments]
        digest = hashlib.blake2b("/".join(parts).encode(), digest_size=16)
        digest.update(self.deleted.tobytes())
        return digest.hexdigest()

    def positions(self, places: np.ndarray) -> np.ndarray:
        """Positions of places that are not deleted."""
        return places - np.searchsorted(self.deleted, places)

    def places_of(self, positions: np.ndarray) -> np.ndarray:
        """Places of positions."""
        # The i-th deleted row is at place d_i, so d_i - i rows that are not deleted come before it.
        return positions + np.searchsorted(self.deleted - np.arange(len(self.deleted)), positions, side="right")

    def select(self, where: str) -> np.ndarray:
        """Places of the rows that a filter selects, ascending; GalleryError where it cannot be understood."""
        if not isinstance(where, str):
            raise GalleryError(f"where: expected a filter like \"person = 'Ann'\", got {type(where).__name__}")
        if _closes_too_early(where):
            raise GalleryError(f"where: expected an SQL condition, got {where!r}: a parenthesis too many is closed")
        try:
            # In parentheses: Lance takes the condition that a text begins with, and would pass over what follows it
            # (a semicolon and another condition, LIMIT, a word too many). The line ends a comment.
            addresses = self._addresses(filter=f"({where}\n)")
        except BaseException as error:
            if not engine_failed(error):
                raise
            if not str(error).startswith("Invalid user input"):
                # The condition may be right, and the rows wrong.
                for fragment in self.fragments:
                    self.probe(fragment)
                for part in iter_slices(self.rows, _IDS_AT_ONCE):
                    self.labels(self.places_of(np.arange(part.start, part.stop)))
            raise GalleryError(f"where: expected an SQL condition, got {where!r}: {first_line(error)}") from error
        return np.sort(self._places(addresses))

    def _places(self, addresses: np.ndarray) -> np.ndarray:
        """Places of row addresses."""
        numbers = np.array([f.number for f in self.fragments], np.int64)
        firsts = np.array([f.first for f in self.fragments], np.int64)
        order = np.argsort(numbers)
        found = order[np.searchsorted(numbers, addresses >> 32, sorter=order)]
        return firsts[found] + (addresses & 0xFFFFFFFF)

    def take(self, positions: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Rows at positions."""
        return self.dataset.take(positions.tolist(), columns=list(columns))

    def labels(self, places: np.ndarray, columns: Sequence[str] = LABELS) -> dict[str, list[Any]]:
        """Labels of rows, in the order asked for, compared with their checksums; metadata parsed."""
        if len(places) == 0:
            return {name: [] for name in columns}
        unique, inverse = np.unique(self.positions(places), return_inverse=True)
        try:
            with reading(self):
                found, wrong = checked_labels(self.take(unique, CHECKED_LABELS))
        except GalleryDamagedError as error:
            unread = [part for part, rows in self.pieces(unique, CHECKED_LABELS) if rows is None]
            if not unread:
                raise
            raise _damage("labels", np.concatenate(unread)) from error
        if wrong:
            raise _damage("labels", unique[wrong])
        return {name: [found[name][i] for i in inverse] for name in columns}

    def probe(self, fragment: Fragment) -> None:
        """Read a row in each of the ways in which rows are read: files say in several places where a column is."""
        for columns in (*([name] for name in LABELS), CHECKED_LABELS, self.layout.tile_columns):
            for _ in self.scan(columns, fragment, limit=1):
                pass

    def pieces(
        self, positions: np.ndarray, columns: Sequence[str], size: int = 4096, tries: int = 512
    ) -> Iterator[tuple[np.ndarray, pa.Table | None]]:
        """Rows at ascending positions that cannot all be read: those that can, and None for those that cannot.

        ``size`` are read at a time; where that fails, ever fewer, until ``tries`` have failed.
        """
        waiting = [positions[start : start + size] for start in range(0, len(positions), size)][::-1]
        while waiting:
            piece = waiting.pop()
            try:
                rows = self.take(piece, columns)
            except BaseException as error:
                if not engine_failed(error):
                    raise
                rows = None
                if len(piece) > 1 and tries > 0:
                    tries -= 1
                    waiting += [piece[len(piece) // 2 :], piece[: len(piece) // 2]]
                    continue
            yield piece, rows

    def find(self, ids: Iterable[str]) -> dict[str, int]:
        """Positions of those of the ids that there are."""
        wanted = sorted(set(ids))
        found: dict[str, int] = {}
        for part in iter_slices(len(wanted), _IDS_AT_ONCE):
            those = gallery_package("pyarrow.compute").field("id").isin(wanted[part])
            with reading(self):
                table = self.dataset.scanner(columns=["id"], with_row_address=True, filter=those).to_table()
            places = self._places(table.column("_rowaddr").to_numpy().astype(np.int64))
            found.update(zip(table.column("id").to_pylist(), self.positions(places).tolist(), strict=True))
        return found

    def persons(self) -> pa.DictionaryArray:
        """The person of each face, by position."""
        pa = gallery_package("pyarrow")
        chunks = [batch.column("person") for batch in self.scan(["person"])]
        return pa.chunked_array(chunks, pa.string()).combine_chunks().dictionary_encode()

    def scan(
        self, columns: Sequence[str], fragment: Fragment | None = None, *, batch_size: int = 16384, **options: Any
    ) -> Iterator[pa.RecordBatch]:
        """Rows in order, of one fragment or of all, in bounded memory; GalleryDamagedError if they cannot be read."""
        with reading(self, fragment):
            yield from self.dataset.scanner(
                columns=list(columns),
                fragments=None if fragment is None else [self.dataset.get_fragment(fragment.number)],
                batch_size=batch_size,
                batch_readahead=1,
                fragment_readahead=1,
                io_buffer_size=_IO_BYTES,
                scan_in_order=True,
                **options,
            ).to_batches()

    def fragment_batches(
        self, fragment: Fragment, begin: int = 0, end: int | None = None, *, dead: Callable[[], None] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Rows of a fragment from ``begin`` on, deleted ones included: templates and checksums, compared, by tiles.

        ``dead`` is called before a batch with damage in deleted rows alone, which hurts nobody.
        """
        columns, rows = self.layout.tile_columns, self.layout.tile_rows
        end = fragment.rows if end is None else end
        done = begin
        options: dict[str, Any] = {"include_deleted_rows": True, "with_row_id": True, "strict_batch_size": True}
        if (begin, end) != (0, fragment.rows):
            options |= {"offset": begin, "limit": end - begin}
        for batch in self.scan(columns, fragment, batch_size=rows, **options):
            with reading(self, fragment):
                wrong = [done + row for row in damaged_rows(self.layout, batch)]
            if wrong and not np.isin(wrong, fragment.deleted).all():
                raise self.damage(fragment, wrong)
            if wrong and dead is not None:
                dead()
            done += batch.num_rows
            yield batch.select(columns)
        if done != end:
            raise self.damage(fragment, list(range(done, end)))

    def damage(self, fragment: Fragment, offsets: Sequence[int]) -> GalleryDamagedError:
        """The error for damaged templates of a fragment."""
        alive = np.setdiff1d(np.asarray(offsets, np.int64), fragment.deleted)
        path = f"{DATA}/data/{fragment.paths[0]}" if fragment.paths else DATA
        return _damage("templates", self.positions(fragment.first + alive), f" ({path})")


def _damage(what: str, positions: np.ndarray, where: str = "") -> GalleryDamagedError:
    listed = positions.tolist()
    return GalleryDamagedError(
        f"gallery: {what} at positions {ranges(listed)} are not what was written{where}; "
        "xcos gallery verify lists all damage",
        listed,
    )


def ranges(positions: Sequence[int], most: int = 8) -> str:
    """Positions in words: 3, 7-12, ..."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:most]]
    return ", ".join(words) + (", ..." if len(runs) > most else "") or "(deleted rows only)"


def _closes_too_early(where: str) -> bool:
    """Whether a condition closes a parenthesis that it has not opened."""
    open_ones = 0
    for sign in _TEXTS.sub("", where):
        open_ones += (sign == "(") - (sign == ")")
        if open_ones < 0:
            return True
    return False


def first_line(error: BaseException) -> str:
    """The first line of an engine's message, without the source line that it ends with."""
    return text_line(error, None).partition(", /")[0][:300]


def engine_failed(error: BaseException) -> bool:
    """Whether an error may be the engine's, whose panics are no Exceptions.

    KeyboardInterrupt and SystemExit that a signal's handler raised, and the engine has wrapped, are raised again.
    """
    if "External error: KeyboardInterrupt:" in str(error):
        raise KeyboardInterrupt from error
    _, wrapped, text = str(error).partition("External error: SystemExit:")
    if wrapped:
        code = text.split(",")[0].strip()
        raise SystemExit(int(code) if code.isdecimal() else code or None) from error
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def reading(snapshot: Snapshot, fragment: Fragment | None = None) -> Iterator[None]:
    """Turn the engine's failures into errors that say which rows cannot be read."""
    try:
        yield
    except (GalleryError, GeneratorExit, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        if not engine_failed(error):
            raise
        folder = Path(snapshot.dataset.uri.removeprefix("file://")) / "data"
        parts = snapshot.fragments if fragment is None else [fragment]
        if any(not (folder / path).exists() for f in parts for path in f.paths) and not _listed(snapshot):
            raise GalleryError(
                f"gallery: version {snapshot.version} is gone: it was compacted meanwhile; open the gallery again"
            ) from error
        if fragment is None:
            raise GalleryDamagedError(
                f"gallery: cannot be read ({first_line(error)}); xcos gallery verify says what is damaged"
            ) from error
        rows = np.setdiff1d(np.arange(fragment.rows), fragment.deleted)
        positions = snapshot.positions(fragment.first + rows).tolist()
        raise GalleryDamagedError(
            f"gallery: faces at positions {ranges(positions)} cannot be read "
            f"({DATA}/data/{fragment.paths[0]}: {first_line(error)})",
            positions,
        ) from error


def _listed(snapshot: Snapshot) -> bool:
    with contextlib.suppress(Exception):
        return any(v["version"] == snapshot.version for v in snapshot.dataset.versions())
    return False
