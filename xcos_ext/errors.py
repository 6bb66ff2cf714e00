"""Errors a user can meet. Each message names the argument or file, what was expected and what came."""

from __future__ import annotations

__all__ = ["ModelError", "PictureError", "XCosError"]


class XCosError(Exception):
    """Base of every error that xcos_ext raises on purpose outside the operators (those raise RuntimeError)."""


class ModelError(XCosError, ValueError):
    """A weights file or a network that cannot be used: missing, damaged, unsafe, or of another architecture."""


class PictureError(XCosError, ValueError):
    """A picture that cannot be used: unreadable, too large, without a face, or of the wrong size."""
