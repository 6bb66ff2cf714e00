"""What a run found: samples, the figures that are computed from them, and the file that holds them."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import pydantic.dataclasses
from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator
from typing_extensions import NotRequired, TypedDict

from xcos_ext.io.errors import XCosError
from xcos_ext.io.text import display_name, first_line

from .cases import STAGES, Key
from .estimates import MOST_SAMPLES, Estimate, Latency, latency, ratio

__all__ = ["FORMAT", "HEAD_TARGET", "SCHEMA", "FormatError", "Report", "Result", "Share", "Skipped", "read_report"]

FORMAT = "xcos_ext.bench"
SCHEMA = 1
_MOST_BYTES = 256 << 20

#: The head may take this share of a pair's time on a CPU.
HEAD_TARGET = 0.02

Count = Annotated[int, Strict(), Field(ge=0, le=2**53)]
Positive = Annotated[int, Strict(), Field(ge=1, le=2**53)]
Seconds = Annotated[float, Strict(), Field(gt=0, lt=1e6)]
NotNegative = Annotated[float, Strict(), Field(ge=0, lt=1e6)]


def _key_inside(data: Any) -> Any:
    """Files have a case's names beside its figures."""
    return {**data, "key": data} if isinstance(data, dict) and "key" not in data else data


@pydantic.dataclasses.dataclass(frozen=True)
class Result:
    """A case that was measured.

    >>> key = Key("pair", "eager", "cpu", "fp32", 4)
    >>> Result(key, items=4, clock="host", rounds=((0.02,), (0.02,)), bursts=(0.02,), calls=2).throughput
    200.0

    Attributes:
        key: which one.
        items: units of its stage that a call does.
        clock: ``"host"`` or ``"cuda events"``.
        rounds: seconds of the calls that were kept, round by round.
        bursts: seconds a call where calls follow each other, one figure a round; empty with cold caches.
        calls: how many were timed.
        warm_calls: how many before.
        preparation: seconds that making the runtime ready took.
        detail: how the runtime does it.
        error: largest difference of a score from the eager fp32 model's; None: no scores, or not compared.
    """

    key: Key
    items: Positive
    clock: str
    rounds: tuple[tuple[Seconds, ...], ...]
    bursts: Annotated[tuple[Seconds, ...], Field(max_length=MOST_SAMPLES)]
    calls: Count
    warm_calls: Count = 0
    preparation: NotNegative = 0.0
    detail: str = ""
    error: NotNegative | None = None

    _flat = model_validator(mode="before")(_key_inside)

    def __post_init__(self) -> None:
        kept = len(self.samples)
        if not self.rounds or not all(self.rounds) or kept > MOST_SAMPLES:
            raise ValueError(f"rounds: expected 1 to {MOST_SAMPLES:,} samples, at least one a round, got {kept:,}")
        if self.calls < kept:
            raise ValueError(f"calls: expected at least {kept}, got {self.calls}")

    @cached_property
    def latency(self) -> Latency:
        """Percentiles of the kept calls."""
        return latency(self.rounds)

    @property
    def throughput(self) -> float:
        """Units of the stage a second: median over rounds of calls that follow each other; with cold caches, from the
        mean latency."""
        return self.items / (statistics.median(self.bursts) if self.bursts else self.latency.mean)

    @property
    def samples(self) -> list[float]:
        """Seconds of the kept calls."""
        return [value for values in self.rounds for value in values]


@pydantic.dataclasses.dataclass(frozen=True)
class Skipped:
    """A case that was not measured. Attributes: key: which one; reason: why.

    >>> Skipped(Key("pair", "graph", "cpu", "fp32", 1), "CUDA graphs need a GPU").reason
    'CUDA graphs need a GPU'
    """

    key: Key
    reason: str

    _flat = model_validator(mode="before")(_key_inside)


@dataclass(frozen=True)
class Share(Estimate):
    """Share of a pair's time that a part takes: the median of the ratios within rounds, with its 95 % interval.

    >>> Share(median=0.011, low=0.010, high=0.012, of_fastest=0.03).under(0.02)
    False

    Attributes:
        of_fastest: the same of the fastest calls. On a busy machine long calls are interrupted and short ones are
            not, so that medians flatter a part; these hardly are.
    """

    of_fastest: float

    def under(self, target: float) -> bool:
        """Whether the share is below a target, by the medians and by the fastest calls."""
        return max(self.median, self.of_fastest) < target


_OPEN = ConfigDict(extra="allow")


