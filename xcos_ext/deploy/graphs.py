"""A model's computations in standard operators only, for exporters: no operator of our own, the head in fp32."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext.backbones.plain import altered_part, batch_statistics
from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.card.card import TemplateLayout
from xcos_ext.model.attention import XCosAttention
from xcos_ext.model.head import ClosedFormHead, XCosHead
from xcos_ext.model.model import XCosModel
from xcos_ext.ops.templates import unit_cells

__all__ = ["BodyGraph", "PairGraph", "ScoreGraph", "TemplateGraph", "attention_of", "check_exportable", "layout_of"]

Maps = tuple[Tensor, Tensor, Tensor]


def attention_of(head: XCosHead | ClosedFormHead) -> XCosAttention | str:
    """The head's learned attention, or ``"norm"`` or ``"uniform"``."""
    if isinstance(head, ClosedFormHead):
        return "norm"
    if head.attention is not None:
        return head.attention
    return head.fixed_attention or "uniform"


def check_exportable(model: XCosModel) -> None:
    """Refuse a model that has no graph of standard operators which computes what it does.

    Raises:
        ValueError: it is in training mode, matches cells, normalises by the statistics of a batch, or has hooks or
            methods of the user's own: an exporter writes layers down, not what happens around them.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected evaluation mode, got training mode; call .eval() first")
    attention = model.head.attention
    found = altered_part(model) or (None if attention is None else attention.altered(folding=True))
    if found := found or model.head._other_score() or batch_statistics(model):
        raise ValueError(
            f"model: expected one without hooks, methods and layers of its own, got {found}; undo this first"
        )
    if model.head.radius:
        raise ValueError(
            f"model: expected a head that compares cells in their places, got radius {model.head.radius}; call "
            "model.head.set_matching(0) first"
        )


def layout_of(model: XCosModel) -> TemplateLayout:
    """How the model's templates are laid out, found by running it on one empty picture."""
    with torch.no_grad():
        parameter = next(iter(model.parameters()), torch.empty(0))
        features = model.features(torch.zeros(1, 3, *model.preprocessing.size).to(parameter.device))
    attention = attention_of(model.head)
    hidden = attention.hidden if isinstance(attention, XCosAttention) else 0
    return TemplateLayout((features.shape[2], features.shape[3]), features.shape[1], hidden)


class BodyGraph(nn.Module):
    """Images [N, 3, height, width] to the backbone's map: computed in ``dtype``, fp32 on both sides."""

    def __init__(self, model: XCosModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone).to("cpu", dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.dtype)
        grid = self.backbone.grid(images) if isinstance(self.backbone, Recogniser) else self.backbone(images)
        return grid.to(torch.float32)


class FaceGraph(nn.Module):
    """The backbone's map [N, C, H, W] to flat templates [N, T]: the head's share of each face."""

    def __init__(self, model: XCosModel) -> None:
        super().__init__()
        self.head = copy.deepcopy(model.head).to("cpu", torch.float32).requires_grad_(False)
        attention = attention_of(self.head)
        self.parts: Any = None
        if isinstance(attention, XCosAttention):
            # Folded here, so that the graph has constants in place of batch norms.
            self.parts, _ = attention._face_parts("both", torch.float32, torch.float32)

    def forward(self, grid: Tensor) -> Tensor:
        features = self.head.features(grid)
        if self.parts is None:
            return torch.cat([part.flatten(1) for part in unit_cells(features)], 1)
        unit, norms, projection, bias = self.parts(features)
        # Symmetric attention lists u a second time, for all-pairs operators; a template needs it once.
        kept = (unit, norms, projection[:, :2], bias[:, :2])
        return torch.cat([part.flatten(1) for part in kept], 1)


class ScoreGraph(nn.Module):
    """Flat templates of N first and N second faces [N, T] to score [N], S and W [N, H, W]."""

    def __init__(self, model: XCosModel, layout: TemplateLayout) -> None:
        super().__init__()
        self.layout = layout
        attention = attention_of(copy.deepcopy(model.head).to("cpu", torch.float32).requires_grad_(False))
        self.fixed = attention if isinstance(attention, str) else ""
        if isinstance(attention, XCosAttention):
            _, weight = attention._face_parts("both", torch.float32, torch.float32)
            self.register_buffer("weight", weight[None])
            last: Any = None if attention.residual else attention.attention[5].weight
            self.register_buffer("slope", torch.ones(1) if last is None else last.detach())
            self.normalise = attention._weights
            self.symmetric = attention.symmetric

    def _weights(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
        """W of the ordered pair [N, H, W]; the parts of a face hold u and -v."""
        hidden = torch.maximum(first["projection"][:, 0], second["projection"][:, 1])
        hidden = hidden.unflatten(2, self.layout.grid)
        weight: Any = self.weight
        logits = F.conv2d(hidden, weight, padding=1).squeeze(1)
        logits = logits + (first["bias"][:, 0] + second["bias"][:, 1]).unflatten(1, self.layout.grid)
        slope: Any = self.slope
        return self.normalise(F.prelu(logits.unsqueeze(1), slope).squeeze(1))

    def forward(self, templates_a: Tensor, templates_b: Tensor) -> Maps:
        a, b = self.layout.split(templates_a), self.layout.split(templates_b)
        similarity = (a["features"] * b["features"]).sum(2).unflatten(1, self.layout.grid)
        if self.fixed == "uniform":
            attention = torch.full_like(similarity, 1 / self.layout.cells)
        elif self.fixed == "norm":
            products = a["norms"] * b["norms"]
            total = products.sum(1, keepdim=True)
            # Two faces without a feature: every cell alike, as in the operator.
            shares = products / torch.where(total == 0, 1.0, total)
            attention = torch.where(total == 0, 1 / self.layout.cells, shares)
            attention = attention.unflatten(1, self.layout.grid)
        else:
            attention = self._weights(a, b)
            if self.symmetric:
                attention = (attention + self._weights(b, a)) / 2
        return (attention * similarity).sum((1, 2)), similarity, attention


class TemplateGraph(nn.Module):
    """Images [N, 3, height, width], or maps where ``body`` is None, to flat templates [N, T]."""

    def __init__(self, model: XCosModel, body: nn.Module | None) -> None:
        super().__init__()
        self.body = body
        self.face = FaceGraph(model)

    def forward(self, images: Tensor) -> Tensor:
        return self.face(images if self.body is None else self.body(images))


class PairGraph(nn.Module):
    """Two batches of images, or of maps where ``body`` is None, to score [N], S and W [N, H, W].

    Both faces of every pair go through the network as one batch of 2 N.
    """

    def __init__(self, model: XCosModel, layout: TemplateLayout, body: nn.Module | None) -> None:
        super().__init__()
        self.template = TemplateGraph(model, body)
        self.score = ScoreGraph(model, layout)

    def forward(self, images_a: Tensor, images_b: Tensor) -> Maps:
        both = self.template(torch.cat((images_a, images_b))).unflatten(0, (2, -1))
        return self.score(both[0], both[1])
