"""A plan and the sidecar that says what it is: written together, and taken only if they belong together."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from xcos_ext.io.atomic import StrPath, check_output, write_atomically

from .api import DataTypeEnum, EnumMember
from .package import EngineError, version_of
from .profiles import BatchProfile

__all__ = [
    "PLAN_SUFFIXES",
    "PlanCard",
    "TensorCard",
    "check_plan_path",
    "load_plan",
    "read_card",
    "sidecar",
    "torch_names",
    "write_bytes",
    "write_plan",
]

PLAN_SUFFIXES = (".plan", ".engine")

_FORMAT = 1
_MOST_SIDECAR_BYTES = 1 << 24
_DTYPES = ("float32", "float16", "bfloat16", "int8", "int32", "int64", "bool", "uint8")


def torch_names(types: DataTypeEnum) -> dict[EnumMember, str]:
    """TensorRT's element types and torch's names of them."""
    members = (types.FLOAT, types.HALF, types.BF16, types.INT8, types.INT32, types.INT64, types.BOOL, types.UINT8)
    return dict(zip(members, _DTYPES, strict=True))


@dataclass(frozen=True)
class TensorCard:
    """An input or output of an engine.

    Attributes:
        name: as in the ONNX graph.
        shape: -1 for the batch where it is dynamic.
        dtype: torch's name of it, e.g. ``"float32"``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def shape_for(self, batch: int) -> tuple[int, ...]:
        """The shape at a batch size."""
        return tuple(batch if n == -1 else n for n in self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class PlanCard:
    """What a plan is and where it fits: the content of its sidecar.

    Attributes:
        tensorrt: version that built it.
        sm: compute capability of the GPU that it was built on and for, e.g. ``"9.0"``.
        gpu: that GPU's name.
        onnx_sha256: of the ONNX file, with the files its weights lie in.
        plan_sha256: of the plan.
        plan_bytes: its size.
        inputs, outputs: names, shapes, dtypes.
        profiles: batch sizes it was built for; none where the batch is fixed.
        workspace: bounds the builder's scratch memory, in bytes; None for TensorRT's own bound.
        version_compatible: whether later versions of TensorRT may load it.
        refit: whether its weights can be replaced.
        tf32: whether fp32 products may be rounded to TF32.
        metadata: the ONNX file's own notes: fingerprint, threshold, preprocessing.
    """

    tensorrt: str
    sm: str
    gpu: str
    onnx_sha256: str
    plan_sha256: str
    plan_bytes: int
    inputs: tuple[TensorCard, ...]
    outputs: tuple[TensorCard, ...]
    profiles: tuple[BatchProfile, ...]
    workspace: int | None
    version_compatible: bool
    refit: bool
    tf32: bool
    metadata: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> PlanCard:
        """The card that :meth:`as_dict` wrote.

        Raises:
            ValueError: not such data; the message says which entry is wrong.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            got = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"format: expected {_FORMAT}, got {got!r}")

        def entry(name: str, kind: type) -> Any:
            value = data.get(name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}"[:200])
            return value

        def tensors(name: str) -> tuple[TensorCard, ...]:
            found = tuple(_tensor(item) for item in entry(name, list))
            if not found or None in found:
                raise ValueError(f"{name}: expected tensors with name, shape and dtype")
            return tuple(item for item in found if item is not None)

        def profile(item: Any) -> BatchProfile:
            if not isinstance(item, dict) or set(item) != {"min", "opt", "max"}:
                raise ValueError("profiles: expected min, opt and max each")
            return BatchProfile(**item)

        metadata = entry("metadata", dict)
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata: expected text")
        return cls(
            tensorrt=entry("tensorrt", str),
            sm=entry("sm", str),
            gpu=entry("gpu", str),
            onnx_sha256=entry("onnx_sha256", str),
            plan_sha256=entry("plan_sha256", str),
            plan_bytes=entry("plan_bytes", int),
            inputs=tensors("inputs"),
            outputs=tensors("outputs"),
            profiles=tuple(profile(item) for item in entry("profiles", list)),
            workspace=None if data.get("workspace") is None else entry("workspace", int),
            version_compatible=entry("version_compatible", bool),
            refit=entry("refit", bool),
            tf32=entry("tf32", bool),
            metadata=metadata,
        )

    def check_version(self, tensorrt: str, plan: StrPath) -> None:
        """Whether a version of TensorRT can load the plan.

        Raises:
            EngineError: it cannot.
        """
        built, here = version_of(self.tensorrt), version_of(tensorrt)
        if built == here:
            return
        # Version-compatible plans of 10 also load in 11; no other step across major versions is supported.
        if (
            self.version_compatible
            and built <= here
            and (built[:1] == here[:1] or (built[:1], here[:1]) == ((10,), (11,)))
        ):
            return
        later = " or later" if self.version_compatible else ""
        raise EngineError(f"{plan}: built for TensorRT {self.tensorrt}{later}, this is {tensorrt}; build it again")

    def check_gpu(self, sm: str, gpu: str, plan: StrPath) -> None:
        """Whether a GPU can run the plan.

        Raises:
            EngineError: it cannot.
        """
        if sm != self.sm:
            raise EngineError(
                f"{plan}: built for compute capability {self.sm} ({self.gpu}), this GPU has {sm} ({gpu}); "
                "build it again"
            )


def _tensor(item: Any) -> TensorCard | None:
    if not isinstance(item, dict) or set(item) != {"name", "shape", "dtype"}:
        return None
    name, shape, dtype = item["name"], item["shape"], item["dtype"]
    whole = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= -1 for n in shape)
    return TensorCard(name, tuple(shape), dtype) if isinstance(name, str) and whole and dtype in _DTYPES else None


def sidecar(plan: StrPath) -> Path:
    """Where a plan's card lies: ``<plan>.json``."""
    return Path(f"{os.fspath(plan)}.json")


def check_plan_path(plan: StrPath) -> None:
    """Check, before hours of work, that a plan and its sidecar can be written.

    Raises:
        OutputError: they cannot.
    """
    check_output(plan, PLAN_SUFFIXES)
    check_output(sidecar(plan), (".json",))


def write_bytes(path: StrPath, data: bytes | memoryview) -> None:
    """Write a file at once or not at all.

    Raises:
        OutputError: it cannot be written.
    """

    def write(file: BinaryIO) -> None:
        file.write(data)

    write_atomically(path, write)


def write_plan(plan: StrPath, data: memoryview, card: PlanCard) -> None:
    """Write a plan, then its sidecar, each at once or not at all.

    Whoever reads between the two finds a plan that is not the sidecar's, and refuses it.

    Raises:
        OutputError: they cannot be written.
    """
    write_bytes(plan, data)
    write_bytes(sidecar(plan), json.dumps(card.as_dict(), indent=2).encode() + b"\n")


def read_card(plan: StrPath) -> PlanCard:
    """What a plan's sidecar says.

    Raises:
        EngineError: it is missing or damaged.
    """
    path = sidecar(plan)
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_SIDECAR_BYTES + 1)
    except FileNotFoundError as error:
        raise EngineError(f"{plan}: its sidecar {path.name} is missing; build the plan again") from error
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(text) > _MOST_SIDECAR_BYTES:
        raise EngineError(f"{path}: expected a sidecar of at most {_MOST_SIDECAR_BYTES >> 20} MiB, got a larger file")
    try:
        return PlanCard.from_dict(json.loads(text))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise EngineError(f"{path}: damaged, or not the sidecar of a plan ({error})") from error


def load_plan(plan: StrPath) -> tuple[PlanCard, bytes]:
    """A plan's card and bytes, if they belong together.

    A plan holds code that runs on the GPU, and on the host if it is version-compatible: load only what you built, or
    got from somebody you trust. The hash finds damage and mix-ups, not an attacker who writes both files.

    Raises:
        EngineError: missing, cut off, changed after it was written, or without its sidecar.
    """
    path = Path(plan)
    try:
        if not path.is_file():
            reason = "no such file" if not path.exists() else "not a regular file"
            raise EngineError(f"{path}: expected a TensorRT plan: {reason}")
        card = read_card(path)
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, EngineError):
            raise
        raise EngineError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) < card.plan_bytes:
        raise EngineError(
            f"{path}: cut off, or not the plan of its sidecar: expected {card.plan_bytes} bytes, got {len(data)}"
        )
    if hashlib.sha256(data).hexdigest() != card.plan_sha256:
        raise EngineError(f"{path}: not the plan of its sidecar: changed after it was written; build it again")
    return card, data
