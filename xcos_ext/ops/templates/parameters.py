"""The parameters that templates of learned attention share, and how it is told that two of them are the same."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from xcos_ext.io.fingerprint import fingerprint_state

from .._checks import checked_flag, dtype_name
from .._kept import kept_checked

__all__ = ["AttentionParameters", "AttentionState"]

Normalize = Literal["softmax", "min-shift"]


class AttentionState:
    """The parameters of an attention network as they were when its templates were made.

    Two templates of one unchanged network share this object, so comparing them costs nothing. Otherwise their
    fingerprints decide; they are computed when first asked for, and only then is a GPU waited for.
    """

    __slots__ = ("__weakref__", "_extra", "_fingerprint", "_snapshot")

    def __init__(self, tensors: Mapping[str, Tensor], extra: str) -> None:
        self._extra = extra
        self._fingerprint: str | None = None
        floating = {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}
        # One copy of all of them: the network may change before anyone asks.
        flat = torch.cat([t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in floating.values()])
        parts = flat.split([t.numel() for t in floating.values()])
        self._snapshot: dict[str, Tensor] | None = {
            name: part.view(t.shape) for (name, t), part in zip(floating.items(), parts, strict=True)
        }

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits; see :func:`xcos_ext.io.fingerprint.fingerprint_state`."""
        if self._fingerprint is None:
            assert self._snapshot is not None
            self._fingerprint = fingerprint_state(self._snapshot, extra=self._extra)
            self._snapshot = None
        return self._fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return _known_state, (self.fingerprint,)

    @classmethod
    def known(cls, fingerprint: str) -> AttentionState:
        """The state that a stored fingerprint stands for."""
        return _known_state(fingerprint)

    @classmethod
    def of(cls, module: nn.Module, settings: Mapping[str, Any]) -> AttentionState:
        """The state of a module: the same object as long as neither its tensors nor ``settings`` change.

        A change is seen by the tensors' addresses and version counters, without reading them; edits that torch does
        not count (through ``.data``, or a replayed CUDA graph) are not seen.
        """
        tensors = module.state_dict(keep_vars=True)
        extra = json.dumps(settings, sort_keys=True)
        try:
            # Step counters included: batch norm updates its statistics without counting it, but counts its steps.
            marks = [(name, t.data_ptr(), t._version, t.shape, t.dtype) for name, t in tensors.items()]
        except RuntimeError:
            if any(t.is_inference() for t in tensors.values()):
                return cls(tensors, extra)  # such tensors count nothing
            # No values to look at (tracing, torch.func): whatever this module makes fits together.
            return _UNTRACKED.setdefault(module, cls.known("untracked"))
        known = _STATES.get(module)
        if known is not None and known.marks == marks and known.extra == extra:
            return known.state
        state = cls(tensors, extra)
        # The aliases keep the memory from being handed to other tensors, whose addresses would look the same.
        _STATES[module] = _Known([t.detach() for t in tensors.values()], marks, extra, state)
        return state


def _known_state(fingerprint: str) -> AttentionState:
    state = AttentionState.__new__(AttentionState)
    state._extra, state._fingerprint, state._snapshot = "", fingerprint, None
    return state


torch.serialization.add_safe_globals([_known_state])  # unlike a class method


class _Known(NamedTuple):
    aliases: list[Tensor]
    marks: list[tuple[Any, ...]]
    extra: str
    state: AttentionState


_STATES: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_UNTRACKED: weakref.WeakKeyDictionary[nn.Module, AttentionState] = weakref.WeakKeyDictionary()


@kept_checked
@dataclasses.dataclass(frozen=True, eq=False)
class AttentionParameters:
    """The part of a learned attention network that every pair needs.

    Attributes:
        weight: [hidden, 3, 3], (1 - a) times the second convolution with its batch norm folded in; fp32, or fp64 for
            fp64 templates.
        slope: [1], of the last activation; same dtype and device.
        temperature: divides the logits before the softmax; no effect on min-shift.
        normalize: ``"softmax"`` or ``"min-shift"``.
        symmetric: both orders of the faces are averaged.
        state: the network that these belong to; None: weight and slope stand for it.

    Raises:
        ValueError: a wrong shape, dtype, device or value.
        TypeError: ``symmetric`` is not True or False.
    """

    weight: Tensor
    slope: Tensor
    temperature: float = 1.0
    normalize: Normalize = "softmax"
    symmetric: bool = False
    state: AttentionState | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        where = "AttentionParameters"
        weight, slope = self.weight, self.slope
        if weight.dim() != 3 or tuple(weight.shape[1:]) != (3, 3) or weight.shape[0] < 1:
            raise ValueError(f"{where}: weight: expected shape [hidden, 3, 3], got {list(weight.shape)}")
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{where}: weight: expected dtype float32 or float64, got {dtype_name(weight.dtype)}")
        if tuple(slope.shape) != (1,):
            raise ValueError(f"{where}: slope: expected shape [1], got {list(slope.shape)}")
        if slope.dtype != weight.dtype or slope.device != weight.device:
            raise ValueError(
                f"{where}: slope: expected {dtype_name(weight.dtype)} on {weight.device} like weight, "
                f"got {dtype_name(slope.dtype)} on {slope.device}"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"{where}: temperature: expected a finite number above 0, got {self.temperature}")
        if self.normalize not in ("softmax", "min-shift"):
            raise ValueError(f"{where}: normalize: expected 'softmax' or 'min-shift', got {self.normalize!r}")
        symmetric = checked_flag(where, "symmetric", self.symmetric)
        if self.state is None:
            settings = [float(self.temperature), self.normalize, symmetric]
            state = AttentionState({"weight": weight, "slope": slope}, json.dumps(settings))
            object.__setattr__(self, "state", state)

    @property
    def hidden(self) -> int:
        """Channels of the half-projections."""
        return self.weight.shape[0]

    @property
    def orders(self) -> int:
        """2 for symmetric attention, where both orders of the faces count, else 1."""
        return 2 if self.symmetric else 1

    @property
    def fingerprint(self) -> str:
        """Short hash of all parameters and settings that decide the templates; equal on every device."""
        assert self.state is not None
        return self.state.fingerprint

    def matches(self, other: AttentionParameters) -> bool:
        """Whether both come from the same parameters; free for templates of one unchanged network."""
        return self.state is other.state or self.fingerprint == other.fingerprint

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AttentionParameters:
        """On another device, or in fp32 or fp64; itself where nothing changes."""
        weight, slope = self.weight.to(device, dtype), self.slope.to(device, dtype)
        if weight is self.weight and slope is self.slope:
            return self
        return dataclasses.replace(self, weight=weight, slope=slope)

    def detach(self) -> AttentionParameters:
        """Cut from the graph."""
        return dataclasses.replace(self, weight=self.weight.detach(), slope=self.slope.detach())
