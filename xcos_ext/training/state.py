"""A training's state: averaged weights, and all of it in one safetensors file that replaces the one before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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

    >>> module = nn.Linear(1, 1, bias=False)
    >>> average = averaged_model(module, 0.5)
    >>> average.update_parameters(module)
    >>> bool(average.module.weight == module.weight)
    True
    """

    def update(averages: Any, values: Any, _: Any) -> None:
        if averages[0].is_floating_point():
            count = int(made.n_averaged)  # the module's own, on the CPU: reading it waits for no device
            torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + count) / (10 + count)))
        else:
            torch._foreach_copy_(averages, values)

    made = AveragedModel(module, multi_avg_fn=update, use_buffers=True)
    return made


class Checkpoint(NamedTuple):
    """Everything that a training goes on with, without pickle.

    Attributes:
        step: optimiser steps done.
        must_match: plain values that a training must share with the checkpoint that it resumes.
        values: plain values to carry on with.
        tensors: by group (``"module"``, ``"ema"``, ``"optimiser"``) and name.
    """

    step: int
    must_match: Mapping[str, Any]
    values: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]

    def save(self, path: Path) -> None:
        """Write to disk, flushed, in place of what was there.

        Raises:
            OutputError: it cannot be written; an earlier file is untouched.
        """
        tensors = {f"{group}/{name}": tensor for group, own in self.tensors.items() for name, tensor in own.items()}
        metadata = {
            "xcos_format": _FORMAT,
            "version": _VERSION,
            "step": str(self.step),
            "must_match": json.dumps(self.must_match, sort_keys=True),
            "values": json.dumps(self.values, sort_keys=True),
        }
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path, module: nn.Module, must_match: Mapping[str, Any]) -> Checkpoint:
        """Read a file of :meth:`save`.

        Raises:
            ModelError: missing, damaged, no checkpoint of this version, or of another training; names every setting,
                or the first few tensors, that differ.
        """
        stored, metadata = read_safetensors(path)
        if metadata.get("xcos_format") != _FORMAT:
            raise ModelError(f"{path}: not a training checkpoint (format {metadata.get('xcos_format')!r})")
        if metadata.get("version") != _VERSION:
            raise ModelError(f"{path}: checkpoint format {metadata.get('version')!r}; this version reads {_VERSION!r}")
        tensors: dict[str, dict[str, Tensor]] = {"module": {}, "ema": {}, "optimiser": {}}
        try:
            result = cls(
                int(metadata["step"]), json.loads(metadata["must_match"]), json.loads(metadata["values"]), tensors
            )
            for key, tensor in stored.items():
                group, _, name = key.partition("/")
                tensors[group][name] = tensor
        except (KeyError, ValueError, RecursionError) as error:
            raise ModelError(f"{path}: damaged checkpoint ({type(error).__name__}: {error})") from error
        settings = _flat(result.must_match), _flat(json.loads(json.dumps(must_match)))
        shapes = _shapes(tensors["module"]), _shapes(module.state_dict())
        for what, (then, now), said in (
            ("a training with other settings", settings, repr),
            ("another architecture", shapes, str),
        ):
            different = [
                f"{key} (checkpoint {said(then[key]) if key in then else 'nothing'}, "
                f"now {said(now[key]) if key in now else 'nothing'})"
                for key in sorted(then.keys() | now.keys())
                if then.get(key) != now.get(key)
            ]
            if different:
                raise ModelError(f"{path}: belongs to {what}: {few(different, 5)}")
        return result


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as ``table.key`` -> value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def optimiser_tensors(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as ``<parameter>/<entry>``; every entry is a tensor."""
    return {
        f"{name}/{entry}": torch.as_tensor(value)
        for name, parameter in module.named_parameters()
        for entry, value in optimiser.state.get(parameter, {}).items()
        if value is not None
    }


def load_optimiser(module: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser the state of :func:`optimiser_tensors`."""
    parameters = dict(module.named_parameters())
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        # Steps are counted on the CPU, as torch's optimisers do.
        optimiser.state[parameters[name]][entry] = tensor if entry == "step" else tensor.to(parameters[name])
