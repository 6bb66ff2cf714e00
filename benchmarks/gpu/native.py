"""The native driver (tests/cuda_native) within a stage's time: every group of cases, or compute-sanitizer's tools.

python benchmarks/gpu/native.py [--tools memcheck,racecheck,synccheck]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from building import NATIVE, REPOSITORY
from stages import SKIPPED, emit, seconds_left

# Of a tool's part, for its processes to be killed and its table to be printed.
MARGIN_S = 6.0


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default="", help="of compute-sanitizer, each with an equal part of the time")
    options = parser.parse_args()
    begin = time.monotonic()
    # Built by the stage before; what it could not build, this one would not either.
    program = next((REPOSITORY / "build" / "cuda_native").glob("*/native"), None)
    if program is None:
        emit(case="native driver", status="failed", message="not built")
        return 1
    tools = [tool for tool in options.tools.split(",") if tool] or [None]
    worst = 0
    for index, tool in enumerate(tools):
        part = seconds_left(begin, 100) / (len(tools) - index)
        command = [sys.executable, str(NATIVE / "run.py"), str(program), "--deadline", f"{max(part - MARGIN_S, 1):.1f}"]
        if os.environ.get("XCOS_STAGE_OUT"):
            command += ["--out", os.environ["XCOS_STAGE_OUT"]]
        if tool is not None:
            command += ["--short", "--tool", tool]
        code = subprocess.run(command).returncode
        worst = worst if code in (0, SKIPPED) else 1
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
