"""Galleries: faces kept on disk, changed and searched at the same time, on one machine or several."""

from xcos_ext.io.errors import GalleryBusyError, GalleryDamagedError, GalleryError, LostRankError

from .faiss_index import FaissIndex
from .find import Found
from .gallery import Gallery
from .hits import Duplicate, Duplicates, Hit, HitMaps, Hits
from .sharded import ShardedGallery
from .thresholds import identification_threshold

__all__ = [
    "Duplicate",
    "Duplicates",
    "FaissIndex",
    "Found",
    "Gallery",
    "GalleryBusyError",
    "GalleryDamagedError",
    "GalleryError",
    "Hit",
    "HitMaps",
    "Hits",
    "LostRankError",
    "ShardedGallery",
    "identification_threshold",
]
