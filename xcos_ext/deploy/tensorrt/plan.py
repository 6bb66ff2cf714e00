"""What a plan is and where it fits: TensorRT, the GPU, batch sizes, and the sidecar that belongs to the plan."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from xcos_ext.io.atomic import StrPath
from xcos_ext.io.errors import ModelError, XCosError
from xcos_ext.io.optional import MissingPackageError, need

__all__ = ["BatchProfile", "EngineError", "PlanCard", "TensorCard", "TensorRTError", "load_plan", "read_card"]

_SIDECAR_LIMIT = 16 << 20  # bytes
_OLDEST = (10, 3)  # the first TensorRT that has everything used here
#: TensorRT's element types that graphs have at their ends, and torch's names of them.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}

#: TensorRT's own messages go to this logger of Python's logging module, which is silent unless set up.
_logging = logging.getLogger("xcos_ext.tensorrt")
_logging.addHandler(logging.NullHandler())


class TensorRTError(XCosError, RuntimeError):
    """TensorRT cannot do its work here: it is too old, there is no GPU, a build failed, or a launch did."""


class EngineError(ModelError):
    """A plan that cannot be used: missing, changed, cut off, or made for another TensorRT or GPU."""


def _version(text: str) -> tuple[int, ...]:
    """The numbers of a version: ``"10.14.1.48.post1"`` gives (10, 14, 1, 48)."""
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def load_tensorrt() -> Any:
    """The module ``tensorrt``, which has no types; MissingPackageError without it, TensorRTError if it is too old."""
    try:
        module = need("tensorrt", "a TensorRT engine", extra="tensorrt")
    except MissingPackageError:
        raise
    except Exception as error:  # its own start-up, e.g. libraries that do not fit
        raise MissingPackageError(f"a TensorRT engine needs tensorrt, which cannot be loaded ({error})") from error
    version = str(getattr(module, "__version__", ""))
    if _version(version) < _OLDEST:
        raise TensorRTError(f"tensorrt: expected version {_OLDEST[0]}.{_OLDEST[1]} or later, got {version or 'none'}")
    return module


class Log:
    """TensorRT's messages, given to its ``logger``: all go on to Python's logging, the last errors are kept."""

    def __init__(self, trt: Any) -> None:
        self._trt, self.errors = trt, deque[str](maxlen=20)
        errors = self.errors

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # pybind11 does not accept super()

            def log(self, severity: Any, msg: str) -> None:
                failure = severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)
                if failure:
                    errors.append(" ".join(msg.split())[:300])
                _logging.log(logging.ERROR if failure else getattr(logging, severity.name, logging.DEBUG), "%s", msg)

        self.logger = Logger()

    def reason(self) -> str:
        """The last errors, at most three, in one line; says so where there are none."""
        return "; ".join(list(dict.fromkeys(self.errors))[-3:]) or "TensorRT gave no reason"

    def start(self, kind: Any) -> Any:
        """A builder or runtime of TensorRT's; TensorRTError where it cannot be made."""
        self.errors.clear()
        try:
            return kind(self.logger)
        except (TypeError, RuntimeError) as error:  # a null pointer, as pybind11 sees it
            raise TensorRTError(f"TensorRT {self._trt.__version__} cannot start: {self.reason()}") from error


@functools.cache
def log_of(trt: Any) -> Log:
    """The one log of a process: TensorRT keeps the first logger it meets for everything that follows."""
    return Log(trt)


class Gpu(NamedTuple):
    """A graphics card: its device with the index, the driver's name, and the compute capability, e.g. ``"9.0"``."""

    device: torch.device
    name: str
    sm: str


def find_gpu(device: str | torch.device) -> Gpu:
    """The card of a device; TensorRTError if there is none, or not this one; ValueError for another device."""
    if not re.fullmatch(r"cuda(:\d{1,4})?", str(device)):
        raise ValueError(f"device: expected cuda or cuda:N, got {str(device)!r}")
    if not torch.cuda.is_available():
        raise TensorRTError(f"device: a TensorRT engine needs an NVIDIA GPU, and torch {torch.__version__} sees none")
    asked = torch.device(device).index
    index = torch.cuda.current_device() if asked is None else asked
    if index >= torch.cuda.device_count():
        raise TensorRTError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {device}")
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.device("cuda", index), torch.cuda.get_device_name(index), f"{major}.{minor}")


