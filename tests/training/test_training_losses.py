"""Losses over pairs and all pairs, what they do not push, and the softmax over a part of the classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from template_samples import head
from torch import Tensor

import xcos_ext
from xcos_ext import reference
from xcos_ext.model import ArcFaceHead, CosFaceHead, XCosAttention, XCosHead
from xcos_ext.training.losses import (
    all_pairs,
    contrastive,
    cosine_loss,
    infonce,
    make_loss,
    pair_scores,
    sample_classes,
    teacher_loss,
    triplet,
)
from xcos_ext.training.tasks.sources import fix_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def heads() -> dict[str, XCosHead]:
    return {
        "learned": head(channels=6, hidden=4),
        "residual": head("residual", 6, 4),
        "norm": XCosHead(8, 6, attention="norm").double().eval(),
        "uniform": XCosHead(8, 6, attention="uniform").double().eval(),
    }


@pytest.mark.parametrize("kind", list(heads()))
class TestDetach:
    def gradients(self, net: XCosHead, compute: Any, detach: str) -> tuple[Tensor | None, list[Tensor | None]]:
        """Of a sum of scores: to the grid features, and to the attention's parameters."""
        torch.manual_seed(3)
        x = torch.randn(4, 6, 7, 7, dtype=F64, requires_grad=True)
        net.zero_grad()
        scores = compute(net, x, detach)
        if scores.requires_grad:
            (scores * torch.linspace(1, 2, scores.numel(), dtype=F64).view_as(scores)).sum().backward()
        own = [] if net.attention is None else [p.grad for p in net.attention.parameters()]
        return x.grad, own

    def test_all_pairs_are_pairs(self, kind: str) -> None:
        net = heads()[kind]

        def pairs(net: XCosHead, x: Tensor, detach: Any) -> Tensor:
            return pair_scores(net, x.repeat_interleave(4, 0), x.repeat(4, 1, 1, 1), detach).view(4, 4)

        for detach in ("none", "attention", "features"):
            ours, theirs = (self.gradients(net, compute, detach) for compute in (all_pairs, pairs))
            assert (ours[0] is None) == (theirs[0] is None)
            if ours[0] is not None:
                torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-11)
            for a, b in zip(ours[1], theirs[1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    def test_what_is_not_pushed(self, kind: str) -> None:
        net = heads()[kind]
        whole = self.gradients(net, all_pairs, "none")
        through_cosine = self.gradients(net, all_pairs, "attention")
        neither = self.gradients(net, all_pairs, "features")
        assert whole[0] is not None and through_cosine[0] is not None and neither[0] is None
        changed = not torch.allclose(whole[0], through_cosine[0])
        assert changed == (kind != "uniform")
        for a, b, c in zip(whole[1], through_cosine[1], neither[1], strict=True):
            assert a is not None and torch.allclose(a, b) and torch.allclose(a, c)  # the attention learns in any case


def test_the_cosine_with_the_attention_held_is_what_is_left() -> None:
    """With W held, the score is a weighted sum of cosines."""
    net = head("residual", 6, 4)
    x = torch.randn(3, 6, 7, 7, dtype=F64, requires_grad=True)
    a, b = x[:2], x[1:]
    (gradient,) = torch.autograd.grad(pair_scores(net, a, b, "attention").sum(), x)
    weights = net.attention(a, b).detach()
    by_hand = (weights * torch.nn.functional.cosine_similarity(a, b, dim=1)).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(by_hand, x)[0], rtol=1e-9, atol=1e-12)


def test_distances() -> None:
    scores, cosines = torch.tensor([0.5, 0.0]), torch.tensor([0.1, 0.2])
    assert float(cosine_loss(scores, cosines)) == pytest.approx((0.16 + 0.04) / 2)
    assert float(cosine_loss(scores, cosines, "l1")) == pytest.approx(0.3)


def test_genuine_and_impostor_pairs_may_count_alike() -> None:
    people = torch.tensor([0, 0, 1])
    embeddings = torch.zeros(3, 4)
    scores = torch.tensor([[9.0, 0.4, 0.1], [0.4, 9.0, 0.1], [0.1, 0.1, 9.0]])
    assert float(teacher_loss(scores, embeddings)) == pytest.approx((2 * 0.16 + 4 * 0.01) / 6)
    assert float(teacher_loss(scores, embeddings, people)) == pytest.approx((0.16 + 0.01) / 2)
    assert float(teacher_loss(scores, embeddings, people, "l1")) == pytest.approx((0.4 + 0.1) / 2)


def test_the_loss_against_a_teacher_counts_the_kind_that_is_there() -> None:
    scores = torch.tensor([[1.0, 0.5], [0.5, 1.0]], requires_grad=True)
    for people in (torch.tensor([0, 0]), torch.tensor([0, 1])):  # genuine pairs alone, impostor pairs alone
        assert float(teacher_loss(scores, torch.eye(2), people).detach()) == pytest.approx(0.25)
    alone = teacher_loss(scores[:1, :1], torch.eye(2)[:1], torch.tensor([0]))  # no pair at all
    assert float(alone.detach()) == 0
    alone.backward()
    assert torch.equal(torch.zeros(2, 2), scores.grad)  # type: ignore[arg-type]


def test_faces_without_another_of_their_person_count_as_impostors_only() -> None:
    scores = torch.rand(5, 5)
    people = torch.tensor([0, 0, 1, 1, 2])
    for loss in (infonce, triplet):
        value = loss(scores, people, 0.3)
        assert torch.isfinite(value)
        lifted = scores.clone()
        lifted[4] += 5.0  # the single face's own row: no row of the loss
        assert float(loss(lifted, people, 0.3)) == pytest.approx(float(value))
        lifted = scores.clone()
        lifted[:4, 4] += 5.0
        assert float(loss(lifted, people, 0.3)) > float(value)


@pytest.mark.parametrize("name", ["infonce", "contrastive", "triplet", "teacher"])
def test_gradients_are_those_through_the_reference(name: str) -> None:
    torch.manual_seed(1)
    net = XCosHead(6, 5, attention=XCosAttention(5, symmetric=False))
    grids, people = torch.randn(8, 6, 7, 7), torch.arange(4).repeat_interleave(2)
    teacher = torch.nn.functional.normalize(torch.randn(8, 5, dtype=F64))
    fix_statistics(net, grids, 0)
    net.double()
    grids = grids.double()

    def gradients(scores_of: Any) -> list[Tensor]:
        net.zero_grad()
        templates = net.templates(net.features(grids), role="both")
        scores = scores_of(templates, templates)
        loss = teacher_loss(scores, teacher) if name == "teacher" else make_loss(name)(scores, people)
        loss.backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    ours, plain = gradients(xcos_ext.xcos_matrix), gradients(reference.xcos_matrix)
    assert len(ours) == len(plain) == len(list(net.parameters()))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert any(a.abs().max() > 1e-3 for a in ours)


def test_losses_by_hand() -> None:
    people = torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([[9.0, 0.8, 0.1, 0.5], [0.7, 9.0, 0.2, 0.0], [0.3, 0.1, 9.0, 0.6], [0.2, 0.4, 0.9, 9.0]])
    # The diagonal, 9, must not count anywhere.
    rows = [(0.8, 0.1, 0.5), (0.7, 0.2, 0.0), (0.6, 0.3, 0.1), (0.9, 0.2, 0.4)]
    by_hand = np.mean([np.log(sum(np.exp(x / 0.5) for x in row)) - row[0] / 0.5 for row in rows])
    assert float(infonce(scores, people, 0.5)) == pytest.approx(by_hand, rel=1e-6)
    assert float(triplet(scores, people, 0.4)) == pytest.approx(np.mean([0.1, 0.0, 0.1, 0.0]), abs=1e-6)
    genuine = np.mean([max(0, 1 - 0.25 - row[0]) ** 2 for row in rows])
    impostor = np.mean([max(0, x - 0.25) ** 2 for row in rows for x in row[1:]])
    assert float(contrastive(scores, people, 0.25)) == pytest.approx(genuine + impostor, rel=1e-6)
    with pytest.raises(ValueError, match="loss: expected 'infonce', 'contrastive' or 'triplet', got 'hinge'"):
        make_loss("hinge")


def test_statistics_are_fixed_and_those_of_the_faces() -> None:
    grids = (torch.randn(600, 24, 7, 7) + torch.randn(24, 1, 1)).half()
    net = XCosHead(24, 8, attention=XCosAttention(8, symmetric=False))
    fix_statistics(net, grids, 0)
    norm = net.conv1x1[1]
    with torch.no_grad():
        plain = net.conv1x1[0](grids.float())
    assert not any(module.training for module in net.modules())
    assert norm.momentum == pytest.approx(0.1)
    deviation = plain.std((0, 2, 3))
    torch.testing.assert_close(norm.running_mean / deviation, plain.mean((0, 2, 3)) / deviation, atol=0.05, rtol=0)
    torch.testing.assert_close(norm.running_var.sqrt() / deviation, torch.ones(8), atol=0.05, rtol=0)


class TestPartialSoftmax:
    @pytest.mark.parametrize("made", [ArcFaceHead, CosFaceHead])
    def test_columns_are_those_of_the_whole(self, made: type[ArcFaceHead]) -> None:
        margin = made(10, 30).double()
        embeddings, labels = torch.randn(4, 10, dtype=F64), torch.tensor([3, 29, 3, 0])
        classes = torch.tensor([0, 3, 7, 8, 29])
        torch.testing.assert_close(margin(embeddings, labels, classes), margin(embeddings, labels)[:, classes])
        assert torch.equal(margin(embeddings, labels, torch.arange(30)), margin(embeddings, labels))

    def test_every_label_and_a_share_of_the_others(self) -> None:
        labels = torch.tensor([5, 5, 99, 0])
        generator = torch.Generator().manual_seed(0)
        seen = set()
        for _ in range(200):
            chosen = sample_classes(labels, 100, 0.2, generator)
            assert len(chosen) == 20 and {0, 5, 99} <= set(chosen.tolist())
            assert torch.equal(chosen, chosen.sort().values)
            seen |= set(chosen.tolist())
        assert seen == set(range(100))
        assert len(sample_classes(labels, 100, 0.01, generator)) == 3
        assert len(sample_classes(labels, 100, 1.0, generator)) == 100
