"""Pictures in a folder or in a zip archive read in place, by path or sorted by person."""

from __future__ import annotations

import contextlib
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from xcos_ext.io.errors import PictureError
from xcos_ext.io.text import composed, display_name, few

from .pictures import (
    MAX_PIXELS,
    READABLE,
    decode_picture,
    is_system_file,
    named_as_picture,
    read_contents,
    read_picture,
    read_whole,
    why_unreadable,
)

__all__ = ["PersonFolder", "PictureTree"]


class PictureTree:
    """Pictures in a folder or a zip archive, by their path in it.

    Folders are searched through all of their folders, links to folders too. Archives are read in place, without
    unpacking; objects can be pickled and used from several processes and threads.

    Paths are in Unicode's composed form (NFC), however the folder or archive spells them: macOS takes names apart.

    Args:
        path: the folder or zip archive.

    Attributes:
        path: the same.
        names: paths of all pictures in it, with ``/``, sorted: of the files with a picture's suffix. Hidden files and
            those that systems leave behind are none.
        left_out: what else is in it, path -> why it is no picture; hidden files are not told.

    Raises:
        FileNotFoundError: no such path.
        ValueError: not a folder or zip archive, a damaged archive, or two files whose paths are the same.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "ann").mkdir()
    ...     _ = (Path(folder) / "ann" / "1.ppm").write_bytes(b"P6 1 1 255 abc")
    ...     (Path(folder) / "ann" / "1.heic").touch()
    ...     tree = PictureTree(folder)
    ...     tree.names, tree.find("1.ppm"), tree.read("ann/1.ppm").shape, list(tree.left_out)
    (('ann/1.ppm',), 'ann/1.ppm', (1, 1, 3), ['ann/1.heic'])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)  # as messages call it
        self._place = self.path.absolute()  # pictures are read later, wherever os.chdir has gone
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such folder or archive")
        if not self.path.is_file() and not self.path.is_dir():  # a pipe would be waited for
            raise ValueError(f"{self.path}: expected a folder or a zip archive, got something else")
        self._zipped = self.path.is_file()
        self._local = threading.local()
        self.left_out: dict[str, str] = {}
        # The name as it is shown and asked for -> as the folder or archive has it.
        self._known: dict[str, str] = {}
        pictures = []
        for name, own in sorted(self._entries() if self._zipped else _below(self.path, self.left_out)):
            if name in self._known:
                both = " and ".join(ascii(one) for one in (self._known[name], own))
                raise ValueError(f"{self.path}: expected each name once, got {both}: rename one of them")
            self._known[name] = own
            if not named_as_picture(name):
                if not any(map(is_system_file, name.split("/"))):
                    self.left_out[name] = f"not a picture by its suffix; expected {READABLE}"
            elif not is_system_file(name):
                pictures.append(name)
        self.names = tuple(pictures)
        tops = {name.split("/", 1)[0] for name in self.names}
        # Archives usually hold one folder, which lists of pictures do not mention.
        self._top = f"{tops.pop()}/" if len(tops) == 1 else ""

    def _entries(self) -> list[tuple[str, str]]:
        if not zipfile.is_zipfile(self.path):
            raise ValueError(f"{self.path}: expected a folder or a zip archive")
        try:
            with zipfile.ZipFile(self.path) as archive:
                return [(_name_of(entry), entry.filename) for entry in archive.infolist() if not entry.is_dir()]
        except Exception as error:  # zipfile raises nearly anything on damaged data: IndexError of an empty name
            raise ValueError(f"{self.path}: damaged zip archive ({why_unreadable(error)})") from error

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_local"]  # open archives do not travel to another process
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def find(self, path: str) -> str | None:
        """The name of a file given its path from the root, or from the root's only folder; None: not here.

        Whoever names a file means it, whatever its suffix: :meth:`read` says if it is no picture.
        """
        parts = PurePosixPath(composed(path).replace("\\", "/")).parts
        name = "/".join(part for part in parts if part != ".")
        return next((candidate for candidate in (name, self._top + name) if candidate in self._known), None)

    def read(self, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Decode one picture, as :func:`~xcos_ext.faces.read_picture` does.

        Args:
            name: one of ``names``, or what :meth:`find` gives.
            max_pixels: larger pictures are refused from the header alone.

        Returns:
            uint8 RGB [height, width, 3].

        Raises:
            KeyError: no such name.
            PictureError: the picture cannot be used.
        """
        if not self._zipped:
            return read_picture(self._place / self._known[name], max_pixels=max_pixels, name=self._label(name))
        return decode_picture(self.contents(name, max_pixels=max_pixels), self._label(name), max_pixels=max_pixels)

    def _label(self, name: str) -> str:
        return display_name(self.path) + (": " if self._zipped else "/") + display_name(name)

    def contents(self, name: str, *, max_pixels: int = MAX_PIXELS) -> bytes:
        """The undecoded file of one picture; raises as :meth:`read` does.

        Files are refused that are larger than any picture of ``max_pixels``, whatever an archive says of their size.
        """
        own, label = self._known[name], self._label(name)
        if not self._zipped:
            return read_contents(self._place / own, name=label)
        try:
            archive = self._archive()
            with archive.open(own) as file:
                return read_whole(file, label, archive.getinfo(own).file_size, max_pixels=max_pixels)
        except PictureError:
            raise
        except Exception as error:  # zipfile and its decompressors raise nearly anything on damaged data
            raise PictureError(f"{label}: cannot be read from the archive ({why_unreadable(error)})") from error

    def _archive(self) -> zipfile.ZipFile:
        """One handle per thread and process: they must not share a file position, not even across a fork."""
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.archive = zipfile.ZipFile(self._place)
            self._local.pid = os.getpid()
        archive: zipfile.ZipFile = self._local.archive
        return archive


