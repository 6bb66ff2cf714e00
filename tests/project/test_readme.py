"""README keeps its word: its code runs, its links lead somewhere, its tables are those of the results files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import portrait
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
OPERATORS = REPOSITORY / "docs" / "operators.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="needs the source folder")


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))):
        page = REPOSITORY / name
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{name}: {target} does not exist"


@pytest.mark.examples
@pytest.mark.real_data
def test_the_screen_of_code_runs(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, start = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for name in "ab":
        Image.fromarray(portrait()).save(tmp_path / f"{name}.jpg")
    exec(first, names := {})
    assert names["e"]
    screen, _ = re.findall(r"```python\n(.*?)```", OPERATORS.read_text(), re.DOTALL)
    block = ("import xcos_ext\n" + start + screen).replace(
        '"mobilefacenet_arcface.pt"', f'"{shared_data / "mobilefacenet_arcface.pt"}"'
    )
    a, b = (torch.randn(4, 32, 7, 7, requires_grad=True) for _ in range(2))
    names = {
        "a": a,
        "b": b,
        "w": torch.rand(7, 7),
        "logits": torch.randn(4, 7, 7),
        "probe": torch.randn(1, 32, 7, 7),
        "gallery": torch.randn(9, 32, 7, 7),
        "face_a": np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8),
        "face_b": np.random.default_rng(1).integers(0, 256, (112, 112, 3), np.uint8),
        "images_a": torch.rand(2, 3, 112, 112),
        "images_b": torch.rand(2, 3, 112, 112),
        "grid_a": torch.randn(3, 512, 7, 7),
        "grid_b": torch.randn(20, 512, 7, 7),
        "pairs": torch.tensor([[0, 19], [2, 0]]),
        "ids": [f"face {i}" for i in range(20)],
        "persons": ["Ann", "Ben"] * 10,
    }
    exec(block, names)
    assert a.grad is not None
    assert names["probe_scores"].shape == (9,)
    assert names["result"].similarity.shape == (2, 7, 7)
    assert names["hits"].indices.shape == (3, 10)
    assert all(len(hits) == 10 and {hit.person for hit in hits} == {"Ben"} for hits in names["found"])


@pytest.mark.examples
def test_the_code_of_the_page_on_all_pairs_runs():
    _, block = re.findall(r"```python\n(.*?)```", OPERATORS.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    assert names["maps"].contribution.shape == (4, 7, 7)  # type: ignore[attr-defined]


@pytest.mark.process
def test_tables_are_those_of_the_results_files():
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "render.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
