"""What is kept of a face so that all pairs of many faces can be scored, and the checks of two sides."""

from .._checks import result_dtype
from .cells import (
    EPS,
    FixedAttention,
    Role,
    cell_norms,
    check_features,
    check_role,
    check_storage,
    exact_convolutions,
    in_chunks,
    unit_cells,
)
from .parameters import AttentionParameters, AttentionState
from .sides import Attention, check_sides, resolve_attention
from .templates import Templates

__all__ = [
    "EPS",
    "Attention",
    "AttentionParameters",
    "AttentionState",
    "FixedAttention",
    "Role",
    "Templates",
    "cell_norms",
    "check_features",
    "check_role",
    "check_sides",
    "check_storage",
    "exact_convolutions",
    "in_chunks",
    "resolve_attention",
    "result_dtype",
    "unit_cells",
]
