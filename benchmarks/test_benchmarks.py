"""The same cases under pytest-benchmark:  pytest benchmarks --benchmark-only

Without a GPU the CPU cases run. For figures to keep use run.py, which times the peers in the same run.
"""

from __future__ import annotations

import bench_deployment
import bench_grid_cosine
import bench_grid_match
import bench_xcos_head
import bench_xcos_score
import bench_xcos_topk
import pytest
import torch

from xcos_ext.bench import Workload, default_picture
from xcos_ext.bench.runtimes import Unavailable
from xcos_ext.io.errors import XCosError
from xcos_ext.model import load_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _cases():
    for suite in (bench_xcos_score, bench_grid_cosine, bench_grid_match, bench_xcos_head, bench_xcos_topk):
        yield from suite.cases(DEVICE, pairs=1024)


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.name)
def test_case(case, benchmark):
    benchmark.group = case.name

    def run():
        case.contenders["xcos_ext"]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)


@pytest.fixture(scope="module")
def workload():
    with Workload(load_model(), picture=default_picture()) as made:
        yield made


@pytest.mark.parametrize("key", bench_deployment.keys(DEVICE), ids=str)
def test_deployment(key, workload, benchmark):
    try:
        call = bench_deployment.step(key, workload)
    except (Unavailable, XCosError, ImportError) as error:
        pytest.skip(f"{key}: {error}")
    benchmark.group = f"{key.stage}, {key.device}, batch {key.batch}"
    benchmark(call)
