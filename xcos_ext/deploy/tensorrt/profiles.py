"""Optimisation profiles: the batch sizes that an engine is built for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xcos_ext.io.errors import ModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["DEFAULT_PROFILES", "BatchProfile", "GraphInput", "as_profiles", "graph_inputs", "profiles_for"]

_MOST = 2**31 - 1


@dataclass(frozen=True, order=True)
class BatchProfile:
    """A range of batch sizes, and the one that kernels are chosen for.

    Attributes:
        min: smallest batch; at least 1.
        opt: batch whose time counts when kernels are chosen.
        max: largest batch; memory is set aside for it.

    Raises:
        ValueError: not 1 <= min <= opt <= max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        sizes = (self.min, self.opt, self.max)
        whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
        if not whole or not 1 <= self.min <= self.opt <= self.max <= _MOST:
            shown = ", ".join(str(size) for size in sizes)
            raise ValueError(f"profiles: expected batch sizes 1 <= min <= opt <= max, got ({shown})")

    @classmethod
    def parse(cls, text: str) -> BatchProfile:
        """The profile written as ``MIN:OPT:MAX``, or as one number for all three.

        Raises:
            ValueError: written otherwise, or out of order.
        """
        if not re.fullmatch(r"\d{1,10}(:\d{1,10}:\d{1,10})?", text):
            raise ValueError(f"profiles: expected MIN:OPT:MAX or one batch size, got {text!r}")
        sizes = [int(size) for size in text.split(":")]
        return cls(*sizes) if len(sizes) == 3 else cls(*sizes * 3)

    def holds(self, batch: int) -> bool:
        """Whether a batch size lies in the range."""
        return self.min <= batch <= self.max

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min} to {self.max}"


#: Kernels for one pair at a time, which is what a door or a phone asks for, and room for small batches.
DEFAULT_PROFILES = (BatchProfile(1, 1, 32),)


def as_profiles(profiles: Sequence[BatchProfile | tuple[int, int, int]] | None) -> tuple[BatchProfile, ...] | None:
    """Profiles as given by a caller, checked; None stays None.

    Raises:
        ValueError: an empty sequence, or batch sizes out of order.
        TypeError: something else than profiles or (min, opt, max).
    """
    if profiles is None:
        return None
    found = []
    for profile in profiles:
        if isinstance(profile, BatchProfile):
            found.append(profile)
        elif isinstance(profile, (tuple, list)) and len(profile) == 3:
            found.append(BatchProfile(*profile))
        else:
            raise TypeError(f"profiles: expected (min, opt, max) each, got {profile!r}")
    if not found:
        raise ValueError("profiles: expected at least one, got none")
    return tuple(found)


@dataclass(frozen=True)
class GraphInput:
    """An input of an ONNX graph: its name, and its shape with -1 for an axis that is not fixed."""

    name: str
    shape: tuple[int, ...]

    @property
    def dynamic(self) -> bool:
        """Whether an axis is not fixed."""
        return -1 in self.shape


def graph_inputs(proto: onnx.ModelProto) -> tuple[GraphInput, ...]:
    """What has to be fed to a graph; weights that are listed as inputs too are not."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    return tuple(
        GraphInput(
            value.name,
            tuple(
                axis.dim_value if axis.WhichOneof("value") == "dim_value" else -1
                for axis in value.type.tensor_type.shape.dim
            ),
        )
        for value in proto.graph.input
        if value.name not in weights
    )


def profiles_for(
    inputs: Sequence[GraphInput], wanted: tuple[BatchProfile, ...] | None, file: str
) -> tuple[BatchProfile, ...]:
    """The profiles to build a graph with: none for a graph of a fixed batch.

    Args:
        inputs: of the graph.
        wanted: by the caller; None for the default.
        file: to name in messages.

    Raises:
        ModelError: a graph with another dynamic axis than the batch.
        ValueError: profiles for a graph whose batch is fixed to something else.
    """
    for value in inputs:
        if -1 in value.shape[1:]:
            raise ModelError(
                f"{file}: input {value.name!r}: expected only its first axis, the batch, to be dynamic, got "
                f"{list(value.shape)}"
            )
    if any(value.dynamic for value in inputs):
        return DEFAULT_PROFILES if wanted is None else wanted
    fixed = sorted({value.shape[0] for value in inputs if value.shape})
    if wanted and not all(profile.min == profile.max and [profile.min] == fixed for profile in wanted):
        batch = ", ".join(str(size) for size in fixed) or "none"
        raise ValueError(f"profiles: expected none, because the graph's batch is fixed ({batch}); got {wanted[0]}")
    return ()
