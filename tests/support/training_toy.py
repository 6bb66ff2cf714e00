"""A small training problem; run as a program it trains, so that tests can kill it, limit it, or start it twice.

python tests/support/training_toy.py OUT [table.key=value ...]
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xcos_ext.io.weights import read_safetensors, write_safetensors
from xcos_ext.training import BatchIndex, TrainConfig, train, weight_decay_groups
from xcos_ext.training.settings import build, override

SETTINGS: dict[str, Any] = {"steps": 40, "batch": 16, "rate": 1e-2, "warmup": 5, "ema": 0.9, "clip": 1.0, "seed": 3}


class Toy:
    """Learns the sum of the inputs, with everything that makes resuming hard: batch norm, dropout, averages."""

    def __init__(self, width: int = 16, *, dropout: float = 0.1, norm: bool = True) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(8, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.PReLU()]
        self.module: nn.Module = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(width, 1))
        self.kill_at = int(os.environ.get("TOY_KILL_AT", "-1"))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return weight_decay_groups(self.module)

    def batch(self, index: BatchIndex, size: int) -> dict[str, Any]:
        inputs = torch.randn(size * index.parts, 8, generator=index.generator())
        return {"inputs": index.slice_of(inputs), "step": index.step}

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        if batch["step"] == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        difference = self.module(batch["inputs"]) - batch["inputs"].sum(1, keepdim=True)
        return difference.square().mean(), {"absolute": difference.detach().abs().mean()}

    def describe(self) -> dict[str, Any]:
        return {"task": "toy"}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        module.eval()
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).to(next(module.parameters()).device)
        return {"error": float((module(inputs) - inputs.sum(1, keepdim=True)).square().mean())}

    def export(self, module: nn.Module, folder: Path) -> list[Path]:
        write_safetensors(folder / "model.safetensors", module.state_dict(), {})
        return [folder / "model.safetensors"]


def settings(*assignments: str, **changes: Any) -> TrainConfig:
    tables = override({"train": SETTINGS | changes}, [f"train.{a}" for a in assignments])
    return build(TrainConfig, tables["train"])


def state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything in a folder's checkpoint: tensors, and the values that a resumed training goes on with."""
    tensors, metadata = read_safetensors(folder / "checkpoint.safetensors")
    return tensors, {"step": int(metadata["step"])} | json.loads(metadata["values"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "TOY_LIMIT" in os.environ:  # no file may grow beyond it: what a full disk does
        limit = int(os.environ["TOY_LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    toy = Toy(dropout=float(os.environ.get("TOY_DROPOUT", "0.1")), norm=os.environ.get("TOY_NORM", "1") == "1")
    result = train(toy, settings(*sys.argv[2:]), sys.argv[1], resume=True, show=False)
    if os.environ.get("RANK", "0") == "0":  # two processes would write into each other's line
        print(json.dumps({"steps": result.steps, "resumed": result.resumed, "loss": result.loss}))
