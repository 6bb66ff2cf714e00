"""Training checkpoints that hold more than tensors: the tensors, with stand-ins for what else is in there.

The public xCos trainer writes its settings, an object of its own class, beside the weights. torch's reader refuses such
files, because unpickling an object may run its class's code. Here a few names that such checkpoints are known to hold
come out as objects that do nothing; any other name is refused, as torch does.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any, BinaryIO

import torch

__all__ = ["STAND_INS", "load_inert"]

#: What comes out as :class:`Inert`: settings of the xCos trainer, and NumPy numbers such as its best score.
STAND_INS = frozenset(
    {
        "utils.global_config.SingleGlobalConfig",
        "attrdict.dictionary.AttrDict",
        "attrdict.default.AttrDefault",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "_codecs.encode",
        "__builtin__.tuple",  # as a value: AttrDict remembers the type of its sequences
        "builtins.tuple",
    }
)

# All that a state dict is made of; storages are torch's own business (torch.load looks for them first).
_KEPT = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.Size": torch.Size,
}


class Inert:
    """Takes whatever a pickle does to the object it stands for, and keeps nothing of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As of a list."""

    def extend(self, values: Any) -> None:
        """As of a list."""


class Unpickler(pickle.Unpickler):
    """Knows tensors, ordered dictionaries and stand-ins; nothing that a file names is imported."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the known names.

        Raises:
            UnpicklingError: any other.
        """
        full = f"{module}.{name}"
        if full in _KEPT:
            return _KEPT[full]
        if full in STAND_INS:
            return Inert
        raise pickle.UnpicklingError(f"GLOBAL {full} is not known")


def load(file: BinaryIO, **options: Any) -> Any:
    """As :func:`pickle.load`; torch calls it for the header of its older files."""
    return Unpickler(file, **options).load()


class _Module:
    """What ``torch.load`` takes for the module pickle."""

    __name__ = __name__
    Unpickler = Unpickler
    load = staticmethod(load)


def load_inert(stream: BinaryIO) -> Any:
    """A file of ``torch.save``, on the CPU, with stand-ins for the names in :data:`STAND_INS`.

    Only for files that ``torch.load(weights_only=True)`` refused for one of these names: it has looked at everything
    else, TorchScript archives included.

    Raises:
        UnpicklingError: the file asks for another name.
    """
    return torch.load(stream, map_location="cpu", pickle_module=_Module, weights_only=False)
