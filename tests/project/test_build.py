"""Building: what is found, what is said, what fails clearly. Configuration only; installing is what CI does first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        not (REPOSITORY / "CMakeLists.txt").is_file() or shutil.which("cmake") is None or shutil.which("ninja") is None,
        reason="needs the source folder, cmake and ninja",
    ),
]


def configure(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("pybind11")
    command = ["cmake", "-S", str(REPOSITORY), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DXCOS_TORCH_DIR={Path(torch.__file__).parent}"]
    command += ["-DXCOS_VERSION=9.9.9", *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def without_nvcc() -> dict[str, str]:
    """An environment in which no CUDA compiler can be found."""
    tools = [
        Path(path) for name in ("cmake", "ninja", "c++", "g++", "cc", "gcc", "ld", "as") if (path := shutil.which(name))
    ]
    folders = []
    for folder in dict.fromkeys(str(tool.parent) for tool in tools):
        if not (Path(folder) / "nvcc").exists():
            folders.append(folder)
    return {"PATH": os.pathsep.join(folders), "CUDACXX": "", "CUDA_PATH": "", "CUDA_HOME": ""}


def test_off_builds_without_cuda_and_says_so(tmp_path):
    result = configure(tmp_path, "-DXCOS_CUDA=off")
    assert result.returncode == 0, result.stderr
    assert "xcos_ext 9.9.9: " in result.stdout
    assert f"torch {torch.__version__}" in result.stdout and "CUDA off (XCOS_CUDA=off)" in result.stdout


def test_auto_without_nvcc_builds_for_the_cpu(tmp_path):
    result = configure(tmp_path, "-DXCOS_CUDA=auto", **without_nvcc())
    if result.returncode == 0 and "CUDA none (no nvcc found)" not in result.stdout:
        pytest.skip("nvcc is found beside the C++ compiler on this machine")
    assert result.returncode == 0, result.stderr
    assert "CUDA none (no nvcc found)" in result.stdout


def test_on_without_nvcc_fails_clearly(tmp_path):
    result = configure(tmp_path, "-DXCOS_CUDA=on", **without_nvcc())
    if result.returncode == 0:
        pytest.skip("nvcc is found beside the C++ compiler on this machine")
    assert "XCOS_CUDA=on, but no working nvcc was found" in result.stderr


def test_an_unknown_setting_is_named(tmp_path):
    result = configure(tmp_path, "-DXCOS_CUDA=maybe")
    assert result.returncode != 0 and "XCOS_CUDA: expected auto, on or off, got 'maybe'" in result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_architectures_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the visible GPU decides here")
    result = configure(tmp_path, "-DXCOS_CUDA=on")
    assert result.returncode == 0, result.stderr
    assert "for 75-real 80-real 90" in result.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_release_widens_the_architectures(tmp_path):
    result = configure(tmp_path, "-DXCOS_CUDA=on", "-DXCOS_CUDA_ARCHITECTURES=release")
    assert result.returncode == 0, result.stderr
    assert "for 75-real 80-real 86-real 89-real 90-real 100-real 120" in result.stdout


def test_a_missing_torch_is_explained(tmp_path):
    result = configure(tmp_path, f"-DXCOS_TORCH_DIR={tmp_path}")
    assert result.returncode != 0 and "pip install torch==2.13.0" in result.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_library_loads_without_cuda_in_torch():
    """The one CUDA symbol taken from torch is weak, and no path of the build machine is recorded."""
    import xcos_ext
    from xcos_ext import _C

    symbols = subprocess.run(["nm", "-D", _C.__file__], capture_output=True, text=True).stdout
    lines = [line for line in symbols.splitlines() if "aoti_torch_get_current_cuda_stream" in line]
    if xcos_ext.build_info()["cuda"]:
        assert lines and all(line.split()[-2] == "w" for line in lines)
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True).stdout
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "libcudart" not in dynamic and "libcuda.so" not in dynamic


@pytest.mark.parametrize("script", ["torch_versions.sh", "torch_headers.sh"])
def test_scripts_of_versions_say_how_they_are_called(script):
    done = subprocess.run([str(REPOSITORY / "tests" / script)], capture_output=True, text=True)
    assert done.returncode == 2 and f"tests/{script} VERSION [FOLDER]" in done.stderr and done.stdout == ""


def test_sanitizers_say_how_they_are_called():
    done = subprocess.run([str(REPOSITORY / "tests" / "sanitizers.sh"), "--all"], capture_output=True, text=True)
    assert done.returncode == 2 and "tests/sanitizers.sh [--short]" in done.stderr and done.stdout == ""


def test_unknown_instruction_sets_are_refused(tmp_path):
    result = configure(tmp_path, "-DXCOS_CUDA=off", "-DXCOS_CPU_ISAS=baseline;sse9")
    assert result.returncode != 0 and "XCOS_CPU_ISAS: expected sets from" in result.stderr
    assert "got sse9" in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("XCOS_BUILD_JOBS", "two", "XCOS_BUILD_JOBS: expected a whole number from 1 on, got 'two'"),
        ("XCOS_BUILD_JOBS", "0", "XCOS_BUILD_JOBS: expected a whole number from 1 on, got '0'"),
        ("CMAKE_ARGS", "'-DA", "CMAKE_ARGS: expected arguments as in a shell, got No closing quotation"),
    ],
)
def test_settings_of_a_build_are_named(name, value, message, tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    environment = {**os.environ, name: value}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert done.returncode != 0 and done.stderr.splitlines()[-1] == message


def test_another_torch_to_build_against(tmp_path):
    """XCOS_TORCH_DIR stands for the installed one, and is named where it is none."""
    code = f"import os, runpy; os.environ['XCOS_TORCH_DIR'] = {str(tmp_path)!r}; import setuptools; "
    code += "setuptools.setup = lambda **options: None; print(runpy.run_path('setup.py')['torch_folder']())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode != 0 and f"looked in {tmp_path}" in done.stderr
    header = tmp_path / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == str(tmp_path)
