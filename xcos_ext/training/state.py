"""A training's state: averaged weights, and all of it in one safetensors file that replaces the one before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from xcos_ext.io.errors import ModelError
from xcos_ext.io.text import few
from xcos_ext.io.weights import read_safetensors, write_safetensors

__all__ = ["Checkpoint", "averaged_model", "load_optimiser", "optimiser_tensors"]

_FORMAT = "xcos_ext.checkpoint"
_VERSION = "1"


def averaged_model(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of a module whose ``update_parameters(module)`` keeps an exponential moving average of it.

    Parameters and floating buffers: ``average += (1 - d) (value - average)`` with d = min(decay, (1 + n) / (10 + n))
    after n updates, so that the first weights do not linger (the first update copies); integer buffers are copied.
    """

    def update(averages: Any, values: Any, _: Any) -> None:
        if averages[0].is_floating_point():
            count = int(made.n_averaged)  # the module's own, on the CPU: reading it waits for no device
            torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + count) / (10 + count)))
        else:
            torch._foreach_copy_(averages, values)

    made = AveragedModel(module, multi_avg_fn=update, use_buffers=True)
    return made


@dataclass
class Checkpoint:
    """Everything that a training goes on with, without pickle.

    Attributes:
        step: optimiser steps done.
        must_match: plain values that a training must share with the checkpoint that it resumes.
        values: plain values to carry on with.
        module, ema, optimiser: tensors by name.
    """

    step: int
    must_match: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    optimiser: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write to disk, flushed, in place of what was there.

        Raises:
            OutputError: it cannot be written; an earlier file is untouched.
        """
        tensors = {
            f"{group}/{name}": tensor
            for group in ("module", "ema", "optimiser")
            for name, tensor in getattr(self, group).items()
        }
        metadata = {
            "xcos_format": _FORMAT,
            "version": _VERSION,
            "step": str(self.step),
            "must_match": json.dumps(self.must_match, sort_keys=True),
            "values": json.dumps(self.values, sort_keys=True),
        }
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file of :meth:`save`.

        Raises:
            ModelError: missing, damaged, or no checkpoint of this version.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("xcos_format") != _FORMAT:
            raise ModelError(f"{path}: not a training checkpoint (format {metadata.get('xcos_format')!r})")
        if metadata.get("version") != _VERSION:
            raise ModelError(f"{path}: checkpoint format {metadata.get('version')!r}; this version reads {_VERSION!r}")
        try:
            result = cls(int(metadata["step"]), json.loads(metadata["must_match"]), json.loads(metadata["values"]))
            for name, tensor in tensors.items():
                group, _, rest = name.partition("/")
                {"module": result.module, "ema": result.ema, "optimiser": result.optimiser}[group][rest] = tensor
        except (KeyError, ValueError, TypeError) as error:
            raise ModelError(f"{path}: damaged checkpoint ({type(error).__name__}: {error})") from error
        return result

    def check(self, path: Path, module: nn.Module, must_match: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another training.

        Raises:
            ModelError: names every setting, or the first few tensors, that differ.
        """
        expected, got = _flat(json.loads(json.dumps(must_match))), _flat(self.must_match)
        different = [
            f"{key} (checkpoint {got.get(key, 'nothing')!r}, now {expected.get(key, 'nothing')!r})"
            for key in sorted(expected.keys() | got.keys())
            if expected.get(key) != got.get(key)
        ]
        if different:
            raise ModelError(f"{path}: belongs to a training with other settings: {few(different, 5)}")
        state = module.state_dict()
        different = [
            f"{name} (checkpoint {_shape(self.module.get(name))}, now {_shape(state.get(name))})"
            for name in sorted(state.keys() | self.module.keys())
            if _shape(self.module.get(name)) != _shape(state.get(name))
        ]
        if different:
            raise ModelError(f"{path}: belongs to another architecture: {few(different, 5)}")


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _parameter_names(module: nn.Module, optimiser: torch.optim.Optimizer) -> list[str]:
    """Names of the optimiser's parameters in its own order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimiser.param_groups for parameter in group["params"]]


def optimiser_tensors(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as ``<parameter>/<entry>``; every entry is a tensor."""
    state = optimiser.state_dict()["state"]
    names = _parameter_names(module, optimiser)
    return {
        f"{names[index]}/{entry}": torch.as_tensor(value)
        for index, entries in state.items()
        for entry, value in entries.items()
        if value is not None
    }


def load_optimiser(module: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser the state of :func:`optimiser_tensors`."""
    numbers = {name: index for index, name in enumerate(_parameter_names(module, optimiser))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        state.setdefault(numbers[name], {})[entry] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
