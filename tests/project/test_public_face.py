"""The package as a user first meets it: names, cheap import, build information, typing."""

from __future__ import annotations

import dataclasses
import enum
import importlib
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


ROOMS = [
    "backbones",
    "bench",
    "card",
    "deploy",
    "devices",
    "evaluation",
    "evaluation.datasets",
    "evaluation.faithfulness",
    "explain",
    "explain.explainers",
    "explain.reconstruction",
    "faces",
    "gallery",
    "model",
    "ops",
    "training",
]
#: What takes seconds, files of others or a GPU to show; the faithfulness package's own docstring shows its protocols.
WITHOUT_EXAMPLE = {
    "LayerRecogniser",
    "OnnxRecogniser",
    "OnnxModel",
    "CompiledModel",
    "PairMaps",
    "TrtRunner",
    "build_engine",
    "export_onnx",
    "CFP",
    "CSVPairs",
    "deletion_identification",
    "deletion_verification",
    "faithfulness",
    "faithfulness_figure",
    "locality",
    "patch_replacement",
    "region_swap",
    "reconstruction_figure",
    "read_report",
    "Study",
    "PairModel",
    "Explainer",
    "Task",
    "CellMatrices",
}


def test_public_names_have_an_example_that_runs():
    """`pytest --doctest-modules xcos_ext` runs them; results, choices and errors speak for themselves."""
    missing = []
    for module in (xcos_ext, *(importlib.import_module(f"xcos_ext.{room}") for room in ROOMS)):
        for name in set(module.__all__) - WITHOUT_EXAMPLE:
            value = getattr(module, name)
            plain = isinstance(value, type) and issubclass(value, (BaseException, tuple, enum.Enum))
            if not callable(value) or dataclasses.is_dataclass(value) or plain:
                continue
            if ">>>" not in (value.__doc__ or ""):
                missing.append(f"{module.__name__}.{name}")
    assert not missing
