"""Flat templates of an exported graph as the templates that operators and galleries take, and back."""

from __future__ import annotations

import numpy as np
import torch

from xcos_ext.card.card import OnnxCard
from xcos_ext.io.errors import ModelError
from xcos_ext.ops.templates import AttentionParameters, AttentionState, FixedAttention, Role, Templates, check_role

__all__ = ["from_flat"]

_LAYERS = {
    True: {"probe": (0, 1), "gallery": (1, 0), "both": (0, 1, 0)},
    False: {"probe": (0,), "gallery": (1,), "both": (0, 1)},
}


def from_flat(card: OnnxCard, templates: np.ndarray | torch.Tensor, role: Role = "probe") -> Templates:
    """:class:`xcos_ext.Templates` of flat templates.

    Args:
        card: of the graph that made them.
        templates: [N, T], fp32.
        role: ``"probe"``, ``"gallery"`` or ``"both"``; without learned attention they serve both sides.

    Returns:
        Templates that equal those of the model in torch up to rounding, and fit those of the same model.

    Raises:
        ValueError: another shape or role.
        ModelError: a card without what learned attention needs.
    """
    check_role(role, "from_flat")
    layout = card.layout
    if templates.ndim != 2 or templates.shape[1] != layout.size:
        raise ValueError(f"templates: expected [N, {layout.size}], got {list(templates.shape)}")
    parts = layout.split(torch.as_tensor(templates))
    if card.attention in ("uniform", "norm"):
        fixed: FixedAttention = "norm" if card.attention == "norm" else "uniform"
        return Templates(parts["features"], parts["norms"], layout.grid, fixed)
    known = card.pair_weights
    try:
        parameters = AttentionParameters(
            weight=torch.tensor(known["weight"], dtype=torch.float32, device="cpu"),
            slope=torch.tensor([known["slope"]], dtype=torch.float32, device="cpu"),
            temperature=float(known["temperature"]),
            normalize=known["normalize"],
            symmetric=bool(known["symmetric"]),
            state=AttentionState.known(str(known["fingerprint"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"pair_weights: damaged metadata ({type(error).__name__}: {error})") from error
    layers = list(_LAYERS[parameters.symmetric][role])
    return Templates(
        parts["features"],
        parts["norms"],
        layout.grid,
        parameters,
        role,
        parts["projection"][:, layers].contiguous(),
        parts["bias"][:, layers].contiguous(),
    )
