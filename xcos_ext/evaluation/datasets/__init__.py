"""Readers of face data sets."""

from .cfp import CFP
from .csv_pairs import CSVPairs
from .formats import FORMATS, open_pairs
from .insightface import InsightfaceBin
from .lfw import LFW, Pair, read_pairs
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
