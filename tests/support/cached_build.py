"""Builds of test programs from many sources, side by side, kept until an input changes. Standard library only."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "csrc" / "cuda"


class Unavailable(RuntimeError):
    """The program cannot be built on this machine; the message says why."""


def run(command: Sequence[str]) -> None:
    """Runs a compiler; its last words are the error's message."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{done.stderr[-8000:]}")


def cached_build(
    program: Path,
    compile: Mapping[Path, Sequence[str]],
    link: Sequence[str],
    version: str,
    folders: Iterable[Path] = (),
    jobs: int = 2,
    report: Callable[[str, float], None] = lambda name, seconds: None,
) -> Path:
    """Builds ``program`` in a folder named by content, beside its own, or finds it already built.

    ``compile``: the command of every source, less the source and the output; ``link``: the same of the program, which
    comes after the objects. ``folders``: with everything that sources include. ``report`` hears how long each took.
    """
    digest = hashlib.sha256(version.encode())
    for source, command in sorted(compile.items()):
        digest.update(f"{source.relative_to(REPOSITORY)} {' '.join(command)}\n".encode())
    digest.update(" ".join(link).encode())
    inputs = {path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")}
    for path in sorted(inputs):
        digest.update(str(path.relative_to(REPOSITORY)).encode())
        digest.update(path.read_bytes())
    folder = program.parent / digest.hexdigest()[:16]
    target = folder / program.name
    if target.is_file():
        return target
    for old in program.parent.glob(f"*/{program.name}"):
        shutil.rmtree(old.parent, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    # A folder of one's own until the program is whole: test processes may build side by side.
    with tempfile.TemporaryDirectory(dir=folder) as own, ThreadPoolExecutor(max_workers=jobs) as pool:

        def compile_one(source: Path) -> str:
            start = time.monotonic()
            output = Path(own) / f"{source.name}.o"
            run([*compile[source], "-c", str(source), "-o", str(output)])
            report(source.name, time.monotonic() - start)
            return str(output)

        objects = list(pool.map(compile_one, sorted(compile, key=lambda path: -path.stat().st_size)))
        fresh = Path(own) / program.name
        start = time.monotonic()
        run([link[0], *objects, *link[1:], "-o", str(fresh)])
        report("link", time.monotonic() - start)
        os.replace(fresh, target)
    return target
