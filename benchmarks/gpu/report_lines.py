"""A pytest plugin: a JSON line a test that fails or is skipped, as it ends, and the counts; order for a short run.

    XCOS_STAGE_OUT=pytest.jsonl python -m pytest -p report_lines -m cuda -n 12 tests     (benchmarks/gpu on PYTHONPATH)

Tests of operators come first and those that start a compiler last, since the run is cut off when its time is over.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stages import emit

FIRST = ("test_xcos_score", "test_xcos_matrix", "test_xcos_topk", "test_xcos_head", "test_grid_", "test_all_pairs",
         "test_xcos_maps", "test_contracts", "test_templates")  # fmt: skip
LAST = ("inductor", "compile", "aoti", "export", "tracing", "every_runtime")
EVERY_S = 2.0

_counts: dict[str, int] = {}
_told = 0.0


def rank(test: str) -> int:
    """0 for operators, 2 for what starts a compiler, 1 for the others."""
    if any(word in test.lower() for word in LAST):
        return 2
    return 0 if Path(test.partition("::")[0]).name.startswith(FIRST) else 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """After an illegal access every call of this process fails: a worker of pytest-xdist ends, and gets a successor."""
    if call.excinfo is None or "PYTEST_XDIST_WORKER" not in os.environ or "torch" not in sys.modules:
        return
    torch = sys.modules["torch"]
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        emit(
            test=item.nodeid, status="failed", message=f"the GPU failed for good in this process: {call.excinfo.value}"
        )
        os._exit(70)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort, order kept among equals; the same in every worker."""
    items.sort(key=lambda item: rank(item.nodeid))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write what is worth knowing at once."""
    global _told
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # whose reports the main process gets
    if report.when == "call" or report.outcome != "passed":
        outcome = {"passed": "ok", "failed": "failed", "skipped": "skipped"}[report.outcome]
        _counts[outcome] = _counts.get(outcome, 0) + 1
        if report.outcome == "failed":
            emit(
                test=report.nodeid,
                status="failed",
                seconds=round(report.duration, 3),
                message=report.longreprtext[-4000:],
            )
    if time.monotonic() - _told > EVERY_S:
        _told = time.monotonic()
        emit(test="so far", status="count", counts=_counts)


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """The counts."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        emit(test="all", status="count", counts=_counts, exit=int(exitstatus))
