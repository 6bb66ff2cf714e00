"""Losses over pairs and over all pairs of a batch; scores and people in, a number out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from xcos_ext.model import XCosHead
from xcos_ext.ops import xcos_matrix, xcos_score
from xcos_ext.ops.templates import unit_cells

__all__ = [
    "Detach",
    "all_pairs",
    "contrastive",
    "cosine_loss",
    "infonce",
    "kinds",
    "make_loss",
    "pair_scores",
    "sample_classes",
    "teacher_loss",
    "triplet",
]

Loss = Callable[[Tensor, Tensor], Tensor]

#: What a loss on scores does not reach: ``"none"``; ``"attention"``: the grid feature through W (S still pushes it);
#: ``"features"``: the grid feature at all, so that only the attention network is trained by it.
Detach = Literal["none", "attention", "features"]


def _itself(faces: Tensor) -> Tensor:
    """The diagonal, bool [B, B]."""
    return torch.eye(len(faces), dtype=torch.bool, device=faces.device)


def kinds(people: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs are genuine and which are impostors, bool [B, B] each; a face with itself is neither."""
    same = people[:, None] == people[None]
    return same & ~_itself(people), ~same


def infonce(scores: Tensor, people: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss over rows: each face is to find its person's other faces among all others
    (Khosla et al., arXiv 2004.11362). Faces without another of their person in the batch have no row of their own.

    Args:
        scores: [B, B].
        people: int64 [B]; at least one of them twice.
        temperature: divides the scores.

    >>> scores = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.1], [0.1, 0.1, 1.0]])
    >>> round(float(infonce(scores, torch.tensor([0, 0, 1]), temperature=0.4)), 3)  # log(1 + e^-2)
    0.127
    """
    genuine, _ = kinds(people)
    logs = (scores / temperature).masked_fill(_itself(scores), -torch.inf).log_softmax(1)
    count = genuine.sum(1)
    # where, not a product: the diagonal is -inf.
    rows = -torch.where(genuine, logs, 0.0).sum(1) / count.clamp_min(1)
    return rows.sum() / (count > 0).sum()


def contrastive(scores: Tensor, people: Tensor, margin: float) -> Tensor:
    """Genuine pairs are to score above 1 - margin, impostors below the margin; both kinds count alike, rare as one is.

    Not genuine pairs at 1, as is common: no two pictures agree in every cell, and asking for it lifts impostors too.
    """
    genuine, impostor = kinds(people)
    below, above = 1 - margin - scores[genuine], scores[impostor] - margin
    return below.relu().square().mean() + above.relu().square().mean()


def triplet(scores: Tensor, people: Tensor, margin: float) -> Tensor:
    """Batch-hard: each face's least similar genuine one must beat its most similar impostor by the margin
    (Hermans et al., arXiv 1703.07737). Faces without a genuine one count nothing."""
    genuine, impostor = kinds(people)
    hardest_genuine = scores.masked_fill(~genuine, torch.inf).amin(1)
    hardest_impostor = scores.masked_fill(~impostor, -torch.inf).amax(1)
    rows = (margin + hardest_impostor - hardest_genuine).relu()
    return rows.sum() / genuine.any(1).sum()


def make_loss(name: str, temperature: float = 0.05, margin: float | None = None) -> Loss:
    """A loss of scores [B, B] and people [B] with its constants; margin None: 0.3 for contrastive, 0.2 for triplet.

    >>> scores = torch.tensor([[1.0, 0.8, 0.1], [0.8, 1.0, 0.3], [0.1, 0.3, 1.0]])
    >>> round(float(make_loss("triplet", margin=0.6)(scores, torch.tensor([0, 0, 1]))), 4)
    0.05

    Raises:
        ValueError: an unknown name.
    """
    if name == "infonce":
        return partial(infonce, temperature=temperature)
    if name == "contrastive":
        return partial(contrastive, margin=0.3 if margin is None else margin)
    if name == "triplet":
        return partial(triplet, margin=0.2 if margin is None else margin)
    raise ValueError(f"loss: expected 'infonce', 'contrastive' or 'triplet', got {name!r}")


def cosine_loss(scores: Tensor, cosines: Tensor, kind: Literal["mse", "l1"] = "mse") -> Tensor:
    """L_cos of xCos (arXiv 2003.05383): mean (score - c)^2, or |score - c|, c the teacher's cosine of the same pair.

    >>> round(float(cosine_loss(torch.tensor([0.5, 0.1]), torch.tensor([0.2, 0.1]), "l1")), 3)
    0.15
    """
    difference = scores - cosines
    return difference.square().mean() if kind == "mse" else difference.abs().mean()


def teacher_loss(
    scores: Tensor, embeddings: Tensor, people: Tensor | None = None, kind: Literal["mse", "l1"] = "mse"
) -> Tensor:
    """L_cos over all pairs but the diagonal.

    Args:
        scores: [B, B].
        embeddings: the teacher's [B, D], at unit length.
        people: int64 [B]: genuine and impostor pairs then count half each, rare as the former are, or one kind alone
            where there is no other; None: every pair counts alike.
        kind: as in :func:`cosine_loss`.

    >>> float(teacher_loss(torch.full((3, 3), 0.5), torch.eye(3)))
    0.25
    """
    cosines = embeddings @ embeddings.T
    if people is None:
        return cosine_loss(scores[~_itself(scores)], cosines[~_itself(scores)], kind)
    parts = [cosine_loss(scores[chosen], cosines[chosen], kind) for chosen in kinds(people) if chosen.any()]
    return torch.stack(parts).mean() if parts else 0.0 * scores.sum()


def all_pairs(head: XCosHead, features: Tensor, detach: Detach = "none") -> Tensor:
    """Scores [B, B] of grid features [B, C, H, W] with each other, differentiable without storing any pair.

    Args:
        head: in evaluation mode, which fixes its batch norms' statistics and leaves its weights trainable.
        features: F.
        detach: what gradients of the scores do not reach.

    >>> all_pairs(XCosHead(8, 4).eval(), torch.randn(5, 4, 7, 7)).shape
    torch.Size([5, 5])
    """
    source = features if detach == "none" else features.detach()
    templates = head.templates(source, role="both")  # every face is a first face and a second one
    if detach == "attention":
        wide = features.to(templates.norms.dtype)
        templates = dataclasses.replace(templates, features=unit_cells(wide)[0].to(templates.dtype))
    return xcos_matrix(templates, templates)


def pair_scores(head: XCosHead, a: Tensor, b: Tensor, detach: Detach = "none") -> Tensor:
    """Scores [N] of pairs of grid features [N, C, H, W]; ``detach`` as in :func:`all_pairs`."""
    if detach == "features":
        a, b = a.detach(), b.detach()
    if detach != "attention" or head.fixed_attention == "uniform":
        return head.score(a, b)
    held = a.detach(), b.detach()
    weights = xcos_score(*held, "norm", return_maps=True)[2] if head.attention is None else head.attention(*held)
    return cast(Tensor, xcos_score(a, b, weights))


def sample_classes(labels: Tensor, classes: int, share: float, generator: torch.Generator) -> Tensor:
    """Classes that take part in a partial softmax: those of the batch and a random share of the others.

    (Partial FC, An et al., arXiv 2010.05222.)

    Args:
        labels: int64 [N], on the CPU.
        classes: in all.
        share: of the classes to take part, in (0, 1].
        generator: of the draw.

    Returns:
        Classes, int64, ascending.

    >>> chosen = sample_classes(torch.tensor([7, 3, 3]), 100, 0.1, torch.Generator().manual_seed(0))
    >>> len(chosen), {3, 7} <= set(chosen.tolist())
    (10, True)
    """
    present = torch.zeros(classes, dtype=torch.bool)
    present[labels] = True
    wanted = max(0, round(share * classes) - int(present.sum()))
    absent = torch.nonzero(~present).flatten()
    chosen = absent[torch.randperm(len(absent), generator=generator)[:wanted]]
    present[chosen] = True
    return torch.nonzero(present).flatten()
