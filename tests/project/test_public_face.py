"""The package as a user first meets it: names, cheap import, build information, typing."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources

import pytest

import xcos_ext


def test_every_public_name_resolves():
    for name in xcos_ext.__all__:
        assert getattr(xcos_ext, name) is not None
    assert set(xcos_ext.__all__) <= set(dir(xcos_ext))
    with pytest.raises(AttributeError, match="module 'xcos_ext' has no attribute 'nothing'"):
        xcos_ext.nothing  # noqa: B018


@pytest.mark.process
def test_importing_the_package_does_not_import_torch():
    code = "import sys, xcos_ext; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.process
def test_importing_the_operators_registers_them():
    code = "import xcos_ext.ops, torch; torch.ops.xcos_ext.xcos_score; torch.ops.xcos_ext.grid_cosine"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_versions_agree():
    assert xcos_ext.build_info()["version"] == xcos_ext.__version__
    try:
        installed = metadata.version("xcos_ext")
    except metadata.PackageNotFoundError:
        pytest.skip("run from a source folder without an installation")
    assert installed == xcos_ext.__version__


def test_build_info_is_complete():
    info = xcos_ext.build_info()
    assert {
        "version",
        "compiler",
        "torch",
        "isa",
        "isa_compiled",
        "isa_supported",
        "cuda",
        "cuda_architectures",
    } <= set(info)
    assert info["isa"] in info["isa_supported"] and set(info["isa_supported"]) <= set(info["isa_compiled"])
    assert bool(info["cuda_architectures"]) == info["cuda"]


def test_the_package_is_typed():
    assert resources.files("xcos_ext").joinpath("py.typed").is_file()


def test_operators_have_documented_contracts():
    for name in ("grid_cosine", "grid_match", "xcos_head", "xcos_score"):
        text = getattr(xcos_ext, name).__doc__
        for section in ("Args:", "Returns:", "Raises:", "[N, C, H, W]", "float64"):
            assert section in text
