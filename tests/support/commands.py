"""Running the xcos command inside a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from xcos_ext.cli.app import xcos


def run(*arguments: str | Path, env: dict[str, str | None] | None = None) -> Result:
    """Run a command; XCOS_MODEL and XCOS_DEBUG are not set unless ``env`` says so."""
    runner = CliRunner(env={"XCOS_MODEL": None, "XCOS_DEBUG": None, **(env or {})})
    return runner.invoke(xcos, [str(a) for a in arguments])


def trouble(result: Result, *words: str) -> str:
    """The one line that a failure prints on stderr, which has these words."""
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("xcos: ")
    assert "Traceback" not in line
    for word in words:
        assert word in line, line
    return line


def strict(text: str) -> Any:
    """JSON without NaN or infinities."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)
