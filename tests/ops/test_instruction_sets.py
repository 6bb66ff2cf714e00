"""Each instruction set that this processor has gives the reference's results; XCOS_CPU_ISA chooses among them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import xcos_ext

pytestmark = pytest.mark.process


def _run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XCOS_CPU_ISA": isa}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("isa", xcos_ext.build_info()["isa_supported"])
def test_operators_on_every_instruction_set(isa, request):
    if isa == xcos_ext.build_info()["isa"]:
        pytest.skip("the set in use: the whole suite runs on it")
    # A process of its own: the choice is made once, at the first call.
    folder = request.path.parent
    names = ("grid_cosine", "grid_match", "xcos_head", "xcos_score", "contracts", "xcos_matrix", "xcos_topk")
    files = [str(folder / f"test_{name}.py") for name in names]
    chosen = (
        "contiguous or channels_last or gradcheck or zero_cells or bounded or nan or any_shape or fill_no_tile or "
        "matches_the_reference or large_logits or threads or alone or best_of_the_matrix or any_request"
    )
    result = _run(isa, "-m", "pytest", "-q", "-x", "-k", chosen, "-p", "no:cacheprovider", *files)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("isa", xcos_ext.build_info()["isa_supported"])
def test_choice_is_reported(isa):
    result = _run(isa, "-c", "import xcos_ext; print(xcos_ext.build_info()['isa'])")
    assert result.stdout.strip() == isa


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_unknown_instruction_set_is_refused(isa):
    expected = ", ".join(reversed(xcos_ext.build_info()["isa_supported"]))
    message = f"XCOS_CPU_ISA: expected one that this build and this processor have ({expected}), got {isa}"
    assert _run(isa, "-c", "import xcos_ext.ops").stderr.endswith(f"\nValueError: {message}\n")
    # By a command, without the name of a Python class.
    assert f"failed: {message}" in _run(isa, "-m", "xcos_ext", "info").stdout
