"""Every kernel compiles to machine code without spills and within its register limit (no GPU needed)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cubin_gate

pytestmark = pytest.mark.process

OLDEST_AND_TUNED = (75, 90)


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = cubin_gate.find_nvcc()
    if found is None:
        pytest.skip("nvcc not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)")
    return found


def check(nvcc: str, architectures: tuple[int, ...]) -> None:
    supported = cubin_gate.supported(nvcc, architectures)
    if not supported:
        pytest.skip(f"{nvcc} compiles for none of {architectures}")
    reports = cubin_gate.gather(nvcc, supported)
    assert {r.architecture for r in reports} == set(supported)
    names = {r.name for r in reports}
    for direction in ("forward", "backward"):
        for element in ("f16", "bf16", "f32", "f64"):
            assert {f"staged_{direction}<{element}>", f"general_{direction}<{element}>"} <= names
        assert {f"staged_{direction}<{element}, 32x49>" for element in ("f16", "bf16", "f32")} <= names
    for element in ("f16", "bf16", "f32", "f64"):
        assert {f"matrix_plain<{element}>", f"matrix_backward<{element}>"} <= names
        assert {f"match_forward<{element}>", f"match_backward<{element}>"} <= names
    assert {f"head_forward<{element}>" for element in ("f16", "bf16", "f32")} <= names
    assert {f"matrix_tensor<{element}{tuned}>" for element in ("f16", "bf16") for tuned in ("", ", tuned")} <= names
    assert {
        f"{sums}<{element}>" for sums in ("topk_update", "matrix_backward_sums") for element in ("f32", "f64")
    } <= names
    assert not cubin_gate.violations(reports), cubin_gate.table(reports)


def test_kernels_fit_the_oldest_and_the_tuned_architecture(nvcc: str) -> None:
    check(nvcc, OLDEST_AND_TUNED)


@pytest.mark.slow
def test_kernels_fit_every_architecture(nvcc: str) -> None:
    check(nvcc, cubin_gate.ARCHITECTURES)


HALF = "_ZN4xcos4cuda3_GL14staged_forwardI6__halfLi32ELi49EEEvNS1_1PE"
DOUBLE = "_ZN4xcos4cuda3_GL16general_backwardIdEEvNS1_1PE"
TUNED = "_ZN4xcos4cuda2_GL13matrix_tensorI13__nv_bfloat16Lb1EEEvNS1_1PE"
PTXAS = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{HALF}' for 'sm_90'
ptxas info    : Function properties for {HALF}
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 81 registers, used 0 barriers, 8 bytes cumulative stack size, 64 bytes smem
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function '{DOUBLE}' for 'sm_90'
ptxas info    : Function properties for {DOUBLE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""


def test_reading_ptxas() -> None:
    reports = cubin_gate.parse(90, PTXAS)
    assert reports == [
        cubin_gate.KernelReport(90, "staged_forward<f16, 32x49>", 81, 8, 16, 64),
        cubin_gate.KernelReport(90, "general_backward<f64>", 128, 0, 0, 0),
    ]


def test_reading_ptx() -> None:
    """As nvcc writes a memcpy of halves to shared memory, which ptxas 13.0 gets wrong."""
    ptx = f".visible .entry {DOUBLE}(\n\tst.shared.u8 \t[%r297+1], %rs9;\n\tst.global.u8 [%rd1], %rs9;\n"
    assert [r.byte_stores for r in cubin_gate.parse(90, PTXAS, ptx)] == [0, 1]


def test_names_and_limits_of_all_pairs() -> None:
    assert cubin_gate.kernel_name(TUNED) == "matrix_tensor<bf16, tuned>"
    assert cubin_gate.kernel_name(TUNED.replace("Lb1E", "Lb0E")) == "matrix_tensor<bf16>"
    # The longest name that fits has the limit.
    report = cubin_gate.KernelReport(90, "matrix_plain<f64>", 200, 0, 0, 0)
    assert cubin_gate.violations([report]) == []
    assert len(cubin_gate.violations([replace(report, name="matrix_plain<f32>")])) == 1


def test_the_gate_closes() -> None:
    bad, good = cubin_gate.parse(90, PTXAS)
    assert cubin_gate.violations([good]) == []
    assert len(cubin_gate.violations([bad])) == 4  # spill, stack, static shared memory, registers
    assert "129 registers, at most 128" in cubin_gate.violations([replace(good, registers=129)])[0]
    assert "stores of bytes" in cubin_gate.violations([replace(good, byte_stores=8)])[0]
    assert "no known family" in cubin_gate.violations([replace(good, name="other")])[0]
    crowd = [replace(good, name=f"general_{i}") for i in range(cubin_gate.MOST_KERNELS + 1)]
    assert "kernels, at most" in cubin_gate.violations(crowd)[0]
