"""Verification sets as insightface distributes them (``lfw.bin``, ``cfp_fp.bin``, ``agedb_30.bin``, ...)."""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xcos_ext.faces import decode_picture

from .pairs import PairList

__all__ = ["InsightfaceBin"]

#: The largest published sets take some 100 MB.
MAX_BYTES = 1 << 30
_FOLDS = 10


class _Array:
    """What a pickle says about a NumPy array or number: never handed to NumPy's own reconstruction."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def items(self) -> Any:
        """The raw bytes of a uint8 array, the booleans of a bool array, the members of an object array."""
        _, shape, dtype, fortran, content = self.state
        if not isinstance(dtype, _DType) or not isinstance(shape, tuple) or fortran not in (False, 0):
            raise ValueError("an array of an unknown form")
        held = {"u1": bytes, "b1": bytes, "O8": list}.get(dtype.kind)
        if held is None or not isinstance(content, held):
            raise ValueError(f"an array of {dtype.kind!r}; expected uint8 or bool")
        size = math.prod(int(length) for length in shape)
        if len(content) != size:
            raise ValueError(f"an array of shape {shape} with {len(content)} members")
        return [byte != 0 for byte in content] if dtype.kind == "b1" else content


class _DType:
    def __init__(self, kind: Any = "", *_: Any) -> None:
        self.kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else str(kind)

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and flags; bytes and booleans have neither


def _scalar(dtype: Any, content: Any = b"") -> bool:
    if not isinstance(dtype, _DType) or dtype.kind != "b1" or not isinstance(content, bytes) or len(content) != 1:
        raise ValueError("a NumPy number that is not a bool")
    return content != b"\0"


def _encode(text: Any, encoding: Any = "") -> bytes:
    """How Python 3 writes bytes in the pickle protocols of Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1"):
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin-1")


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """NumPy's form in pickle protocol 5."""
    array = _Array()
    array.state = (1, shape, dtype, order != "C", bytes(content) if isinstance(content, (bytes, bytearray)) else None)
    return array


def _nothing() -> bytes:
    return b""  # how an empty bytes object is written there


_ADMITTED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _nothing,
    ("builtins", "bytes"): _nothing,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    **{(f"numpy.{package}.numeric", "_frombuffer"): _from_buffer for package in ("core", "_core")},
    **{
        (f"numpy.{package}.multiarray", name): stand_in
        for package in ("core", "_core")
        for name, stand_in in (("_reconstruct", _Array), ("scalar", _scalar))
    },
}


class _Refused(pickle.UnpicklingError):
    """A pickle that asks for something that such a file does not need."""


class _Unpickler(pickle.Unpickler):
    """Plain containers, bytes, booleans, and inert stand-ins for NumPy's arrays: nothing of any module is called."""

    def find_class(self, module: str, name: str) -> Any:
        found = _ADMITTED.get((module, name))
        if found is None:
            raise _Refused(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent object")


def _check_sizes(data: bytes) -> None:
    """Lengths and memo positions are taken at their word by the unpickler, which would allocate them."""
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name and argument is not None and int(argument) > len(data):
            raise ValueError(f"memo position {argument} in a file of {len(data)} bytes")


def _contents(file: Path) -> Any:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{file}: too large: {size:,} bytes, at most {MAX_BYTES:,} are accepted")
        data = stream.read(MAX_BYTES + 1)
    try:
        _check_sizes(data)
        # Python 2 wrote the pictures as str, which has to stay bytes.
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except _Refused as error:
        raise ValueError(
            f"{file}: refused, because the pickle could run code (it asks for '{error}'); nothing in it was executed. "
            "Expected a list of pictures and a list of booleans"
        ) from error
    except (
        pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError, MemoryError,
        OverflowError, RecursionError, UnicodeError, struct.error,
    ) as error:  # fmt: skip
        raise ValueError(f"{file}: damaged, truncated, or not an insightface .bin file ({error})") from error


def _bytes(item: Any) -> bytes:
    content = item.items() if isinstance(item, _Array) else item
    if not isinstance(content, (bytes, bytearray)) or not content:
        raise ValueError(f"a picture: expected its bytes, got {type(content).__name__}")
    return bytes(content)


def _bool(item: Any) -> bool:
    if not isinstance(item, (bool, int)) or item not in (0, 1):
        raise ValueError(f"a label: expected True or False, got {type(item).__name__}")
    return bool(item)


class InsightfaceBin(PairList):
    """A pickle of (list of encoded pictures, list of booleans): pictures 2 i and 2 i + 1 are pair i.

    The pickle is read by an unpickler that knows plain containers, bytes, booleans and inert stand-ins for NumPy
    arrays of them: a file that names anything else is refused before anything is called. The file is held in
    memory, encoded. Pictures are aligned crops. Ten consecutive folds, as insightface's own evaluation makes
    them; nothing says who is who.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "two.bin").write_bytes(pickle.dumps(([b"a", b"b", b"c", b"d"], [True, False])))
    ...     InsightfaceBin(Path(folder, "two.bin")).genuine.tolist()
    [True, False]

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: too large, truncated, refused, or of another structure.
    """

    format = "bin"
    aligned = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        contents = _contents(self.path)
        try:
            pictures, labels = contents
            members = [part.items() if isinstance(part, _Array) else part for part in (pictures, labels)]
            if not all(isinstance(part, (list, tuple)) for part in members):
                raise ValueError("expected two lists")
            self._pictures = [_bytes(item) for item in members[0]]
            genuine = [_bool(item) for item in members[1]]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: expected (list of pictures, list of booleans): {error}") from error
        pairs = len(genuine)
        if not pairs or len(self._pictures) != 2 * pairs:
            raise ValueError(
                f"{self.path}: expected two pictures a label, got {len(self._pictures)} for {pairs} labels"
            )
        named = [(f"{2 * i:06d}", f"{2 * i + 1:06d}") for i in range(pairs)]
        folds = np.repeat(np.arange(_FOLDS), [len(part) for part in np.array_split(np.arange(pairs), _FOLDS)])
        super().__init__(named, genuine, folds)

    def read(self, key: str) -> NDArray[np.uint8]:
        """As :meth:`PairList.read`."""
        return decode_picture(self._pictures[int(key)], f"{self.path}: picture {int(key)}")
