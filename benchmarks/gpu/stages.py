"""Runs the stages of a kit one after the other on a machine that is lent for minutes.

Every stage is a process with a cap of its own; what it finds out it writes as it goes, a JSON line a case, to a file of
its name, so that whatever was measured is there however the stage ends. A stage that fails, crashes or hangs never
stops the rest, and the whole ends at its deadline. Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a killed stage gets to write its last lines, and what the kit keeps for its summary.
GRACE_S = 2.0
RESERVE_S = 4.0
TAIL_LINES = 60

# The exit status of a stage that has nothing to do here.
SKIPPED = 77


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: of its line in the summary and of its result file.
        command: program and arguments; it finds the result file in XCOS_STAGE_OUT and the seconds it has in
            XCOS_STAGE_SECONDS.
        cap: seconds it may take; None: what is left.
        dry: what runs instead where there is no GPU, on one thread; None: nothing can.
        environment: added to ours.
        file: of the results, where it is not the stage's own.
    """

    name: str
    command: Sequence[str]
    cap: float | None
    dry: Sequence[str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None

    @property
    def results(self) -> str:
        """The result file's name."""
        return f"{self.file or self.name}.jsonl"


def emit(**values: Any) -> None:
    """Append one line to the stage's result file, or print it where there is none; nothing is held back."""
    line = json.dumps(values, default=str)
    path = os.environ.get("XCOS_STAGE_OUT")
    if not path:
        print(line, flush=True)
        return
    with open(path, "a") as file:
        file.write(line + "\n")


def gpu_facts(query: str) -> list[str]:
    """What nvidia-smi says of the first GPU; empty where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return lines[0].split(", ") if lines else []


def seconds_left(begin: float, default: float = 60.0) -> float:
    """Of the stage's cap, for stages that can stop early; begin: time.monotonic() at its start."""
    return float(os.environ.get("XCOS_STAGE_SECONDS", default)) - (time.monotonic() - begin)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a result file; one that was cut off while it was written is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
    return found


def _stop(process: subprocess.Popen[str]) -> None:
    """End a stage and what it left running: children that ignore the first signal outlive their parent."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def _run(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a stage's command: how it ended, its time, its last lines."""
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            errors="replace", env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return {"status": "failed", "seconds": 0.0, "code": None, "tail": f"{command[0]}: {error}"}

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip("\n")[:2000])
            print("    " + line, end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    late = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        late = True
    _stop(process)
    reader.join(1)  # not longer: somebody who left the process group may hold the pipe
    code = process.returncode
    status = "timeout" if late else "ok" if code == 0 else "skipped" if code == SKIPPED else "failed"
    return {
        "status": status,
        "seconds": round(time.monotonic() - begin, 2),
        "code": code,
        "tail": "\n".join(tail),
    }


def run(
    stages: Iterable[Stage],
    folder: Path,
    deadline: float,
    *,
    dry: bool = False,
    name: str = "kit",
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run stages within a deadline.

    Args:
        stages: in order.
        folder: for the result files, STAGE.jsonl, and NAME.jsonl with a line a stage.
        deadline: seconds for all.
        dry: print every stage's command and cap, and run what needs no GPU.
        name: of the kit.

    Returns:
        0 if every stage that ran went well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin, worst, rows = clock(), 0, []
    summary = folder / f"{name}.jsonl"
    with open(summary, "a") as out:
        for stage in stages:
            left = deadline - RESERVE_S - (clock() - begin)
            # The grace of a stage that has to be killed is the kit's time too.
            seconds = min(left - 2 * GRACE_S, left if stage.cap is None else stage.cap)
            command = stage.dry if dry else stage.command
            cap = "the rest" if stage.cap is None else f"{stage.cap:.0f} s"
            print(f"=== {stage.name} (cap {cap}): {shlex.join(stage.command)}", flush=True)
            if dry and command is not None:
                print(f"    here: {shlex.join(command)}", flush=True)
            if command is None:
                result = {"status": "skipped", "seconds": 0.0, "code": None, "tail": "needs a GPU"}
            elif seconds < 1:
                result = {"status": "not run", "seconds": 0.0, "code": None, "tail": "no time was left"}
            else:
                environment = {
                    "PYTHONUNBUFFERED": "1",
                    **({"OMP_NUM_THREADS": "1"} if dry else {}),
                    **stage.environment,
                    "XCOS_STAGE_OUT": str(folder / stage.results),
                    "XCOS_STAGE_SECONDS": f"{seconds:.1f}",
                }
                result = _run(command, seconds, environment)
            row = {
                "stage": stage.name,
                "file": stage.results,
                "cap": stage.cap,
                "command": shlex.join(stage.command),
                **result,
            }
            rows.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
            if result["status"] in ("failed", "timeout"):
                worst = 1
            print(f"=== {stage.name}: {result['status']} after {result['seconds']:.1f} s", flush=True)
    print(f"\n{name}: {clock() - begin:.0f} s of {deadline:.0f} s")
    print(table(rows, folder))
    return worst


def counted(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Cases by how they ended; the last count that a stage gave itself, where it gives one. Not the kit's own lines."""
    counts: dict[str, int] = {}
    for line in lines:
        if "counts" in line:
            counts = dict(line["counts"])
        elif "cap" not in line and line.get("status") != "count":
            status = str(line.get("status", "ok"))
            counts[status] = counts.get(status, 0) + 1
    return counts


def table(rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """A line a stage: how it ended, its time, and what its result file counts."""
    lines = [f"{'stage':<12} {'status':<9} {'seconds':>8}  {'cap':>5}  results"]
    for row in rows:
        found = read_lines(folder / row["file"])
        counts = counted(found)
        said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "none"
        cap = "rest" if row["cap"] is None else f"{row['cap']:.0f}"
        lines.append(f"{row['stage']:<12} {row['status']:<9} {row['seconds']:>8.1f}  {cap:>5}  {said}")
        bad = [one for one in found if one.get("status") in ("failed", "timeout")]
        for one in bad[:6]:
            what = one.get("case") or one.get("group") or one.get("test") or ""
            why = str(one.get("message") or "").strip().splitlines()
            lines.append(f"    {one['status']}: {what}: {why[-1][:160] if why else ''}")
    return "\n".join(lines)
