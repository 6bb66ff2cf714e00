"""Settings from TOML: every mistake names its key, what was expected and what came."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from xcos_ext.training.settings import NONE, SETTINGS, ConfigError, build, override, read_toml


@dataclass(frozen=True, config=SETTINGS)
class Inner:
    rate: float = Field(default=0.5, gt=0, le=1)
    kind: Literal["mse", "l1"] = "mse"


@dataclass(frozen=True, config=SETTINGS)
class Outer:
    steps: int = Field(ge=1)
    name: str = "x"
    flag: bool = False
    limit: Annotated[float | None, Field(gt=0), NONE] = None
    folds: tuple[int, ...] = ()
    inner: Inner = Inner()


def test_values_become_objects() -> None:
    made = build(Outer, {"steps": 3, "limit": 2, "folds": [1, 2], "inner": {"kind": "l1"}})
    assert made == Outer(3, limit=2.0, folds=(1, 2), inner=Inner(kind="l1"))
    assert build(Outer, {"steps": 3, "limit": "none"}).limit is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "steps: expected a value, got nothing"),
        ({"steps": 0}, "steps: expected greater than or equal to 1, got 0"),
        ({"steps": 1.5}, "steps: expected a valid integer, got 1.5"),
        ({"steps": True}, "steps: expected a valid integer, got True"),
        ({"steps": 1, "stepz": 2}, r"stepz: no such setting; did you mean steps\?"),
        ({"steps": 1, "flag": 1}, "flag: expected a valid boolean, got 1"),
        ({"steps": 1, "name": 3}, "name: expected a valid string, got 3"),
        ({"steps": 1, "limit": -1}, "limit: expected greater than 0, got -1"),
        ({"steps": 1, "folds": [1, "a"]}, "folds: expected a valid integer, got 'a'"),
        ({"steps": 1, "folds": 3}, "folds: expected a valid array, got 3"),
        ({"steps": 1, "inner": {"rate": 0}}, "inner.rate: expected greater than 0, got 0"),
        ({"steps": 1, "inner": {"rate": float("nan")}}, "inner.rate: expected a finite number, got nan"),
        ({"steps": 1, "inner": {"kind": "l2"}}, "inner.kind: expected 'mse' or 'l1', got 'l2'"),
        ({"steps": 1, "inner": {"rates": 1}}, r"inner.rates: no such setting; did you mean inner.rate\?"),
        ({"steps": 1, "inner": 3}, "inner: expected an object, got 3"),
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


def test_deep_and_endless_files(tmp_path: Path) -> None:
    for name, text in (
        ("deep", "a = " + "[" * 100_000),
        ("dotted", f"a{'.a' * 3000} = 1"),
        ("long", "a = " + "9" * 9999),
    ):
        (tmp_path / f"{name}.toml").write_text(text)
        with pytest.raises(ConfigError, match=rf"{name}\.toml: not a TOML file"):
            read_toml(tmp_path / f"{name}.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(
        ConfigError, match=r"pipe\.toml: expected a TOML file, got something that is not a regular file"
    ):
        read_toml(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match=r"--set a\.a.*: expected table\.key=value"):
        override({}, [f"a{'.a' * 3000}=1"])


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x.toml: cannot be read: No such file"):
        read_toml(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_text("a = [1,\n")
    with pytest.raises(ConfigError, match=r"x.toml: not a TOML file \("):
        read_toml(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbfa = 1\r\n")  # as some editors save it
    assert read_toml(tmp_path / "x.toml") == {"a": 1}
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"x.toml: not a TOML file"):
        read_toml(tmp_path / "x.toml")
