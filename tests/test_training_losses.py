"""Losses over pairs and all pairs, what they do not push, and the softmax over a part of the classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from template_samples import head
from torch import Tensor

from xcos_ext.model import ArcFaceHead, CosFaceHead, XCosHead
from xcos_ext.training.losses import all_pairs, cosine_loss, infonce, pair_scores, sample_classes, teacher_loss, triplet

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
