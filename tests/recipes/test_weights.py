"""The state of the next default model, which the recipes go on from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xcos_ext.model import load_model

FILE = Path(__file__).resolve().parents[2] / "recipes" / "weights" / "slim.safetensors"


def test_the_next_default_model_loads_and_is_small() -> None:
    model = load_model(FILE)
    assert model.architecture == "slim" and FILE.stat().st_size < 6e6
    faces = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    features = model.features_of(list(faces))
    assert features.shape == (2, 32, 7, 7)
    made = model.score(features[:1], features[1:], return_maps=True)
    assert made.attention.sum().item() == pytest.approx(1, abs=1e-5)
    assert model.threshold is not None and model.fmr_curve is not None
