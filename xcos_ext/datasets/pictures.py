"""Pictures sorted by person, from a folder or from a zip archive read in place."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from xcos_ext.errors import PictureError

__all__ = ["PersonFolder"]

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"})


class PersonFolder:
    """Pictures stored as ``.../<person>/<picture>``, in a folder or a zip archive.

    A picture's key is ``"<person>/<file name>"``. People and keys are sorted, so indices are reproducible.
    Archives are read in place, without unpacking; objects can be pickled and used from several processes and
    threads.

    Args:
        path: the folder or zip archive; what lies above the person folders does not matter.

    Raises:
        FileNotFoundError: no such path.
        ValueError: not a folder or zip archive, no pictures in it, or two pictures with the same key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such folder or archive")
        self._zipped = self.path.is_file()
        self._local = threading.local()
        if self._zipped:
            if not zipfile.is_zipfile(self.path):
                raise ValueError(f"{self.path}: expected a folder or a zip archive")
            with zipfile.ZipFile(self.path) as archive:
                names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        else:
            names = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
        self._names: dict[str, str] = {}
        people: dict[str, list[str]] = {}
        for name in sorted(names):
            parts = PurePosixPath(name)
            if parts.suffix.lower() not in _SUFFIXES or not parts.parent.name or parts.name.startswith("."):
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

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_local"]  # open archives do not travel to another process
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

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

    def _bytes(self, key: str) -> bytes:
        name = self._names[key]
        if not self._zipped:
            return (self.path / name).read_bytes()
        # One handle per thread and process: they must not share a file position, not even across a fork.
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.archive = zipfile.ZipFile(self.path)
            self._local.pid = os.getpid()
        return self._local.archive.read(name)

    def read(self, key: str) -> np.ndarray:
        """Decode one picture.

        Returns:
            uint8 RGB [height, width, 3].

        Raises:
            KeyError: no such key.
            PictureError: the picture cannot be decoded.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("reading pictures needs Pillow: pip install 'xcos_ext[cli]'") from error
        try:
            with Image.open(io.BytesIO(self._bytes(key))) as picture:
                return np.array(picture.convert("RGB"))
        except (
            OSError,
            SyntaxError,
            ValueError,
            zipfile.BadZipFile,
            Image.DecompressionBombError,
        ) as error:
            raise PictureError(f"{self.path}: {key}: cannot be decoded ({error})") from error
