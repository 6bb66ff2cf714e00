"""A training step of a head on cached maps, end to end: ours beside the eager composition of the same losses.

    python recipes/studies/train_step.py --threads 1 --out benchmarks/results/training/train_step.json

A step is all of it: drawing a batch, reading its fp16 maps, the head, L_cos and infonce over all pairs (or L_cos over
drawn pairs), backward, AdamW. Contenders differ in how scores are computed; they take turns in one process. Then the
peak memory of the head and infonce over all pairs of a larger batch, each contender in a process of its own. Maps are
random numbers: times do not depend on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from harness import RESULTS, Case, describe, machine, measure, write_json
from torch import Tensor

from recipes import pair_costs
from xcos_ext import reference
from xcos_ext.backbones import create
from xcos_ext.model import XCosAttention, XCosHead
from xcos_ext.training import BatchIndex, TrainConfig
from xcos_ext.training.data import Maps, Pictures
from xcos_ext.training.tasks import head as head_task
from xcos_ext.training.tasks.config import DataConfig, HeadExperiment, LossConfig, ModelConfig
from xcos_ext.training.tasks.head import HeadTask
from xcos_ext.training.tasks.sources import Sources

FACES, EACH = 1024, 2


def sources() -> Sources:
    """Random maps of 512 people with two pictures each."""
    torch.manual_seed(0)
    people = torch.arange(FACES) // EACH
    names = tuple(f"{number:04d}" for number in range(FACES // EACH))
    pictures = Pictures(torch.empty(FACES, 3, 1, 1, dtype=torch.uint8), people, names, tuple(map(str, range(FACES))))
    grids = torch.randn(1, FACES, 512, 7, 7).half()
    embeddings = torch.nn.functional.normalize(torch.randn(1, FACES, 128), dim=2)
    return Sources(create("mobilefacenet"), pictures, Maps(grids, embeddings))


def eager_pairs(head: XCosHead, a: Tensor, b: Tensor, detach: str = "none") -> Tensor:
    """Drawn pairs as the public implementation scores them."""
    assert head.attention is not None
    scores = reference.xcos_score(a, b, head.attention(a, b))
    assert isinstance(scores, Tensor)
    return scores


def step(task: HeadTask, size: int, name: str, way: Callable[..., Tensor]) -> Callable[[], None]:
    """One training step with ``way`` in place of the scores' function called ``name``."""
    optimiser = torch.optim.AdamW(task.parameter_groups(), lr=1e-6)
    count = 0

    def run() -> None:
        nonlocal count
        count += 1
        ours = getattr(head_task, name)
        setattr(head_task, name, way)
        try:
            optimiser.zero_grad(set_to_none=True)
            loss, _ = task.loss(task.batch(BatchIndex(0, count), size))
            loss.backward()
            optimiser.step()
        finally:
            setattr(head_task, name, ours)

    return run


def cases() -> list[Case]:
    known = sources()
    every, drawn = (
        HeadTask(
            known,
            HeadExperiment(
                DataConfig(""),
                ModelConfig("", start="random", channels=32, attention="learned", symmetric=False),
                TrainConfig(steps=1, batch=64),
                loss,
            ),
        )
        for loss in (LossConfig(cosine=10.0, contrast=1.0), LossConfig(cosine=10.0, pairs="drawn"))
    )
    ways = {
        "xcos_ext": head_task.all_pairs,
        "eager, embedded once": lambda head, features, detach="none": pair_costs.embedded_once(head, features),
        "eager, every pair": lambda head, features, detach="none": pair_costs.every_pair(head, features),
    }
    made = []
    for size in (64, 128):
        made.append(
            Case(
                f"training step/all pairs of {size} faces",
                {name: step(every, size, "all_pairs", way) for name, way in ways.items()},
                targets=[("eager, every pair", 5.0, "training step: times eager >= 5")],
                pairs=size * size,
            )
        )
    size = 128
    made.append(
        Case(
            f"training step/{size // 2} drawn pairs",
            {
                "xcos_ext": step(drawn, size, "pair_scores", head_task.pair_scores),
                "eager": step(drawn, size, "pair_scores", eager_pairs),
            },
            pairs=size // 2,
        )
    )
    return made


def memory(faces: int) -> dict[str, Any]:
    """Peak resident memory above what was there before a step, in bytes, and seconds of one step."""
    torch.manual_seed(0)
    costs = pair_costs.compare(
        XCosHead(attention=XCosAttention(symmetric=False)),
        torch.randn(faces, 512, 7, 7).half(),
        "infonce",
        EACH,
        rounds=1,
        repeats=1,
    )
    return {
        "name": f"infonce over all pairs of {faces} faces, forward and backward",
        "peak_bytes": {name: cost.peak for name, cost in costs.items()},
        "seconds": {name: min(cost.seconds) for name, cost in costs.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds a case")
    parser.add_argument("--memory", type=int, default=256, metavar="B", help="faces of the batch for peak memory")
    parser.add_argument("--out", type=Path, default=RESULTS / "training" / "train_step.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for case in cases():
        case.budget = options.budget
        rows.append(measure(case))
        print(describe(rows[-1]), flush=True)
    rows.append(memory(options.memory))
    print(rows[-1]["name"])
    for name, peak in rows[-1]["peak_bytes"].items():
        print(f"    {name:<22}{peak / 1e6:10.1f} MB{rows[-1]['seconds'][name]:10.2f} s")
    write_json(options.out, {"schema": 1, "machine": machine(), "cases": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