def _name_of(entry: zipfile.ZipInfo) -> str:
    """An entry's name. Some programs, macOS's too, write UTF-8 and do not say so: zipfile reads code page 437."""
    name = entry.filename
    if not entry.flag_bits & 0x800 and not name.isascii():
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return composed(name)


def _below(folder: Path, left_out: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Files below a folder, (name, the folder's own spelling); links to folders are followed, but never in a circle."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        below, above = waiting.pop()
        where = folder / below
        try:
            status = where.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                left_out[composed(below)] = "a link to a folder that it lies in"
                continue
            with os.scandir(where) as entries:
                for entry in entries:
                    own = f"{below}/{entry.name}" if below else entry.name
                    if _is_folder(entry):
                        waiting.append((own, above | {here}))
                    else:
                        yield composed(own), own
        except OSError as error:
            if not below:
                raise
            left_out[composed(below)] = f"a folder that cannot be read ({error.strerror or error})"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: whoever reads it is told
        return False


class PersonFolder:
    """Pictures stored as ``.../<person>/<picture>``, in a folder or a zip archive (:class:`PictureTree`).

    A picture's key is ``"<person>/<file name>"``. People and keys are sorted, so indices are reproducible.

    Attributes:
        left_out: what is not taken, path -> why: what is no picture, and pictures that lie in no person's folder.

    Args:
        path: the folder or zip archive; what lies above the person folders does not matter.

    Raises:
        FileNotFoundError: no such path.
        ValueError: not a folder or zip archive, no pictures in it, or two pictures with the same key.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for person in ("bob", "ann"):
    ...         (Path(folder) / person).mkdir()
    ...         _ = (Path(folder) / person / "1.ppm").write_bytes(b"P6 1 1 255 abc")
    ...     PersonFolder(folder).keys
    ('ann/1.ppm', 'bob/1.ppm')
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._tree = PictureTree(path)
        self.left_out = dict(self._tree.left_out)
        self._names: dict[str, str] = {}
        people: dict[str, list[str]] = {}
        for name in self._tree.names:
            parts = PurePosixPath(name)
            if not parts.parent.name:
                self.left_out[name] = "a picture in no person's folder"
                continue
            key = f"{parts.parent.name}/{parts.name}"
            if key in self._names:
                raise ValueError(f"{self.path}: two pictures are called {key}: {self._names[key]} and {name}")
            self._names[key] = name
            people.setdefault(parts.parent.name, []).append(key)
        if not people:
            others = f"; left out: {few(self.left_out, 3)}" if self.left_out else ""
            raise ValueError(f"{self.path}: no pictures of the form <person>/<picture> in it{others}")
        self._people = {person: tuple(keys) for person, keys in sorted(people.items())}
        # LFW lists pictures as person and number; the suffix is not part of that.
        self._stems = {key.rsplit(".", 1)[0]: key for key in self._names}

    @property
    def path(self) -> Path:
        """The folder or archive."""
        return self._tree.path

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._names)

    def __contains__(self, key: object) -> bool:
        return key in self._names

    @property
    def people(self) -> tuple[str, ...]:
        """Names of the people, sorted."""
        return tuple(self._people)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all pictures, sorted by person, then by file name."""
        return tuple(key for keys in self._people.values() for key in keys)

    def of(self, person: str) -> tuple[str, ...]:
        """Keys of one person's pictures.

        Raises:
            KeyError: no such person.
        """
        return self._people[person]

    def numbered(self, person: str, number: int) -> str | None:
        """The key of LFW's picture ``<person>_<number>`` (four digits), or None if it is not here."""
        person = composed(person)
        return self._stems.get(f"{person}/{person}_{number:04d}")

    def read(self, key: str) -> np.ndarray:
        """Decode one picture.

        Returns:
            uint8 RGB [height, width, 3].

        Raises:
            KeyError: no such key.
            PictureError: the picture cannot be used.
        """
        return self._tree.read(self._names[key])

    def contents(self, key: str) -> bytes:
        """The undecoded file of one picture.

        Raises:
            KeyError: no such key.
            PictureError: it cannot be read.
        """
        return self._tree.contents(self._names[key])
