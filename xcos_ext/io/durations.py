"""Seconds and rates as people read them."""

from __future__ import annotations

__all__ = ["duration", "rate", "span"]

_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))


def _unit(seconds: float) -> tuple[str, float]:
    return next((unit for unit in _UNITS if seconds >= unit[1]), _UNITS[-1])


def _number(value: float) -> str:
    """Three digits that count, never with an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    """``0.00461`` -> ``"4.61 ms"``; None -> ``"-"``."""
    if seconds is None:
        return "-"
    unit, scale = _unit(seconds)
    return f"{_number(seconds / scale)} {unit}"


def span(seconds: float, low: float, high: float) -> str:
    """A duration and its interval, all in one unit: ``"4.61 ms (4.60 – 4.82)"``."""
    _, scale = _unit(seconds)
    return f"{duration(seconds)} ({_number(low / scale)} – {_number(high / scale)})"


def rate(per_second: float, unit: str) -> str:
    """``(2_341.2, "pairs")`` -> ``"2,341 pairs/s"``; from a million on ``"1.11 M pairs/s"``."""
    for name, scale in (("G ", 1e9), ("M ", 1e6)):
        if per_second >= scale:
            return f"{_number(per_second / scale)} {name}{unit}/s"
    return f"{_number(per_second)} {unit}/s"
