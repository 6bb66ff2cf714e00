"""What every test may use: the device under test, the shared data folder, reproducible random numbers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # recipes/ is not installed


@pytest.hookimpl(tryfirst=True)  # marks must be there before -m is asked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Combinations of parameters that show no value for the first time are `thorough`; `cuda` needs a GPU."""
    seen: dict[str, set[tuple[str, int]]] = {}
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if not isinstance(item, pytest.Function):
            continue
        if "browser" in item.fixturenames:
            item.add_marker(pytest.mark.browser)
        if hasattr(item, "callspec"):
            known = seen.setdefault(item.nodeid.partition("[")[0], set())
            values = {(name, id(value)) for name, value in item.callspec.params.items()}
            if values <= known:
                item.add_marker(pytest.mark.thorough)
            known |= values


# Without a GPU the CUDA half of these tests is not collected at all: thousands of skips would hide the others.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each test that asks for it runs on the CPU, and on the GPU where there is one."""
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real faces and real networks; users of the package do not have it."""
    folder = Path(os.environ.get("XCOS_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "lfw112.zip").is_file():
        pytest.skip(f"no real data at {folder} (set XCOS_SHARED_DATA to the folder that holds lfw112.zip)")
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small work: on a busy machine waiting for a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
