"""Settings: typed frozen dataclasses read from TOML, every mistake named by its key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from xcos_ext.io.errors import XCosError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ConfigError", "build", "number", "override", "read_toml"]

Settings = TypeVar("Settings")


class ConfigError(XCosError, ValueError):
    """A setting that cannot be used; the message names its key, what was expected and what came."""


def number(default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """A numeric field with limits: ``minimum``, ``maximum`` (both allowed), ``above``, ``below`` (both excluded)."""
    return dataclasses.field(default=default, metadata=limits)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: missing, unreadable, or not TOML; the message names line and column.
    """
    file = Path(path)
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a TOML file ({error})") from error


def override(tables: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Tables with ``table.key=value`` assignments applied; values are TOML, bare words are strings.

    Raises:
        ConfigError: an assignment of another form.
    """
    result: dict[str, Any] = {name: dict(t) if isinstance(t, Mapping) else t for name, t in tables.items()}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        keys = [key.strip() for key in name.split(".")]
        if not equals or not all(keys):
            raise ConfigError(f"--set {assignment}: expected table.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        table = result
        for key in keys[:-1]:
            inner = table.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {assignment}: {key} is a value, not a table")
            table = inner
        table[keys[-1]] = value
    return result


def build(kind: type[Settings], values: Mapping[str, Any], where: str = "") -> Settings:
    """A settings object from a table; nested dataclasses are tables in it.

    Args:
        kind: a dataclass whose fields are bool, int, float, str, Literal of strings, tuples of one of these, optional
            ones, or dataclasses.
        values: the table.
        where: the table's name, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing one, or a value of a wrong type or size.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1, 0.0)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(f"{prefix}{key}: no such setting{hint}")
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _value(hints[name], values[name], prefix + name, field.metadata)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name}: expected {_wanted(hints[name], field.metadata)}, got nothing")
    return kind(**arguments)


def _value(hint: Any, value: Any, key: str, limits: Mapping[str, float]) -> Any:
    options = _options(hint)
    if type(None) in options and value in (None, "none"):
        return None
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return build(typing.cast("type[Any]", option), value, key)
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return tuple(_value(typing.get_args(option)[0], item, key, limits) for item in value)
        if _fits(option, value):
            result = float(value) if option is float else value
            if not _within(result, limits):
                break
            return result
    raise ConfigError(f"{key}: expected {_wanted(hint, limits)}, got {value!r}")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(option: Any, value: Any) -> bool:
    if typing.get_origin(option) is typing.Literal:
        return value in typing.get_args(option)
    if option is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return option in (bool, str) and isinstance(value, option)


def _within(value: Any, limits: Mapping[str, float]) -> bool:
    if isinstance(value, (bool, str)):
        return True
    return (
        limits.get("minimum", -math.inf) <= value <= limits.get("maximum", math.inf)
        and value > limits.get("above", -math.inf)
        and value < limits.get("below", math.inf)
    )


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}


def _wanted(hint: Any, limits: Mapping[str, float]) -> str:
    words = []
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            words.append(" or ".join(map(repr, typing.get_args(option))))
        elif typing.get_origin(option) is tuple:
            words.append(f"a list, each {_wanted(typing.get_args(option)[0], limits)}")
        elif option in _NAMES:
            words.append(_NAMES[option])
        else:
            words.append("a table")
    bounds = {"minimum": ">=", "above": ">", "maximum": "<=", "below": "<"}
    rules = [f"{sign} {limits[name]:g}" for name, sign in bounds.items() if name in limits]
    return " or ".join(words) + (f" {' and '.join(rules)}" if rules else "")
