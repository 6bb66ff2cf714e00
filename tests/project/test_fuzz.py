"""A short run of tests/support/fuzz_driver.py; the long one is by hand (docs/reliability.md)."""

import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parents[1] / "support" / "fuzz_driver.py"


@pytest.mark.process
@pytest.mark.parametrize("kind", ["calls", "files"])
def test_hostile_calls_and_damaged_files_are_met_with_one_error(kind: str) -> None:
    counts = {"calls": "0", "files": "0", kind: "400" if kind == "calls" else "120"}
    options = [part for name, count in counts.items() for part in (f"--{name}", count)]
    run = subprocess.run([sys.executable, DRIVER, *options, "--seed", "1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
