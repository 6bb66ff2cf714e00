"""Reading results files that may come from anywhere: whole, or refused with the reason.

Their samples are the truth: figures that a file claims are not read but computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from xcos_ext.io.errors import XCosError

from .cases import DEVICES, DTYPES, PIXELS, RUNTIMES, STAGES, Key
from .report import FORMAT, SCHEMA, Report, Result, Skipped
from .statistics import MOST_SAMPLES

__all__ = ["FormatError", "read_report", "report_from_dict"]

_MOST_BYTES = 256 << 20
_LARGEST = 1e6


class FormatError(XCosError, ValueError):
    """A results file that cannot be used: missing, not of this command, of another version, or damaged."""


def report_from_dict(data: Any, where: str = "results") -> Report:
    """The report that :meth:`Report.as_dict` wrote.

    Args:
        data: as :func:`json.loads` gives it, from any source.
        where: the file, for messages.

    Raises:
        FormatError: another format or version, or a part that is missing or out of range.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{where}: expected a file that xcos bench --json wrote, got something else")
    if data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        raise FormatError(f"{where}: expected version {SCHEMA} of the format, got {str(data.get('schema'))[:40]!r}")
    try:
        results = [_result(_typed(entry, dict, "cases")) for entry in _list(data, "cases")]
        skipped = [
            Skipped(_key(_typed(entry, dict, "skipped")), str(_get(entry, "reason", str))[:1000])
            for entry in _list(data, "skipped")
        ]
        report = Report(
            machine=_machine(_get(data, "machine", dict)),
            conditions=_get(data, "conditions", dict),
            model=_model(_get(data, "model", dict)),
            settings=_get(data, "settings", dict),
            results=results,
            skipped=skipped,
            groups=[_typed(entry, dict, "groups") for entry in _list(data, "groups")],
            warnings=[_typed(entry, str, "warnings") for entry in _list(data, "warnings")],
        )
    except _Damaged as error:
        raise FormatError(f"{where}: damaged: {error}") from error
    keys = [result.key for result in results]
    if len(set(keys)) != len(keys):
        raise FormatError(f"{where}: damaged: a case is there twice")
    return report


class _Damaged(Exception):
    """What is wrong inside a file."""


T = TypeVar("T")


def _typed(value: Any, kind: type[T], name: str) -> T:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _Damaged(f"{name}: expected {_KINDS[kind]}, got {_KINDS.get(type(value), type(value).__name__)}")
    return value


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _get(data: Mapping[str, Any], name: str, kind: type[T]) -> T:
    if name not in data:
        raise _Damaged(f"{name} is missing")
    return _typed(data[name], kind, name)


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    return _get(data, name, list)


def _integer(data: Mapping[str, Any], name: str, least: int) -> int:
    value = _get(data, name, int)
    if not least <= value <= 2**53:
        raise _Damaged(f"{name}: expected at least {least}, got {str(value)[:40]}")
    return value


def _number(value: Any, name: str, *, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Damaged(f"{name}: expected a number, got {_KINDS.get(type(value), type(value).__name__)}")
    if not (0 < value < _LARGEST or (zero and value == 0)):
        raise _Damaged(f"{name}: expected a number above 0, got {repr(value)[:40]}")
    return float(value)


_KNOWN = {"stage": tuple(STAGES), "runtime": RUNTIMES, "device": DEVICES, "dtype": (*DTYPES, PIXELS)}


def _key(data: Mapping[str, Any]) -> Key:
    names = {name: _get(data, name, str) for name in ("stage", "runtime", "device", "dtype")}
    for name, known in _KNOWN.items():
        if names[name] not in known:
            raise _Damaged(f"{name}: expected one of {', '.join(known)}, got {names[name][:40]!r}")
    return Key(**names, batch=_integer(data, "batch", 1))


def _result(data: Mapping[str, Any]) -> Result:
    rounds = tuple(
        tuple(_number(value, "rounds") for value in _typed(values, list, "rounds")) for values in _list(data, "rounds")
    )
    kept = sum(map(len, rounds))
    if not rounds or not all(rounds) or kept > MOST_SAMPLES:
        raise _Damaged(f"rounds: expected 1 to {MOST_SAMPLES:,} samples, at least one a round, got {kept:,}")
    error = data.get("error")
    if error is not None:
        error = _number(error, "error", zero=True)
    bursts = tuple(_number(value, "bursts") for value in _list(data, "bursts"))
    if len(bursts) > MOST_SAMPLES:
        raise _Damaged(f"bursts: expected at most {MOST_SAMPLES:,}, got {len(bursts):,}")
    return Result(
        key=_key(data),
        items=_integer(data, "items", 1),
        clock=_get(data, "clock", str),
        rounds=rounds,
        bursts=bursts,
        calls=_integer(data, "calls", kept),
        warm_calls=_integer(data, "warm_calls", 0),
        preparation=_number(data.get("preparation"), "preparation", zero=True),
        detail=_get(data, "detail", str),
        error=error,
    )


def _machine(data: dict[str, Any]) -> dict[str, Any]:
    for name in ("processor", "torch", "commit", "date"):
        _get(data, name, str)
    _integer(data, "threads", 1)
    if "gpu" in data:
        _get(_get(data, "gpu", dict), "name", str)
    return data


def _model(data: dict[str, Any]) -> dict[str, Any]:
    for name in ("name", "fingerprint"):
        _get(data, name, str)
    return data


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_report(path: str | os.PathLike[str]) -> Report:
    """Read a results file.

    Args:
        path: that ``xcos bench --json`` wrote; it may come from anywhere: nothing in it is trusted.

    Raises:
        FormatError: missing, too large, not JSON, not a results file, of another version, or damaged.
    """
    from xcos_ext.faces import display_name

    file, where = Path(path), display_name(path)
    try:
        if not file.is_file():
            reason = "not a regular file" if file.exists() else "no such file"
            raise FormatError(f"{where}: {reason}")
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise FormatError(f"{where}: expected at most {_MOST_BYTES >> 20} MiB, got {size:,} bytes")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: expected JSON, got something that is not UTF-8 text") from error
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: expected JSON, got something else ({str(error)[:120]})") from error
    return report_from_dict(data, where)