class _Gpu(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str


class _Machine(TypedDict):
    """What figures cannot do without; the other facts are kept too."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    processor: str
    threads: Positive
    torch: str
    commit: str
    date: str
    cores: NotRequired[int | None]
    python: NotRequired[str]
    gpu: NotRequired[_Gpu]


class _Model(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str
    fingerprint: str


@pydantic.dataclasses.dataclass(frozen=True)
class Report:
    """All that a run found. :func:`xcos_ext.bench.run` makes one.

    >>> from xcos_ext.bench import machine
    >>> report = Report(machine(), {}, {"name": "a", "fingerprint": "f"}, {"cold": False}, results=[])
    >>> list(report.as_dict())[:3]
    ['format', 'schema', 'machine']

    Attributes:
        machine: as :func:`xcos_ext.bench.machine` says.
        conditions: of the machine, ``"start"`` and ``"end"``.
        model: name, fingerprint, architecture, parameters.
        settings: of the run.
        results: what was measured.
        skipped: what was not, with reasons.
        groups: how the machine did meanwhile, for each group of cases.
        warnings: what may have disturbed the figures.
    """

    machine: _Machine
    conditions: dict[str, Any]
    model: _Model
    settings: dict[str, Any]
    results: list[Result]
    skipped: list[Skipped] = Field(default_factory=list)
    groups: list[dict[str, Any]] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)

    def __post_init__(self) -> None:
        if len({result.key for result in self.results}) != len(self.results):
            raise ValueError("a case is there twice")

    @property
    def gpu(self) -> str | None:
        """The name of the machine's GPU."""
        return self.machine["gpu"]["name"] if "gpu" in self.machine else None

    @property
    def place(self) -> str:
        """Processor, threads, and the GPU if one was measured."""
        threads = self.machine["threads"]
        where = f"{self.machine['processor']}, {threads} thread{'' if threads == 1 else 's'}"
        used = any(result.key.device == "cuda" for result in self.results)
        return f"{where}; {self.gpu}" if used and self.gpu else where

    def find(self, key: Key) -> Result | None:
        """The case of a key, if it was measured."""
        return next((result for result in self.results if result.key == key), None)

    def shares(self, part: str = "head") -> dict[Key, Share]:
        """Share of a pair's time that a part of the way takes, by the pair's case.

        Args:
            part: ``"head"``, or ``"projection"``, whose time for both faces counts.
        """
        found = {}
        for pair in self.results:
            other = self.find(replace(pair.key, stage=part)) if pair.key.stage == "pair" else None
            if other is None or len(other.rounds) != len(pair.rounds):
                continue
            share = ratio(other.rounds, pair.rounds, paired=True)
            of_fastest = other.latency.fastest / pair.latency.fastest
            faces = 2 if STAGES[part].unit == "pictures" else 1
            found[pair.key] = Share(*(faces * x for x in (share.median, share.low, share.high, of_fastest)))
        return found

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; :func:`xcos_ext.bench.read_report` reads it."""
        data = TypeAdapter(Report).dump_python(self, mode="json")
        cases = [
            {**case.pop("key"), **case, "unit": STAGES[result.key.stage].unit, "latency": asdict(result.latency),
             "throughput": result.throughput}
            for result, case in zip(self.results, data.pop("results"), strict=True)
        ]  # fmt: skip
        shares = []
        for key, share in self.shares().items():
            figures = asdict(share)
            aim = {"target": HEAD_TARGET, "met": share.under(HEAD_TARGET)} if key.device == "cpu" else {}
            shares.append(
                {**asdict(key), "share": figures.pop("median"), **figures, "target": None, "met": None, **aim}
            )
        skipped = [{**case["key"], "reason": case["reason"]} for case in data["skipped"]]
        found = {"format": FORMAT, "schema": SCHEMA, **data}
        return {**found, "cases": cases, "skipped": skipped, "head_share": shares}


class FormatError(XCosError, ValueError):
    """A results file that cannot be used: missing, not of this command, of another version, or damaged.

    >>> try:
    ...     read_report("nowhere.json")
    ... except FormatError as error:
    ...     print(error)
    nowhere.json: no such file
    """


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_report(path: str | os.PathLike[str]) -> Report:
    """Read a results file. Its samples are the truth: figures that it claims are not read but computed again.

    ``read_report("run.json").results[0].latency.p50`` is a median in seconds.

    Args:
        path: that ``xcos bench --json`` wrote; it may come from anywhere: nothing in it is trusted.

    Raises:
        FormatError: missing, too large, not JSON, not a results file, of another version, or damaged.
    """
    file, where = Path(path), display_name(path)
    try:
        if not file.is_file():  # a pipe would be waited for
            raise FormatError(f"{where}: {'not a regular file' if file.exists() else 'no such file'}")
        if file.stat().st_size > _MOST_BYTES:
            raise FormatError(f"{where}: expected at most {_MOST_BYTES >> 20} MiB, got {file.stat().st_size:,} bytes")
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{where}: expected JSON, got something else ({first_line(error)})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{where}: expected a file that xcos bench --json wrote, got something else")
    if data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        raise FormatError(f"{where}: expected version {SCHEMA} of the format, got {str(data.get('schema'))[:40]!r}")
    try:
        return TypeAdapter(Report).validate_python({**data, "results": data.get("cases")})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "key")
        raise FormatError(f"{where}: damaged: {place.replace('results', 'cases')}: {first['msg']}") from error
