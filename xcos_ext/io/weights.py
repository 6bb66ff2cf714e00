"""Reading and writing weights safely: no code in a file is ever run, nothing half-written stays behind."""

from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic import write_atomically
from .errors import ModelError
from .inert import STAND_INS, load_inert
from .shipped import readable_file
from .text import first_line

__all__ = ["read_safetensors", "read_weights", "write_safetensors"]

StrPath = str | os.PathLike[str]


def read_safetensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ModelError: missing, damaged, or not safetensors.
    """
    file = readable_file(path, "a weights file")
    try:
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{file}: damaged or truncated safetensors file ({first_line(error)})") from error
    return tensors, metadata


def write_safetensors(path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file at once or not at all.

    Raises:
        OutputError: the folder does not exist or cannot be written; no partial file is left.
    """
    # Copies, because safetensors refuses tensors that share memory.
    copies = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    contents = save(copies, dict(metadata))
    write_atomically(path, lambda file: file.write(contents))


def read_weights(path: StrPath) -> tuple[dict[str, Any], dict[str, str]]:
    """Whatever a weights file holds, from safetensors or from ``torch.save``, chosen by its first bytes.

    ``torch.load`` runs with ``weights_only=True``: a pickle that names anything but tensors and plain containers is
    refused before it runs. Checkpoints of the xCos trainer hold its settings too, which come out as stand-ins without
    any content (:mod:`xcos_ext.io.inert`).

    Returns:
        (contents, metadata): the top-level mapping, and safetensors metadata ({} for torch files).

    Raises:
        ModelError: missing, damaged, unsafe or not a weights file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(f"{folder}/a.safetensors", {"scale": torch.ones(2)}, {"made": "here"})
    ...     read_weights(f"{folder}/a.safetensors")
    ({'scale': tensor([1., 1.])}, {'made': 'here'})
    """
    file = readable_file(path, "a weights file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(16)
    # safetensors first: its length field may well begin with the magic bytes of a pickle.
    header = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    safe = head[8:9] == b"{" and 0 < header < 1 << 32
    if safe and 8 + header <= size:
        return read_safetensors(file)  # type: ignore[return-value]
    if not safe and (head[:2] == b"PK" or head[:1] == b"\x80"):
        return _torch_load(file), {}
    if safe or file.suffix == ".safetensors":
        raise ModelError(f"{file}: damaged or truncated safetensors file ({size} bytes)")
    if file.suffix == ".onnx":
        raise ModelError(
            f"{file}: this is an ONNX graph; expected PyTorch weights (.pt, .pth or .safetensors); xcos plug makes a "
            "model of a recogniser's graph"
        )
    raise ModelError(
        f"{file}: not a weights file (starts with {head[:4]!r}); expected a PyTorch state dict (.pt, .pth) "
        "or .safetensors"
    )


def _wanted(error: BaseException) -> str | None:
    """The name that a refused pickle asked for."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"[Cc]lass(?:es)? ([\w.]+)", str(error))
    return found.group(1) if found else None


def _check_unpacked(file: Path) -> None:
    """Refuse an archive that unpacks to far more than it is: torch.save does not compress, and torch reads it whole."""
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # as zipfile raises nearly anything on damaged data
        return  # torch says what is wrong
    if unpacked > size + (64 << 20):
        raise ModelError(
            f"{file}: expected a file of torch.save, got one of {size:,} bytes that unpacks to {unpacked:,}"
        )


def _torch_load(file: Path) -> dict[str, Any]:
    def read(load: Callable[[BinaryIO], Any]) -> Any:
        # A stream, because torch would choose the reader by the file's name.
        with file.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about archives that it then refuses anyway
            return load(stream)

    _check_unpacked(file)
    try:
        try:
            contents = read(lambda stream: torch.load(stream, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError as error:
            if _wanted(error) not in STAND_INS:
                raise
            contents = read(load_inert)
    except pickle.UnpicklingError as error:
        wanted = _wanted(error)
        what = f"it asks for {wanted!r}" if wanted else "it holds more than tensors"
        own = wanted is not None and wanted.startswith("xcos_ext.model.")
        advice = (
            "Expected a file of xcos_ext.model.save_model(model, ...), which keeps how the model was built"
            if own
            else "Expected a plain state dict; have it saved again with torch.save(model.state_dict(), ...)"
        )
        raise ModelError(
            f"{file}: refused, because the pickle could run code ({what}); nothing in it was executed. {advice}"
        ) from error
    except Exception as error:  # torch raises many types for damaged archives
        raise ModelError(f"{file}: damaged or truncated PyTorch file ({first_line(error)})") from error
    if not isinstance(contents, Mapping):
        raise ModelError(f"{file}: expected a state dict (names to tensors), got {type(contents).__name__}")
    return dict(contents)
