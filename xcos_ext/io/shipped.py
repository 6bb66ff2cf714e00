"""Files that come with the package, and a first look at files that others bring; nothing here needs torch."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ModelError
from .text import display_name

__all__ = ["DATA", "default_weights", "readable_file"]

#: Folder of the files.
DATA = Path(__file__).resolve().parents[1] / "data"

_DEFAULT_WEIGHTS = DATA / "xcos_slim.safetensors"


def default_weights() -> Path:
    """The file of the model that the package ships: slim, trained by its own scripts (docs/models.md).

    Raises:
        ModelError: the package was installed without it.
    """
    if not _DEFAULT_WEIGHTS.is_file():
        raise ModelError(
            f"no model: {_DEFAULT_WEIGHTS} is missing from this installation; name another one. Suitable are an xCos "
            "checkpoint (github.com/ntubiolin/xcos) or the weights of an IR, IR-SE or MobileFaceNet recogniser "
            "(github.com/TreB1eN/InsightFace_Pytorch has some)"
        )
    return _DEFAULT_WEIGHTS


def readable_file(path: str | os.PathLike[str], what: str) -> Path:
    """The path of a readable, non-empty regular file.

    Args:
        path: the file.
        what: is expected, for messages: "a weights file".

    Raises:
        ModelError: missing, not a regular file, empty or not readable.

    >>> readable_file(DATA, "a weights file")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    xcos_ext.io.errors.ModelError: ...data: expected a weights file, got a directory
    """
    file, name = Path(path), display_name(path)
    try:
        if not file.exists():
            raise ModelError(f"{name}: no such file")
        if not file.is_file():
            got = "a directory" if file.is_dir() else "something that is not a regular file"
            raise ModelError(f"{name}: expected {what}, got {got}")
        if file.stat().st_size == 0:
            raise ModelError(f"{name}: the file is empty")
        with file.open("rb"):
            pass
    except OSError as error:
        raise ModelError(f"{name}: cannot be read: {error.strerror or error}") from error
    return file
