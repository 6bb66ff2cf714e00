"""Readers of face data sets."""

from .insightface import InsightfaceBin
from .lists import CFP, FORMATS, LFW, CSVPairs, Pair, open_pairs, read_pairs
from .pairs import PairList

__all__ = [
    "CFP",
    "FORMATS",
    "LFW",
    "CSVPairs",
    "InsightfaceBin",
    "Pair",
    "PairList",
    "open_pairs",
    "read_pairs",
]
