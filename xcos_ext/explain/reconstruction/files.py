"""Decoders as files, each with the fingerprint of the model whose features it reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from xcos_ext.io.errors import ModelError
from xcos_ext.io.shipped import DATA
from xcos_ext.io.weights import read_safetensors, write_safetensors

from .network import FeatureDecoder

__all__ = ["load_decoder", "save_decoder", "shipped_decoders"]

StrPath = str | os.PathLike[str]

_FORMAT = "xcos-decoder-1"


def save_decoder(decoder: FeatureDecoder, path: StrPath, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a decoder as safetensors, its data-set mean and the fingerprint of its features' model with it.

    Args:
        decoder: to write.
        path: the file; replaced in one step.
        dtype: floating-point type of the stored weights.

    Raises:
        ModelError: a weight is not finite in ``dtype``.
        OutputError: the file cannot be written.
    """
    tensors = {name: tensor.detach().to(dtype) for name, tensor in decoder.state_dict().items()}
    broken = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if broken is not None:
        raise ModelError(f"{path}: cannot be written: {broken} holds values that {dtype} cannot hold")
    # The mean is put in place of entries as it is: in fp32 it stays the one that was measured.
    tensors |= {name: getattr(decoder, name).detach().float() for name in ("mean", "scale")}
    config = {"shape": decoder.shape, "widths": decoder.widths, "name": decoder.name}
    metadata = {"format": _FORMAT, "config": json.dumps(config), "fingerprint": decoder.fingerprint}
    write_safetensors(path, tensors, metadata)


def load_decoder(path: StrPath, *, device: str | torch.device = "cpu") -> FeatureDecoder:
    """A decoder in evaluation mode, fp32.

    Args:
        path: written by :func:`save_decoder`.
        device: where to put it.

    Raises:
        ModelError: missing, damaged, or not a decoder's file.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != _FORMAT:
        found = metadata.get("format", "no such entry")
        raise ModelError(f"{path}: not a decoder's file: expected format {_FORMAT!r} in its metadata, got {found!r}")
    try:
        config: dict[str, Any] = json.loads(metadata["config"])
        decoder = FeatureDecoder(
            config["shape"], fingerprint=metadata["fingerprint"], widths=config["widths"], name=str(config["name"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: damaged decoder's file: its metadata cannot be used ({error})") from error
    state = {name: tensor.float() for name, tensor in tensors.items()}
    wanted = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    wrong = sorted(set(wanted) ^ set(state)) or [n for n, shape in wanted.items() if state[n].shape != shape]
    if wrong:
        raise ModelError(
            f"{path}: damaged decoder's file: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"e.g. {wrong[0]}"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()) or bool((state["scale"] <= 0).any()):
        raise ModelError(f"{path}: damaged decoder's file: it holds values that are not finite, or scales of zero")
    decoder.load_state_dict(state)
    return _frozen(decoder).to(device)


def _frozen(decoder: FeatureDecoder) -> FeatureDecoder:
    nn.Module.to(decoder, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return decoder.eval().requires_grad_(False)


def shipped_decoders() -> dict[str, Path]:
    """Decoders that came with the package: fingerprint of the features' model -> file."""
    found = {}
    for file in sorted(DATA.glob("decoder_*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as opened:
                metadata = opened.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: damaged or truncated safetensors file ({error})") from error
        if metadata.get("format") == _FORMAT:
            found[metadata.get("fingerprint", "")] = file
    return found
