"""What is measured: stages of the way from two photographs to a score, and which cases a run has of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["DEVICES", "DTYPES", "PIXELS", "RUNTIMES", "STAGES", "Key", "Settings", "Stage", "plan"]


@dataclass(frozen=True)
class Stage:
    """A part of the way.

    Attributes:
        name: as on the command line.
        unit: what one call has ``batch`` of, for the throughput.
        what: from what to what.
        runtimes: those that it is measured in; None: all that are asked for.
        batched: measured at every batch size; else at 1 only.
        on_cpu: measured on the CPU whatever the device, in 8 bits: it has no dtype.
    """

    name: str
    unit: str
    what: str
    runtimes: tuple[str, ...] | None = None
    batched: bool = True
    on_cpu: bool = False


#: In the order in which a pair of photographs goes through them; ``pair`` is backbone and head of both, end to end.
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("decode", "pictures", "a JPEG in memory to pixels", ("native",), batched=False, on_cpu=True),
        Stage("detect", "pictures", "pixels to five landmarks", ("native",), batched=False, on_cpu=True),
        Stage("align", "pictures", "pixels and landmarks to a crop", ("native",), batched=False, on_cpu=True),
        Stage("backbone", "pictures", "crops to what is kept of a face, the head's projection included"),
        Stage("projection", "pictures", "the backbone's map to the cells' features", ("eager", "for_inference")),
        Stage("head", "pairs", "what is kept of two faces to score, similarity and attention"),
        Stage("pair", "pairs", "two crops to score, similarity and attention"),
        Stage("search", "comparisons", "templates of probes against a gallery's, ten best", ("native",)),
    )
}

#: In the order of the tables; ``native`` are stages that have one implementation.
RUNTIMES = ("native", "eager", "for_inference", "compiled", "graph", "onnxruntime", "tensorrt")
DEVICES = ("cpu", "cuda")
DTYPES = ("fp32", "bf16", "fp16")

#: The dtype of stages of pictures.
PIXELS = "uint8"


@dataclass(frozen=True)
class Key:
    """Names a case.

    Attributes:
        stage: of :data:`STAGES`.
        runtime: of :data:`RUNTIMES`.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the backbone's arithmetic, of a search's templates; ``"uint8"`` for pictures.
        batch: pictures, pairs, or probes of one call.
    """

    stage: str
    runtime: str
    device: str
    dtype: str
    batch: int

    @property
    def group(self) -> tuple[str, str, int]:
        """What is measured in turns: cases whose figures are held against each other."""
        kind = "pictures" if STAGES[self.stage].on_cpu else "search" if self.stage == "search" else "model"
        return kind, self.device, self.batch

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.stage}, {self.runtime}, {self.device}, {self.dtype}, batch {self.batch}"


def _listed(name: str, values: Sequence[Any], known: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"{name}: expected at least one of {', '.join(known)}, got none")
    unknown = [value for value in values if value not in known]
    if unknown:
        raise ValueError(f"{name}: expected some of {', '.join(known)}, got {unknown[0]!r}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure and for how long.

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
        _listed("stages", self.stages, tuple(STAGES))
        _listed("runtimes", self.runtimes, RUNTIMES[1:])
        _listed("devices", self.devices, DEVICES)
        _listed("dtypes", self.dtypes, DTYPES)
        if not self.batches or any(not 1 <= batch <= 65_536 for batch in self.batches):
            raise ValueError(f"batches: expected numbers from 1 to 65,536, got {list(self.batches)}")
        if not 0.01 <= self.seconds <= 3600:
            raise ValueError(f"seconds: expected 0.01 to 3600, got {self.seconds:g}")
        if not 1 <= self.gallery <= 100_000_000:
            raise ValueError(f"gallery: expected 1 to 100,000,000 faces, got {self.gallery}")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass
class Plan:
    """Attributes: groups: cases that are measured in turns, in the order of measuring."""

    groups: dict[tuple[str, str, int], list[Key]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))


def _keys(settings: Settings) -> Iterator[Key]:
    for name, stage in STAGES.items():
        if name not in settings.stages:
            continue
        devices = ("cpu",) if stage.on_cpu else tuple(dict.fromkeys(settings.devices))
        dtypes = (PIXELS,) if stage.on_cpu else tuple(dict.fromkeys(settings.dtypes))
        batches = sorted(set(settings.batches)) if stage.batched else [1]
        runtimes = settings.runtimes if stage.runtimes is None else stage.runtimes
        for device in devices:
            for batch in batches:
                for runtime in dict.fromkeys(runtimes):
                    if runtime == "native" or runtime in settings.runtimes:
                        yield from (Key(name, runtime, device, dtype, batch) for dtype in dtypes)


def plan(settings: Settings) -> Plan:
    """The cases of a run, in groups that are measured in turns."""
    found = Plan()
    for key in _keys(settings):
        found.groups.setdefault(key.group, []).append(key)
    return found
