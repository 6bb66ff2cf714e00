"""recipes/pair_costs.py: three ways to score all pairs of a batch, and what each costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes import pair_costs
from xcos_ext.model import XCosAttention, XCosHead
from xcos_ext.training.tasks.sources import fix_statistics

pytestmark = pytest.mark.usefixtures("one_thread")


def test_three_ways_give_one_result_and_the_formula_says_what_pairs_keep() -> None:
    grids = torch.randn(64, 16, 7, 7).half()
    head = XCosHead(16, 8, attention=XCosAttention(8, symmetric=False))
    fix_statistics(head, grids, 0)
    count, cells = 32, 49
    features = head.features(grids[:count].float()).detach().requires_grad_()
    kept, scores = {}, {}
    for name, compute in pair_costs.IMPLEMENTATIONS.items():
        scores[name] = compute(head, features).detach()
        kept[name] = pair_costs.saved_bytes(lambda compute=compute: compute(head, features))
    for name in pair_costs.IMPLEMENTATIONS:
        torch.testing.assert_close(scores[name], scores["xcos_matrix"], rtol=0, atol=2e-6)
    needed = count * count * pair_costs.pair_bytes(head, cells)
    assert needed <= kept["eager, embedded once"] <= 1.05 * needed
    assert kept["eager, every pair"] > needed
    # Templates, their making, and a matrix of 4 kB: nothing that grows with the pairs' cells.
    assert kept["xcos_matrix"] < 0.1 * needed


@pytest.mark.thorough
def test_costs_are_measured_in_processes_of_their_own() -> None:
    head = XCosHead(24, attention=XCosAttention(symmetric=False)).eval()
    costs = pair_costs.compare(head, torch.randn(32, 24, 7, 7).half(), "infonce", 2, rounds=1, repeats=2)
    own = costs["xcos_matrix"]
    for cost in costs.values():
        np.testing.assert_allclose(cost.scores, own.scores, atol=2e-6)
        np.testing.assert_allclose(cost.gradient, own.gradient, atol=1e-5 * np.abs(own.gradient).max())
        assert all(seconds > 0 for seconds in cost.seconds)
    needed = 32 * 32 * pair_costs.pair_bytes(head, 49)
    assert own.peak < needed < 1.2 * costs["eager, every pair"].peak
