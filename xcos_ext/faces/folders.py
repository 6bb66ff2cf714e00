"""Pictures in a folder or in a zip archive read in place, by path or sorted by person."""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from xcos_ext.io.errors import PictureError

from .pictures import MAX_PIXELS, decode_picture, read_picture

__all__ = ["PersonFolder", "PictureTree"]

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"})


class PictureTree:
    """Pictures in a folder or a zip archive, by their path in it.

    Archives are read in place, without unpacking; objects can be pickled and used from several processes and
    threads.

    Args:
        path: the folder or zip archive.

    Attributes:
        path: the same.
        names: paths of all pictures in it, with ``/``, sorted.

    Raises:
        FileNotFoundError: no such path.
        ValueError: not a folder or zip archive.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "ann").mkdir()
    ...     _ = (Path(folder) / "ann" / "1.ppm").write_bytes(b"P6 1 1 255 abc")
    ...     tree = PictureTree(folder)
    ...     tree.names, tree.find("1.ppm"), tree.read("ann/1.ppm").shape
    (('ann/1.ppm',), 'ann/1.ppm', (1, 1, 3))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)  # as messages call it
        self._place = self.path.absolute()  # pictures are read later, wherever os.chdir has gone
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such folder or archive")
        self._zipped = self.path.is_file()
        self._local = threading.local()
        if self._zipped:
            if not zipfile.is_zipfile(self.path):
                raise ValueError(f"{self.path}: expected a folder or a zip archive")
            with zipfile.ZipFile(self.path) as archive:
                found = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        else:
            found = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
        self.names = tuple(name for name in sorted(found) if _is_picture(PurePosixPath(name)))
        self._known = frozenset(self.names)
        tops = {name.split("/", 1)[0] for name in self.names}
        # Archives usually hold one folder, which lists of pictures do not mention.
        self._top = f"{tops.pop()}/" if len(tops) == 1 else ""

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_local"]  # open archives do not travel to another process
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def find(self, path: str) -> str | None:
        """The name of a picture given its path from the root, or from the root's only folder; None: not here."""
        parts = PurePosixPath(path.replace("\\", "/")).parts
        name = "/".join(part for part in parts if part != ".")
        return next((candidate for candidate in (name, self._top + name) if candidate in self._known), None)

    def read(self, name: str, label: str | None = None, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Decode one picture, as :func:`~xcos_ext.faces.read_picture` does.

        Args:
            name: one of ``names``.
            label: what to call it in messages; by default its name.
            max_pixels: larger pictures are refused from the header alone.

        Returns:
            uint8 RGB [height, width, 3].

        Raises:
            KeyError: no such name.
            PictureError: the picture cannot be used.
        """
        if name not in self._known:
            raise KeyError(name)
        label = f"{self.path}: {label or name}"
        if not self._zipped:
            return read_picture(self._place / name, max_pixels=max_pixels, name=label)
        try:
            data = self._bytes(name)
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise PictureError(f"{label}: cannot be read from the archive ({error})") from error
        return decode_picture(data, label, max_pixels=max_pixels)

    def _bytes(self, name: str) -> bytes:
        if not self._zipped:
            return (self._place / name).read_bytes()
        # One handle per thread and process: they must not share a file position, not even across a fork.
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.archive = zipfile.ZipFile(self._place)
            self._local.pid = os.getpid()
        return self._local.archive.read(name)


def _is_picture(path: PurePosixPath) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


class PersonFolder:
    """Pictures stored as ``.../<person>/<picture>``, in a folder or a zip archive (:class:`PictureTree`).

    A picture's key is ``"<person>/<file name>"``. People and keys are sorted, so indices are reproducible.

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
        self._names: dict[str, str] = {}
        people: dict[str, list[str]] = {}
        for name in self._tree.names:
            parts = PurePosixPath(name)
            if not parts.parent.name:
                continue
            key = f"{parts.parent.name}/{parts.name}"
            if key in self._names:
                raise ValueError(f"{self.path}: two pictures are called {key}: {self._names[key]} and {name}")
            self._names[key] = name
            people.setdefault(parts.parent.name, []).append(key)
        if not people:
            raise ValueError(f"{self.path}: no pictures of the form <person>/<picture> in it")
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
        return self._stems.get(f"{person}/{person}_{number:04d}")

    def read(self, key: str) -> np.ndarray:
        """Decode one picture.

        Returns:
            uint8 RGB [height, width, 3].

        Raises:
            KeyError: no such key.
            PictureError: the picture cannot be used.
        """
        return self._tree.read(self._names[key], key)

    def contents(self, key: str) -> bytes:
        """The undecoded file of one picture.

        Raises:
            KeyError: no such key.
            OSError, zipfile.BadZipFile: it cannot be read.
        """
        return self._tree._bytes(self._names[key])
