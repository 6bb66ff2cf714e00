"""TensorRT's real Python bindings without TensorRT: the wheel from the package index, beside stub libraries.

The wheel (some megabytes) is unpacked into a private temporary folder and never installed; nothing of NVIDIA's
libraries is needed or fetched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

HERE = Path(__file__).resolve().parent
#: Where xcos_ext is imported from: the repository, or where it is installed.
PACKAGES = Path(str(getattr(find_spec("xcos_ext"), "origin", ""))).parents[1]
LIBRARIES = {"INFER": "libnvinfer", "PARSER": "libnvonnxparser", "PLUGIN": "libnvinfer_plugin"}


@dataclass(frozen=True)
class Bindings:
    """A release of the bindings on the package index."""

    package: str
    version: str

    @property
    def major(self) -> int:
        return int(self.version.partition(".")[0])

    def __str__(self) -> str:
        return self.version


#: The oldest that we support, the last of TensorRT 10, and TensorRT 11.
RELEASES = (
    Bindings("tensorrt_cu12_bindings", "10.3.0"),
    Bindings("tensorrt_cu13_bindings", "10.16.1.11"),
    Bindings("tensorrt_cu13_bindings", "11.4.0.106"),
)


class Unavailable(RuntimeError):
    """The bindings cannot be had on this machine; the message says why."""


def _run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took longer than {error.timeout:g} s") from None


def _private_folder() -> Path:
    """A folder of this user's that outlives the tests, so that wheels are fetched once."""
    folder = Path(tempfile.gettempdir()) / f"xcos-tensorrt-bindings-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if folder.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise Unavailable(f"{folder} is not this user's alone")
    return folder


def _unpacked(release: Bindings) -> Path:
    """The folder that holds the package tensorrt_bindings."""
    target = _private_folder() / f"{release.package}-{release.version}-{sys.implementation.cache_tag}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheels = Path(scratch) / "wheels"
        download = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--timeout=20", "--retries=2"]
        target_options = [f"--dest={wheels}", f"{release.package}=={release.version}"]
        done = _run([sys.executable, "-m", *download, *target_options])
        found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
        if done.returncode or len(found) != 1:
            lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
            raise Unavailable(f"pip cannot download {release.package} {release.version}: {lines[-1]}")
        folder = Path(scratch) / "unpacked"
        with ZipFile(found[0]) as wheel:
            wheel.extractall(folder)
        try:
            folder.rename(target)
        except OSError:  # another run was faster
            if not target.is_dir():
                raise
    return target


def _stubs(release: Bindings, folder: Path) -> Path:
    """Builds the stub libraries."""
    compiler = shutil.which(os.environ.get("CC", "").split(" ")[0] or "gcc") or shutil.which("cc")
    if compiler is None:
        raise Unavailable("no C compiler (gcc, cc or $CC)")
    for part, name in LIBRARIES.items():
        soname = f"{name}.so.{release.major}"
        flags = f"-shared -fPIC -O1 -Wall -Wextra -Werror -D{part} -DMAJOR={release.major} -Wl,-soname,{soname}".split()
        done = _run([compiler, *flags, str(HERE / "stubs.c"), "-o", str(folder / soname)])
        if done.returncode:
            raise RuntimeError(done.stderr)
    return folder


def probe(release: Bindings, folder: Path) -> dict[str, Any]:
    """What the real bindings are like, and what our code does with them; see probe.py.

    Args:
        release: of the bindings.
        folder: empty, for the stub libraries.

    Raises:
        Unavailable: no network, no wheel for this Python, or no compiler.
    """
    wheel, stubs = _unpacked(release), _stubs(release, folder)
    environment = dict(os.environ, PYTHONPATH=f"{wheel}:{PACKAGES}", LD_LIBRARY_PATH=str(stubs), OMP_NUM_THREADS="1")
    done = _run([sys.executable, str(HERE / "probe.py")], env=environment, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"the bindings {release} cannot be looked at:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
