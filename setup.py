"""Builds xcos_ext._C: a thin driver of CMakeLists.txt. Metadata and settings are in pyproject.toml.

Environment:
    XCOS_CUDA                 auto (default: where nvcc is found), on, off
    XCOS_CUDA_ARCHITECTURES   e.g. "80-real;90", or "release" for all; default: the visible GPU's, else a short list
    XCOS_TORCH_DIR            folder of the torch package to build against; default: the installed one
    XCOS_BUILD_JOBS           parallel compile jobs; default: the number of cores
    CMAKE_ARGS                further arguments for CMake
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_folder() -> Path:
    """Where the torch to build against is installed, without importing it.

    pip's build isolation hides the environment's packages from this process, but not from the file system, so a
    plain ``pip install .`` builds against the torch that will be used, and none is fetched for the build.
    """
    if os.environ.get("XCOS_TORCH_DIR"):
        candidates = [Path(os.environ["XCOS_TORCH_DIR"])]
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [Path(spec.origin).parent] if spec and spec.origin else []
        candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for folder in candidates:
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    raise SystemExit(
        "xcos_ext: no torch 2.10 or later found to build against "
        f"(looked in {looked}). Install it first:  pip install torch==2.13.0"
    )


class CMakeBuild(build_ext):
    """Configures and builds with CMake and Ninja; prints in one line what was built."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        jobs = os.environ.get("XCOS_BUILD_JOBS") or str(os.cpu_count() or 1)
        if not jobs.isdecimal() or int(jobs) < 1:
            raise SystemExit(f"XCOS_BUILD_JOBS: expected a whole number from 1 on, got {jobs!r}")
        try:
            further = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        except ValueError as error:
            raise SystemExit(f"CMAKE_ARGS: expected arguments as in a shell, got {error}") from None
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        arguments = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DXCOS_VERSION={self.distribution.get_version()}",
            f"-DXCOS_CUDA={os.environ.get('XCOS_CUDA', 'auto')}",
            f"-DXCOS_CUDA_ARCHITECTURES={os.environ.get('XCOS_CUDA_ARCHITECTURES', '')}",
            f"-DXCOS_TORCH_DIR={torch_folder()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *further,
        ]
        ninja = shutil.which("ninja")
        if ninja is not None:
            # Each isolated build brings its own, and the folder remembers the one of the build before, which is gone.
            arguments.insert(0, f"-DCMAKE_MAKE_PROGRAM={ninja}")
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *arguments]
        configured = subprocess.run(configure, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(configured.stdout)
        if configured.returncode != 0:
            raise SystemExit("xcos_ext: CMake could not configure the build; its output is above")
        if subprocess.run(["cmake", "--build", str(build), "--parallel", jobs]).returncode != 0:
            raise SystemExit("xcos_ext: the compiler failed; its message is above")
        for line in configured.stdout.splitlines():
            if line.startswith("-- xcos_ext "):
                print(line.replace("-- ", "built ", 1))


setup(ext_modules=[Extension("xcos_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
