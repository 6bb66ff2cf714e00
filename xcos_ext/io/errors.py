"""Errors a user can meet. Each message names the argument or file, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "DeviceError",
    "GalleryBusyError",
    "GalleryDamagedError",
    "GalleryError",
    "LostRankError",
    "ModelError",
    "PictureError",
    "XCosError",
]


class XCosError(Exception):
    """Base of every error that xcos_ext raises on purpose outside the operators (those raise RuntimeError).

    >>> issubclass(ModelError, XCosError), issubclass(PictureError, ValueError)
    (True, True)
    """


class DeviceError(XCosError, ValueError):
    """A device that is none, or that cannot be used here."""


class ModelError(XCosError, ValueError):
    """A weights file or a network that cannot be used: missing, damaged, unsafe, or of another architecture."""


class PictureError(XCosError, ValueError):
    """A picture that cannot be used: unreadable, too large, without a face, or of the wrong size."""


class GalleryError(XCosError, ValueError):
    """A gallery that cannot be used as asked: not there, of another head, ids that are taken or unknown."""


class GalleryBusyError(GalleryError):
    """Another process holds what is needed: it writes, or it still reads what should be deleted."""


class GalleryDamagedError(GalleryError):
    """Stored faces that are not what was written.

    Attributes:
        rows: positions of the damaged faces in the gallery, as far as they are known.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class LostRankError(GalleryError):
    """Processes that search together have lost some of their number: killed, stopped, or cut off.

    Attributes:
        ranks: those that are lost, ascending, as the process group numbers them; none where only the store of the
            process group is known to be gone.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