@dataclass(frozen=True)
class BatchProfile:
    """A range of batch sizes, and the one that kernels are chosen for.

    Attributes:
        min: smallest batch; at least 1.
        opt: batch whose time counts when kernels are chosen.
        max: largest batch; memory is set aside for it.

    Raises:
        ValueError: not 1 <= min <= opt <= max.

    >>> BatchProfile.parse("1:8:64"), str(BatchProfile(1, 8, 64))
    (BatchProfile(min=1, opt=8, max=64), '1 to 64')
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        sizes = (self.min, self.opt, self.max)
        if not all(type(size) is int for size in sizes) or not 1 <= self.min <= self.opt <= self.max < 2**31:
            shown = ", ".join(map(str, sizes))
            raise ValueError(f"profiles: expected batch sizes 1 <= min <= opt <= max, got ({shown})")

    @classmethod
    def parse(cls, text: str) -> BatchProfile:
        """The profile written as ``MIN:OPT:MAX``, or as one number for all three; ValueError if it is neither."""
        if not re.fullmatch(r"\d{1,10}(:\d{1,10}:\d{1,10})?", text):
            raise ValueError(f"profiles: expected MIN:OPT:MAX or one batch size, got {text!r}")
        sizes = [int(size) for size in text.split(":")]
        return cls(*sizes) if len(sizes) == 3 else cls(*sizes * 3)

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min} to {self.max}"


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

    @classmethod
    def of(cls, tensor: Any) -> TensorCard:
        """The card of a tensor of TensorRT's network; ModelError if its type is not known here."""
        if tensor.dtype.name not in _DTYPES:
            raise ModelError(f"{tensor.name}: expected a type among {', '.join(_DTYPES)}, got {tensor.dtype.name}")
        return cls(tensor.name, tuple(int(n) for n in tensor.shape), _DTYPES[tensor.dtype.name])

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class PlanCard:
    """What a plan is and where it fits: the content of its sidecar.

    Attributes:
        tensorrt, gpu, sm: version and GPU that built it, with the GPU's compute capability, e.g. ``"9.0"``.
        onnx_sha256: of the ONNX file, with the files its weights lie in.
        plan_bytes: the plan's size.
        inputs, outputs: names, shapes, dtypes.
        profiles: batch sizes it was built for; none where the batch is fixed.
        tf32: whether fp32 products may be rounded to TF32.
        metadata: the ONNX file's own notes: fingerprint, threshold, preprocessing.
        sha256: of the plan and all the other entries: what belongs together.
        format: of the sidecar.
    """

    tensorrt: str
    sm: str
    gpu: str
    onnx_sha256: str
    plan_bytes: int
    inputs: tuple[TensorCard, ...]
    outputs: tuple[TensorCard, ...]
    profiles: tuple[BatchProfile, ...]
    tf32: bool
    metadata: Mapping[str, str]
    sha256: str = ""
    format: Literal[1] = 1

    def signed(self, plan: bytes | memoryview) -> PlanCard:
        """The card with the hash of a plan and itself."""
        entries = json.dumps(asdict(replace(self, sha256="")), sort_keys=True)
        digest = hashlib.sha256(entries.encode())
        digest.update(plan)
        return replace(self, sha256=digest.hexdigest())

    def check_fits(self, tensorrt: str, gpu: Gpu, plan: StrPath) -> None:
        """Whether a version of TensorRT can load the plan and a GPU run it; EngineError where not."""
        if _version(self.tensorrt) != _version(tensorrt):
            raise EngineError(f"{plan}: built for TensorRT {self.tensorrt}, this is {tensorrt}; build it again")
        if gpu.sm != self.sm:
            here = f"this GPU has {gpu.sm} ({gpu.name})"
            raise EngineError(f"{plan}: built for compute capability {self.sm} ({self.gpu}), {here}; build it again")


def sidecar(plan: StrPath) -> Path:
    """Where a plan's card lies: ``<plan>.json``.

    >>> sidecar("pair.plan").name
    'pair.plan.json'
    """
    return Path(f"{os.fspath(plan)}.json")


def _read(path: Path, limit: float = math.inf) -> bytes:
    """A regular file's content; OSError for what is none, would never end, or has more bytes than the limit."""
    if path.exists() and not path.is_file():
        raise OSError("not a file")
    if path.stat().st_size > limit:
        raise OSError(f"more than {limit} bytes")
    return path.read_bytes()


def read_card(plan: StrPath) -> PlanCard:
    """What a plan's sidecar says, without TensorRT; EngineError if it is missing or damaged."""
    pydantic = need("pydantic", "reading a plan's sidecar", extra="tensorrt")
    path = sidecar(plan)
    try:
        card: PlanCard = pydantic.TypeAdapter(PlanCard).validate_json(_read(path, _SIDECAR_LIMIT), strict=True)
    except OSError as error:
        raise EngineError(
            f"{plan}: no sidecar {path.name} ({error.strerror or error}); build the plan again"
        ) from error
    except pydantic.ValidationError as error:
        flaw = error.errors(include_url=False)[0]
        entry = f"{flaw['loc'][0]}: " if flaw["loc"] else ""
        raise EngineError(f"{path}: damaged, or not the sidecar of a plan ({entry}{flaw['msg']})") from error
    return card


def load_plan(plan: StrPath) -> tuple[PlanCard, bytes]:
    """A plan's card and bytes, if they belong together.

    A plan holds code that runs on the GPU: load only what you built, or got from somebody you trust. The hash finds
    damage and mix-ups, not an attacker who writes both files.

    Raises:
        EngineError: missing, cut off, without its sidecar, or one of both changed after it was written.
    """
    try:
        data = _read(Path(plan))
    except (OSError, ValueError) as error:
        raise EngineError(f"{plan}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    card = read_card(plan)
    if card.signed(data) != card:
        sizes = f"{len(data)} bytes, the sidecar is of {card.plan_bytes}"
        raise EngineError(f"{plan}: cut off, changed, or not the plan of its sidecar ({sizes}); build it again")
    return card, data
