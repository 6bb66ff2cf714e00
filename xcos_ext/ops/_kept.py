"""What torch has to be told of results that it is to keep: in files of torch.save, and in exported programs."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch.utils import _pytree

__all__ = ["kept", "kept_checked"]

Kind = TypeVar("Kind", bound=type)


def kept(kind: Kind) -> Kind:
    """A named tuple of tensors that ``torch.load`` and ``torch.export.save`` take."""
    torch.serialization.add_safe_globals([kind])
    _pytree._register_namedtuple(kind, serialized_type_name=f"xcos_ext.{kind.__name__}")
    return kind


def kept_checked(kind: Kind) -> Kind:
    """A dataclass that ``torch.load`` takes: it is made by its constructor, which checks what the file says."""

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return kind, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    kind.__reduce__ = __reduce__  # type: ignore[method-assign, assignment]
    torch.serialization.add_safe_globals([kind])
    return kind
