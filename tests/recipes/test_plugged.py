"""All plug-ins of a network on one list: each score is the one that its own model gives."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch import nn

from recipes.studies.plugged import MATCHINGS, measured
from xcos_ext.backbones import SplitRecogniser
from xcos_ext.evaluation import verification
from xcos_ext.evaluation.datasets import PairList
from xcos_ext.model import plug

pytestmark = pytest.mark.usefixtures("one_thread")


def crop(key: str) -> np.ndarray:
    person = key.split("/")[0]
    base = np.random.default_rng([*person.encode()]).integers(0, 200, (7, 7, 3))
    noise = np.random.default_rng([*key.encode()]).integers(0, 56, (7, 7, 3))
    return np.kron((base + noise).astype(np.uint8), np.ones((16, 16, 1), np.uint8))


def test_every_score_is_that_of_its_model() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        output = nn.Sequential(nn.Flatten(), nn.Linear(147, 16))
        network = SplitRecogniser(nn.AvgPool2d(16), output, grid_shape=(3, 7, 7), embedding_size=16).eval()
    network.requires_grad_(False)
    people = [f"p{i}" for i in range(12)]
    faces = np.stack([crop(f"{person}/0") for person in people])
    model = plug(network, [faces])
    model.threshold = 0.5
    named = [(f"{p}/1", f"{p}/2") for p in people]
    named += [(f"{p}/1", f"{q}/2") for p, q in zip(people, people[1:] + people[:1], strict=True)]
    folds = [i % 2 for i in range(12)] * 2
    pairs = PairList(
        named, [True] * 12 + [False] * 12, folds, lambda key: key.split("/")[0],
        pictures=types.SimpleNamespace(read=crop),
    )  # fmt: skip
    found = measured(network, {"closed form": model}, pairs, replicates=20)
    rows = found["variants"]
    assert set(rows) == {"plain cosine", *(f"closed form, {how}" if how else "closed form" for how in MATCHINGS)}
    a, b = (model.features_of([crop(pairs.keys[i]) for i in side]) for side in (pairs.first, pairs.second))
    own = verification(model.score(a, b).numpy(), pairs.genuine, pairs.folds)
    assert rows["closed form"]["auc"] == pytest.approx(own.auc)
    model.head.set_matching(1, "soft", 0.1)
    assert rows["closed form, soft, radius 1"]["auc"] == pytest.approx(
        verification(model.score(a, b).numpy(), pairs.genuine, pairs.folds).auc
    )
    assert "accuracy" in rows["plain cosine"]["intervals"]
    assert rows["closed form"]["at_the_threshold"]["threshold"] == 0.5 and found["failed_pictures"] == 0
