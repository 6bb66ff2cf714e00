"""The CUDA kernels, unchanged, on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer.

See tests/cuda_emulator/README.md for how it works and for what only a GPU can show.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from cached_build import Unavailable
from cuda_emulator.build import EMULATOR, build_driver

pytestmark = pytest.mark.process

GROUPS = [
    "conversions",
    "head",
    "head_launch",
    "head_nan",
    "large",
    "launch",
    "many",
    "match",
    "match_large",
    "match_launch",
    "match_nan",
    "match_reference",
    "matrix_backward",
    "matrix_grants",
    "matrix_launch",
    "matrix_mma",
    "matrix_nan",
    "matrix_plain",
    "matrix_reference",
    "nan",
    "plan",
    "reference",
    "rounds",
    "shapes_full",
    "shapes_half",
    "sizes",
    "topk",
    "tuned",
]

# What has to be said about a fault planted on purpose.
PLANTED = {
    "divergent-barrier": "deadlock: threads wait at a barrier",
    "divergent-product": "deadlock: threads wait at a barrier",
    "divergent-shuffle": "lanes of a warp diverged",
    "global-overflow": "AddressSanitizer: heap-buffer-overflow",
    "global-overread": "AddressSanitizer: heap-buffer-overflow",
    "misaligned-copy": "asynchronous copy is not aligned",
    "misaligned-load": "misaligned address",
    "missing-barrier": "the result depends on the order of the threads",
    "missing-face-mma": "AddressSanitizer: heap-buffer-overflow",
    "missing-face-plain": "AddressSanitizer: heap-buffer-overflow",
    "missing-second-barrier": "the result depends on the order of the threads",
    "missing-wait": "asynchronous copies that it never waited for",
    "mixed-barriers": "they wait at different kinds of barriers",
    "shared-overflow": "AddressSanitizer: use-after-poison",
    "wrong-mask": "mask lacks the calling lane",
}


@pytest.fixture(scope="module")
def driver() -> Path:
    try:
        return build_driver()
    except Unavailable as reason:
        pytest.skip(f"the CUDA emulator cannot be built: {reason}")


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0:abort_on_error=0", UBSAN_OPTIONS="print_stacktrace=1")
    return subprocess.run(
        [str(driver), *arguments], capture_output=True, text=True, timeout=300, env=environment, cwd=EMULATOR
    )


def test_every_group_and_fault_is_run(driver: Path) -> None:
    """The lists above are the driver's."""
    names = run(driver, "list").stdout.split("\n")
    assert names == [*sorted(GROUPS), *(f"planted {name}" for name in sorted(PLANTED)), ""]


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_agree_with_float64(driver: Path, group: str) -> None:
    done = run(driver, group)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-6000:]
    count = re.search(r"(\d+) cases, 0 failures", done.stdout)
    assert count and int(count.group(1)) > 0, done.stdout


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_emulator_stops_at_a_planted_fault(driver: Path, name: str) -> None:
    done = run(driver, "planted", name)
    assert done.returncode != 0, f"{name} went undetected"
    assert PLANTED[name] in done.stderr, done.stderr[-3000:]
