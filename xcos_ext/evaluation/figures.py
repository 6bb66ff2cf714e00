"""Figures with their intervals, and results as plain values."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Estimate", "Interval", "plain"]


class Interval(NamedTuple):
    """Attributes: low and high, both ends of a percentile interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """Attributes: value of a figure, and its interval, or None without replicates."""

    value: float
    interval: Interval | None


def plain(value: Any) -> Any:
    """A result ready for JSON.

    Dataclasses and named tuples become dictionaries (an interval its two ends), sequences and arrays lists, the keys of
    mappings text, numbers that are not finite None.

    >>> plain({1: Estimate(float("nan"), Interval(0.1, 0.2)), "a": np.arange(2)})
    {'1': {'value': None, 'interval': [0.1, 0.2]}, 'a': [0, 1]}
    """
    if isinstance(value, Interval):
        return [plain(end) for end in value]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
