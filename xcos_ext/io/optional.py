"""Packages of the extras, imported when they are first needed."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .errors import XCosError

__all__ = ["MissingPackageError", "gallery_package", "need"]

_PIP_NAMES = {"PIL": "pillow", "cv2": "opencv-python-headless", "faiss": "faiss-cpu", "lance": "pylance"}


class MissingPackageError(XCosError, ImportError):
    """An optional package is not installed; the message says which one and how to install it."""


def need(module: str, purpose: str, *, extra: str = "cli") -> Any:
    """Import an optional module.

    Args:
        module: dotted name, e.g. ``"cv2"``.
        purpose: what it is needed for, to complete "... needs <package>".
        extra: of this package, that brings it.

    Raises:
        MissingPackageError: it is not installed, or its own imports fail.

    >>> need("json", "an example").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        package = _PIP_NAMES.get(top, top)
        missing = isinstance(error, ModuleNotFoundError) and error.name == top
        reason = "which is not installed" if missing else f"which cannot be loaded ({error})"
        raise MissingPackageError(f"{purpose} needs {package}, {reason}: pip install 'xcos_ext[{extra}]'") from error


#: A module of the ``gallery`` extra: lance (its package is called pylance), pyarrow, xxhash, filelock.
gallery_package = functools.partial(need, purpose="a gallery", extra="gallery")
