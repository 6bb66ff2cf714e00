"""Packages of the ``gallery`` extra, imported when they are first needed."""

from __future__ import annotations

import functools
from typing import Any

from xcos_ext.io.optional import need

__all__ = ["compute", "lance", "pyarrow", "xxhash"]

_PURPOSE = "a gallery"


@functools.cache
def lance() -> Any:
    """Lance, the columnar store (its package is called pylance)."""
    return need("lance", _PURPOSE, extra="gallery")


@functools.cache
def pyarrow() -> Any:
    """Arrow."""
    return need("pyarrow", _PURPOSE, extra="gallery")


@functools.cache
def compute() -> Any:
    """Arrow's functions on columns."""
    return need("pyarrow.compute", _PURPOSE, extra="gallery")


@functools.cache
def xxhash() -> Any:
    """Checksums."""
    return need("xxhash", _PURPOSE, extra="gallery")
