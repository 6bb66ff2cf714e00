"""Readers of face data sets."""

from .lfw import LFW, Pair, read_pairs
from .pictures import PersonFolder

__all__ = ["LFW", "Pair", "PersonFolder", "read_pairs"]
