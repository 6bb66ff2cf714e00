"""Builds the package in place for the GPU that is here, and the native driver beside it.

    python benchmarks/gpu/building.py [--architecture 90] [--only extension,native] [--library FILE.so]

The two builds share the cores. Where the package cannot be built here, a library that was built beforehand (for this
Python; see prepare.sh) takes its place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from stages import emit, gpu_facts, seconds_left

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NATIVE = REPOSITORY / "tests" / "cuda_native"
# Of the stage's time: what it takes to put the library that was built beforehand in the place of a build that is late.
LAST_S = 12.0
LOADS = "import xcos_ext; b = xcos_ext.build_info(); assert b['cuda'], b; print(b)"


def loads() -> str | None:
    """Why the package in this folder cannot be used; None if it can."""
    done = subprocess.run([sys.executable, "-c", LOADS], cwd=REPOSITORY, capture_output=True, text=True)
    print(done.stdout[-1500:])
    return None if done.returncode == 0 else done.stderr.strip()[-600:] or f"exit status {done.returncode}"


def carried() -> Path | None:
    """A library for this Python in .kit."""
    path = REPOSITORY / ".kit" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.is_file() else None


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default=None)
    parser.add_argument("--only", default="extension,native")
    parser.add_argument("--library", type=Path, default=carried(), help="default: the one in .kit, if there is any")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args()
    # Of the visible GPU; 90 where none is.
    target = options.architecture or "".join(gpu_facts("compute_cap")).replace(".", "") or "90"
    jobs = str(os.cpu_count() or 1)
    environment = {
        **os.environ, "XCOS_CUDA": "on", "XCOS_CUDA_ARCHITECTURES": f"{target}-real", "XCOS_BUILD_JOBS": jobs,
    }  # fmt: skip
    commands = {
        "extension": [sys.executable, "setup.py", "build_ext", "--inplace"],
        "native": [sys.executable, str(NATIVE / "build.py"), "--architectures", target, "--jobs", jobs],
    }  # fmt: skip
    if options.dry_run:
        for name in options.only.split(","):
            print(f"{name}: {' '.join(commands[name])}")
            emit(case=name, status="skipped", message="nothing is compiled in a dry run")
        return 0
    begin, running = time.monotonic(), {}
    if options.library is not None:
        # There at once, should this process be ended before the compiler is done.
        shutil.copy(options.library, REPOSITORY / "xcos_ext")
    for name in options.only.split(","):
        log = (REPOSITORY / "build").joinpath(f"kit-{name}.log")
        log.parent.mkdir(exist_ok=True)
        with open(log, "w") as file:
            running[name] = (
                log,
                subprocess.Popen(
                    commands[name],
                    cwd=REPOSITORY,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=name == "extension" and options.library is not None,
                ),
            )
    bad = 0
    while running:
        for name, (log, process) in list(running.items()):
            if process.poll() is None:
                if name != "extension" or options.library is None or seconds_left(begin, 3600) > LAST_S:
                    continue
                os.killpg(process.pid, signal.SIGKILL)  # compilers too: none may write the library later
                process.wait()
            del running[name]
            code, message, how = process.returncode, None, "built here"
            if code != 0:
                message = log.read_text(errors="replace")[-3000:]
            if name == "extension":
                reason = loads() if code == 0 else "it was not built here"
                if reason is not None and options.library is not None:
                    print(f"{reason}: the library built beforehand")
                    shutil.copy(options.library, REPOSITORY / "xcos_ext")
                    emit(case="extension built here", status="failed", message=message or reason)
                    how, reason = "built beforehand", loads()
                code, message = (0, None) if reason is None else (1, message or reason)
            bad += code != 0
            emit(
                case=name, status="failed" if code else "ok", seconds=round(time.monotonic() - begin, 1), how=how,
                architecture=target, message=message,
            )  # fmt: skip
            print(f"{name}: {'FAILED' if code else 'ok'} after {time.monotonic() - begin:.1f} s", flush=True)
        time.sleep(0.1)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
