"""Runs the groups of a program built by build.py side by side, each a process. Needs Python's standard library.

    python tests/cuda_native/run.py PROGRAM --deadline 60 --out results.jsonl
    python tests/cuda_native/run.py PROGRAM --tool racecheck --short

The faults planted for a tool of compute-sanitizer (or for the program's own guards) come first and must be reported:
what misses them proves nothing. Every group's result is a line of the file as soon as it ends. The exit status is 0
only if all are ok.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

# What a tool has to report; "plain": the program itself.
PLANTED = {
    "plain": ("global-overflow",),
    "memcheck": ("global-overflow", "missing-face-mma"),
    "racecheck": ("missing-barrier",),
    "synccheck": ("divergent-barrier",),
}
# Those that take longest, first; the others follow in the program's order.
LONGEST = (
    "very_many",
    "matrix_many",
    "threads",
    "sizes",
    "shapes_full",
    "shapes_half",
    "tuned",
    "match_large",
    "match",
    "matrix_backward",
    "matrix_mma",
    "many",
    "topk",
    "head",
)
REPORTED = 9  # exit status of a program in which a fault was found
NO_GPU = 77
REPORT = re.compile(r"SUMMARY: [1-9]\d* (error|hazard)")
# Not under a tool, which would have to change code in the middle of a capture.
PLAIN_ONLY = ("capture",)


@dataclass
class Result:
    """How one process ended."""

    stage: str
    group: str
    status: str  # ok, failed, skipped, timeout, not run
    seconds: float = 0.0
    cases: int = 0
    message: str = ""
    kernels: list[str] = field(default_factory=list)


class Runs:
    """Processes side by side until a deadline; what each came to goes to a file at once."""

    def __init__(self, prefix: Sequence[str], deadline: float, out: Path | None) -> None:
        self.results: list[Result] = []
        self._prefix = list(prefix)
        self._deadline = deadline
        self._out = out
        self._lock = threading.Lock()

    def run(self, stage: str, arguments: Sequence[str], expected: int = 0) -> Result:
        """Runs the program once; ``expected``: the exit status that is ok."""
        result = self._run(stage, arguments, expected)
        with self._lock:
            self.results.append(result)
            if self._out is not None:
                with self._out.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
        return result

    def _run(self, stage: str, arguments: Sequence[str], expected: int) -> Result:
        result = Result(stage, " ".join(word for word in arguments if not word.startswith("--")), "not run")
        start = time.monotonic()
        if start >= self._deadline:
            return result
        try:
            process = subprocess.Popen(
                [*self._prefix, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            result.status, result.message = "failed", str(error)
            return result
        try:
            text = process.communicate(timeout=self._deadline - start)[0]
            result.status = {expected: "ok", NO_GPU: "skipped"}.get(process.returncode, "failed")
            # A tool that ends the device's context may give the program's own status; its report counts.
            if expected == REPORTED and process.returncode > 0 and REPORT.search(text):
                result.status = "ok"
        except subprocess.TimeoutExpired:
            # The tool's children too, or they would hold the pipe and the GPU.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            text = ""
            with contextlib.suppress(subprocess.TimeoutExpired):  # of what even this does not end
                text = process.communicate(timeout=5)[0]
            result.status = "timeout"
        result.seconds = round(time.monotonic() - start, 2)
        lines = text.splitlines()
        result.kernels = [line.removeprefix("kernel ") for line in lines if line.startswith("kernel ")]
        lines = [line for line in lines if line.strip() and not line.startswith("kernel ")]
        count = next((found for line in reversed(lines) if (found := re.search(r"(\d+) cases, ", line))), None)
        result.cases = int(count.group(1)) if count else 0
        result.message = "\n".join(lines[-1:] if result.status == "ok" else lines[:6] + lines[6:][-12:])
        if result.status == "failed" and process.returncode < 0:
            result.message += f"\nended by signal {-process.returncode}"
        elif result.status == "failed":
            result.message += f"\nexit status {process.returncode}"
        return result


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer: PATH, then the toolkit of CUDA_HOME or CUDA_PATH, then the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + ["/usr/local/cuda"]
    places = ["compute-sanitizer"]
    for home in homes:
        places += [f"{home}/bin/compute-sanitizer", f"{home}/compute-sanitizer/compute-sanitizer"]
    return next((found for place in places if (found := shutil.which(place))), None)


def list_groups(program: str) -> list[str]:
    """The program's groups, longest first."""
    done = subprocess.run([program, "list"], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        sys.exit(f"{program} list failed with status {done.returncode}: {done.stderr.strip()}")
    names = [name for name in done.stdout.split("\n") if name and not name.startswith("planted ")]
    return [name for name in LONGEST if name in names] + [name for name in names if name not in LONGEST]


def table(results: Sequence[Result]) -> str:
    """A line a result, what failed with its message; totals at the end."""
    lines = [f"{r.status:8} {r.seconds:7.2f} s {r.cases:6} cases  {r.stage}: {r.group}" for r in results]
    for r in results:
        if r.status not in ("ok", "not run"):
            lines += [f"--- {r.stage}: {r.group}: {r.status}", r.message]
    counts = {status: sum(r.status == status for r in results) for status in dict.fromkeys(r.status for r in results)}
    kernels = {kernel for r in results for kernel in r.kernels}
    lines.append(", ".join(f"{n} {status}" for status, n in counts.items()) + f"; {len(kernels)} kernels were launched")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program")
    parser.add_argument(
        "--tool", choices=sorted(set(PLANTED) - {"plain"}), help="run under this tool of compute-sanitizer"
    )
    parser.add_argument("--sanitizer", help="compute-sanitizer (default: found in the usual places)")
    parser.add_argument("--short", action="store_true", help="the first cases of each kind only")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: one a core)"
    )
    parser.add_argument("--deadline", type=float, default=600, help="seconds after which nothing runs (default: 600)")
    parser.add_argument("--groups", nargs="+", help="these groups only")
    parser.add_argument("--out", type=Path, help="file to append results to, one JSON object a line")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.deadline
    program = str(Path(arguments.program).resolve())
    stage = (arguments.tool or "plain") + (" short" if arguments.short else "")
    prefix = [program]
    if arguments.tool is not None:
        sanitizer = arguments.sanitizer or find_sanitizer()
        if sanitizer is None:
            sys.exit("compute-sanitizer not found (looked at PATH, CUDA_HOME, CUDA_PATH and /usr/local/cuda)")
        prefix = [sanitizer, "--tool", arguments.tool, "--error-exitcode", str(REPORTED)]
        if arguments.tool == "memcheck":
            prefix += ["--padding", "512"]  # or what lies beyond one allocation may be the next one
        # Launches that are refused on purpose are checked by the program itself.
        prefix += ["--report-api-errors", "no", program]
    runs = Runs(prefix, deadline, arguments.out)
    exact = ["--exact"] * (arguments.tool is not None)  # no guards, which would hide the bounds
    options = ["--kernels", *exact] + ["--short"] * arguments.short
    groups = arguments.groups or list_groups(program)
    if arguments.tool is not None:
        groups = [group for group in groups if group not in PLAIN_ONLY]
    with ThreadPoolExecutor(max_workers=max(1, arguments.jobs)) as pool:
        for fault in PLANTED[arguments.tool or "plain"]:
            pool.submit(runs.run, stage, ["planted", fault, *exact], REPORTED)
        for group in groups:
            pool.submit(runs.run, stage, [group, *options])
    print(table(runs.results))
    return 0 if all(result.status == "ok" for result in runs.results) else 1


if __name__ == "__main__":
    sys.exit(main())
