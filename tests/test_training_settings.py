"""Settings from TOML: every mistake names its key, what was expected and what came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from xcos_ext.training.settings import ConfigError, build, number, override, read_toml


@dataclass(frozen=True)
class Inner:
    rate: float = number(0.5, above=0, maximum=1)
    kind: Literal["mse", "l1"] = "mse"


@dataclass(frozen=True)
class Outer:
    steps: int = number(minimum=1)
    name: str = "x"
    flag: bool = False
    limit: float | None = number(None, above=0)
    folds: tuple[int, ...] = ()
    inner: Inner = Inner()


def test_values_become_objects() -> None:
    made = build(Outer, {"steps": 3, "limit": 2, "folds": [1, 2], "inner": {"kind": "l1"}})
    assert made == Outer(3, limit=2.0, folds=(1, 2), inner=Inner(kind="l1"))
    assert build(Outer, {"steps": 3, "limit": "none"}).limit is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "steps: expected a whole number >= 1, got nothing"),
        ({"steps": 0}, "steps: expected a whole number >= 1, got 0"),
        ({"steps": 1.5}, "steps: expected a whole number >= 1, got 1.5"),
        ({"steps": True}, "steps: expected a whole number >= 1, got True"),
        ({"steps": 1, "stepz": 2}, r"stepz: no such setting; did you mean steps\?"),
        ({"steps": 1, "flag": 1}, "flag: expected true or false, got 1"),
        ({"steps": 1, "name": 3}, "name: expected a text, got 3"),
        ({"steps": 1, "limit": -1}, "limit: expected a number or none > 0, got -1"),
        ({"steps": 1, "folds": [1, "a"]}, "folds: expected a whole number, got 'a'"),
        ({"steps": 1, "folds": 3}, "folds: expected a list, each a whole number, got 3"),
        ({"steps": 1, "inner": {"rate": 0}}, "inner.rate: expected a number > 0 and <= 1, got 0"),
        ({"steps": 1, "inner": {"rate": float("nan")}}, "inner.rate: expected a number > 0 and <= 1, got nan"),
        ({"steps": 1, "inner": {"kind": "l2"}}, "inner.kind: expected 'mse' or 'l1', got 'l2'"),
        ({"steps": 1, "inner": {"rates": 1}}, r"inner.rates: no such setting; did you mean inner.rate\?"),
        ({"steps": 1, "inner": 3}, "inner: expected a table, got 3"),
    ],
)
def test_mistakes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, values)


def test_assignments() -> None:
    tables = {"task": "head", "train": {"steps": 1}}
    changed = override(tables, ["train.steps=5", "train.rate=1e-3", "loss.kind=l1", "data.folds=[1, 2]", "task=x"])
    assert changed == {
        "task": "x",
        "train": {"steps": 5, "rate": 1e-3},
        "loss": {"kind": "l1"},
        "data": {"folds": [1, 2]},
    }
    assert tables["train"] == {"steps": 1}
    for wrong in ("steps", "=3", "train.=3"):
        with pytest.raises(ConfigError, match=r"expected table.key=value"):
            override(tables, [wrong])
    with pytest.raises(ConfigError, match="task is a value, not a table"):
        override(tables, ["task.x=1"])


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x.toml: cannot be read: No such file"):
        read_toml(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_text("a = [1,\n")
    with pytest.raises(ConfigError, match=r"x.toml: not a TOML file \("):
        read_toml(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"x.toml: not a TOML file"):
        read_toml(tmp_path / "x.toml")
