"""The LFW and region-swap commands on generated faces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from recipes import closed_forms as protocol
from recipes.region_swap import MAPS, REGIONS, region_swap
from xcos_ext import backbones
from xcos_ext.evaluation.datasets import LFW
from xcos_ext.model import plug

Image = pytest.importorskip("PIL.Image")

PEOPLE = 12  # the last four are in no pair


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures each of people who are random 7x7 mosaics, and a pairs file of two folds."""
    root = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for person in range(PEOPLE):
        mosaic = rng.integers(40, 216, (7, 7, 3))
        folder = root / "crops" / f"P{person}"
        folder.mkdir(parents=True)
        for number in (1, 2):
            noisy = np.clip(mosaic + rng.integers(-8, 9, mosaic.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).resize((112, 112), Image.Resampling.NEAREST).save(
                folder / f"P{person}_{number:04d}.png"
            )
    lines = ["2\t4"]
    for fold in range(2):
        first = 4 * fold
        lines += [f"P{p}\t1\t2" for p in range(first, first + 4)]
        lines += [f"P{p}\t1\tP{first + (p + 1) % 4}\t2" for p in range(first, first + 4)]
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    return root


def local_model() -> backbones.Recogniser:
    """A recogniser whose cells see exactly their own 16x16 pixels."""
    torch.manual_seed(0)
    body = nn.AvgPool2d(16)
    net = backbones.SplitRecogniser(
        body, nn.Sequential(nn.Flatten(), nn.Linear(147, 40)), grid_shape=(3, 7, 7), embedding_size=40
    )
    return net.eval()


def test_statistics_leave_out_everyone_in_a_pair(faces: Path) -> None:
    data = LFW(faces / "crops", faces / "pairs.txt", folds=[0])
    statistics = protocol.lfw_statistics(local_model(), data)
    assert statistics.faces == 4 and "4 people who are in no pair" in statistics.note
    assert protocol.lfw_statistics(local_model(), data, limit=2).faces == 2
    with pytest.raises(ValueError, match=r"forms: expected some of plain, .*, got other"):
        protocol.compare_forms(local_model(), data, {}, forms=["other"])


def test_command(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, report = tmp_path / "net.pt", tmp_path / "report.json"
    torch.save(backbones.create("mobilefacenet").state_dict(), path)
    options = ["--forms", "plain", "raw-uniform", "norm", "--spreads", "1.5"]
    rows = 4
    common = [
        "--pictures",
        str(faces / "crops"),
        "--pairs",
        str(faces / "pairs.txt"),
        "--json",
        str(report),
        "--threads",
        "1",
    ]
    status = protocol.main([*common, "--weights", str(path), *options])
    assert status == 0
    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == 2 + rows and all(line.count("|") == 7 for line in table)
    data = json.loads(report.read_text())
    assert data["pairs"] == 16 and data["folds"] == 2 and len(data["forms"]) == rows
    assert data["statistics"] == "one picture each of 4 people who are in no pair"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pt", "report.json"]


def test_region_swap_finds_the_region_with_local_cells(faces: Path) -> None:
    data = LFW(faces / "crops", faces / "pairs.txt")
    pictures = [data.pictures.read(key) for key in data.pictures.keys]
    net = local_model()
    models = {f"{s:g}": plug(net, pictures, spread=s) for s in (0.0, 100.0)}
    result = region_swap(models, data, pairs=6)
    assert set(result) == {"0", "100"}
    assert all(set(maps) == set(MAPS) and set(maps["-S"]) == set(REGIONS) for maps in result.values())
    # Cells that see only their own pixels change where the region is and nowhere else.
    assert min(result["0"]["drop of S"].values()) > 0.97
    # Cells that share everything can hardly tell.
    assert np.mean(list(result["100"]["drop of S"].values())) < 0.9
    assert result["0"]["centre"] == result["100"]["centre"]
    assert result["0"]["centre"]["nose"] > 0.95 and result["0"]["centre"]["forehead"] < 0.4
    again = region_swap(models, data, pairs=6)
    assert again == result
    with pytest.raises(ValueError, match=r"pairs: expected 1..8, got 9"):
        region_swap(models, data, pairs=9)
