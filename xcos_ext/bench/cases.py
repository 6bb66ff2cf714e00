"""What is measured: stages of the way from two photographs to a score, and which cases a run has of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import pydantic.dataclasses
from pydantic import Field, Strict

from xcos_ext.io.several import several

__all__ = ["DEVICES", "DTYPES", "PIXELS", "RUNTIMES", "STAGES", "Key", "Settings", "Stage", "plan"]


@dataclass(frozen=True)
class Stage:
    """A part of the way.

    Attributes:
        unit: what one call has ``batch`` of, for the throughput.
        runtimes: those that it is measured in; None: all that are asked for.
        of_pictures: measured on the CPU whatever the device, in 8 bits, one picture a call.
    """

    unit: str
    runtimes: tuple[str, ...] | None = None
    of_pictures: bool = False


#: In the order in which a pair of photographs goes through them; ``pair`` is backbone and head of both, end to end.
STAGES: dict[str, Stage] = {
    "decode": Stage("pictures", ("native",), of_pictures=True),  # a JPEG in memory to pixels
    "detect": Stage("pictures", ("native",), of_pictures=True),  # pixels to five landmarks
    "align": Stage("pictures", ("native",), of_pictures=True),  # pixels and landmarks to a crop
    "backbone": Stage("pictures"),  # crops to what is kept of a face, the head's projection included
    "projection": Stage("pictures", ("eager", "for_inference")),  # the backbone's map to the cells' features
    "head": Stage("pairs"),  # what is kept of two faces to score, similarity and attention
    "pair": Stage("pairs"),  # two crops to score, similarity and attention
    "search": Stage("comparisons", ("native",)),  # templates of probes against a gallery's, ten best
}

#: In the order of the tables; ``native`` are stages that have one implementation.
RUNTIMES = ("native", "eager", "for_inference", "compiled", "graph", "onnxruntime", "tensorrt")
DEVICES = ("cpu", "cuda")
DTYPES = ("fp32", "bf16", "fp16")

#: The dtype of stages of pictures.
PIXELS = "uint8"


def _check(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    wrong = next((value for value in several(values, name) if value not in known), None)
    if wrong is not None or not values:
        shown = "none" if wrong is None else repr(str(wrong)[:40])
        raise ValueError(f"{name}: expected some of {', '.join(known)}, got {shown}")


@pydantic.dataclasses.dataclass(frozen=True)
class Key:
    """Names a case.

    >>> print(Key("pair", "eager", "cpu", "fp32", 16))
    pair, eager, cpu, fp32, batch 16

    Attributes:
        stage: of :data:`STAGES`.
        runtime: of :data:`RUNTIMES`.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the backbone's arithmetic, of a search's templates; ``"uint8"`` for pictures.
        batch: pictures, pairs, or probes of one call.

    Raises:
        ValueError: an unknown name, or a batch below 1.
    """

    stage: str
    runtime: str
    device: str
    dtype: str
    batch: Annotated[int, Strict(), Field(ge=1, le=2**53)]

    def __post_init__(self) -> None:
        known = {"stage": tuple(STAGES), "runtime": RUNTIMES, "device": DEVICES, "dtype": (*DTYPES, PIXELS)}
        for name, values in known.items():
            _check(name, (getattr(self, name),), values)

    @property
    def group(self) -> tuple[str, str, int]:
        """What is measured in turns: cases whose figures are held against each other."""
        kind = "pictures" if STAGES[self.stage].of_pictures else "search" if self.stage == "search" else "model"
        return kind, self.device, self.batch

    @property
    def order(self) -> tuple[int, int, str, int, int]:
        """Sorts cases as tables show them."""
        dtype = (*DTYPES, PIXELS).index(self.dtype)
        return list(STAGES).index(self.stage), self.batch, self.device, RUNTIMES.index(self.runtime), dtype

    def __str__(self) -> str:
        return f"{self.stage}, {self.runtime}, {self.device}, {self.dtype}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure and for how long.

    >>> Settings(stages=("pair",), batches=(1, 64), seconds=0.1).runtimes[:3]
    ('eager', 'for_inference', 'compiled')

    Attributes:
        stages: of :data:`STAGES`.
        runtimes: of :data:`RUNTIMES` but ``"native"``, which is always meant.
        batches: pictures, pairs or probes a call.
        devices: ``"cpu"``, ``"cuda"``.
        dtypes: of the backbone and of searched templates: ``"fp32"``, ``"bf16"``, ``"fp16"``.
        seconds: to spend on a case, making its runtime ready not counted.
        cold: empty the caches before every call.
        gallery: faces that are searched.
        seed: of the generated pictures and templates.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    stages: tuple[str, ...] = tuple(STAGES)
    runtimes: tuple[str, ...] = RUNTIMES[1:]
    batches: tuple[int, ...] = (1, 4, 16)
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = ("fp32",)
    seconds: float = 0.5
    cold: bool = False
    gallery: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        _check("stages", self.stages, tuple(STAGES))
        _check("runtimes", self.runtimes, RUNTIMES[1:])
        _check("devices", self.devices, DEVICES)
        _check("dtypes", self.dtypes, DTYPES)
        several(self.batches, "batches", "numbers")
        if not self.batches or any(not 1 <= batch <= 65_536 for batch in self.batches):
            raise ValueError(f"batches: expected numbers from 1 to 65,536, got {list(self.batches)}")
        if not 0.01 <= self.seconds <= 3600:
            raise ValueError(f"seconds: expected 0.01 to 3600, got {self.seconds:g}")
        if not 1 <= self.gallery <= 100_000_000:
            raise ValueError(f"gallery: expected 1 to 100,000,000 faces, got {self.gallery}")


def plan(settings: Settings) -> dict[tuple[str, str, int], list[Key]]:
    """The cases of a run, in groups that are measured in turns, in the order of measuring."""
    groups: dict[tuple[str, str, int], list[Key]] = {}
    for name, stage in STAGES.items():
        if name not in settings.stages:
            continue
        runtimes = [r for r in stage.runtimes or settings.runtimes if r == "native" or r in settings.runtimes]
        ways = settings.devices, sorted(settings.batches), runtimes, settings.dtypes
        for device, batch, runtime, dtype in itertools.product(*ways):
            way = ("cpu", PIXELS, 1) if stage.of_pictures else (device, dtype, batch)
            key = Key(name, runtime, *way)
            groups.setdefault(key.group, []).append(key)
    return {group: list(dict.fromkeys(keys)) for group, keys in groups.items()}
