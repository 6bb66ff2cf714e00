"""A run: makes the cases ready, has them timed in turns, and watches the machine meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcos_ext.model import XCosModel

from .cases import Key, Settings, plan
from .machine import Watch, busy_warning, conditions, machine
from .report import Report, Result, Skipped
from .runtimes import Ready, Unavailable, make_ready
from .statistics import drift, thin
from .subject import Subject
from .timing import Clock, ColdCache, Contender, DeviceClock, HostClock, Measured, measure_in_turns

__all__ = ["run"]

#: A group whose last rounds are this much slower or faster than its first ones is reported.
_DRIFT = 0.05
#: Scores may differ from the eager fp32 model's by so much before a runtime is called wrong.
_WRONG = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}

#: Times the budget of a case that a runtime may spend on measuring its own choices.
_CHOOSING = 2.0

Progress = Callable[[int, int], None]


def run(subject: Subject, settings: Settings | None = None, *, progress: Progress | None = None) -> Report:
    """Measures a model on this machine.

    Cases of one device and batch size are timed in turns, round by round, so that a drift of the machine's speed meets
    all of them. What cannot be run is listed with the reason.

    Args:
        subject: the model with its inputs.
        settings: what to measure.
        progress: told (cases done, cases).

    Returns:
        The figures, with all that they belong to.
    """
    settings = settings or Settings()
    cuda = "cuda" in settings.devices and torch.cuda.is_available()
    start = conditions(cuda=cuda)
    warnings = [sentence for sentence in (busy_warning(start),) if sentence]
    results: list[Result] = []
    skipped: list[Skipped] = []
    groups: list[dict[str, Any]] = []
    todo = plan(settings)
    total, done = len(todo), 0
    flushes: dict[str, ColdCache] = {}
    if progress is not None:
        progress(0, total)
    for name, keys in todo.groups.items():

        def tick(share: float, done: int = done, count: int = len(keys)) -> None:
            if progress is not None:
                progress(done + int(share * count), total)

        with _opencv_threads(name[0] == "pictures"):
            measured, left_out, notes = _group(keys, subject, settings, flushes, tick)
        results += measured
        skipped += left_out
        done += len(keys)
        tick(0.0, done)
        if measured:
            title, found = f"{name[0]}, {name[1]}, batch {name[2]}", _judged(notes)
            groups.append({"name": title, **notes, "disturbed": bool(found)})
            warnings += [f"{title}: {'; '.join(found)}"] if found else []
        subject.forget()
    warnings += [
        f"{result.key}: a score differs from the eager fp32 model's by {result.error:.2g}"
        for result in results
        if result.error is not None and result.error > _WRONG[result.key.dtype]
    ]
    for device, cache in flushes.items():
        if not cache.whole:
            warnings.append(
                f"{device}: {cache.bytes >> 20} MiB is what memory allows for emptying the caches, which may hold more"
            )
    return Report(
        machine=machine(),
        conditions={"start": start, "end": conditions(cuda=cuda)},
        model=_model(subject.model),
        settings={
            **settings.as_dict(),
            "detector": subject.detector_name,
            "flush_bytes": {device: cache.bytes for device, cache in flushes.items()},
            "tf32": bool(torch.backends.cudnn.allow_tf32) if cuda else None,
        },
        results=results,
        skipped=skipped,
        groups=groups,
        warnings=warnings,
    )


@contextmanager
def _opencv_threads(wanted: bool) -> Iterator[None]:
    """OpenCV on as many threads as torch; by itself it takes all cores."""
    try:
        if not wanted:
            raise ImportError
        import cv2
    except ImportError:
        yield
        return
    before = cv2.getNumThreads()
    cv2.setNumThreads(torch.get_num_threads())
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _model(model: XCosModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "fingerprint": model.fingerprint(),
        "architecture": model.architecture,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _judged(notes: dict[str, Any]) -> list[str]:
    found = []
    moved = notes["drift"]
    if moved is not None and abs(moved - 1) > _DRIFT:
        word = "slower" if moved > 1 else "faster"
        found.append(f"the last rounds were {100 * abs(moved - 1):.0f} % {word} than the first ones")
    others = Watch.warning(notes)
    return found + ([others] if others else [])


def _group(
    keys: Sequence[Key],
    subject: Subject,
    settings: Settings,
    flushes: dict[str, ColdCache],
    tick: Callable[[float], None],
) -> tuple[list[Result], list[Skipped], dict[str, Any]]:
    """Cases that are timed in turns: results, what was left out, and how the machine did."""
    ready: dict[Key, Ready] = {}
    reasons: dict[Key, str] = {}
    spent: dict[Key, float] = {}
    errors: dict[Key, float | None] = {}
    for key in keys:
        begin = time.perf_counter()
        try:
            prepared = make_ready(key, subject, seconds=_CHOOSING * settings.seconds)
            prepared.call()
            spent[key] = time.perf_counter() - begin
            errors[key] = _error(key, prepared, subject)
        except Exception as error:
            reasons[key] = _reason(error)
            continue
        ready[key] = prepared
    contenders = []
    for key, prepared in ready.items():
        flush = None
        if settings.cold:
            if key.device not in flushes:
                flushes[key.device] = ColdCache(key.device)
            flush = flushes[key.device]
        clock: Clock = DeviceClock() if prepared.on_device else HostClock()
        contenders.append(Contender(str(key), prepared.call, clock, flush))
    watch = Watch()
    timed = measure_in_turns(contenders, settings.seconds, tick=tick)
    notes = watch.read()
    results = []
    moved = []
    for (key, prepared), contender, measured in zip(ready.items(), contenders, timed, strict=True):
        if measured.failure is not None or not measured.rounds:
            reasons[key] = measured.failure or "it was not timed"
            continue
        results.append(_result(key, prepared, contender, measured, spent[key], errors[key]))
        change = drift(measured.rounds)
        if change is not None:
            moved.append(change)
    notes["drift"] = math.exp(sum(map(math.log, moved)) / len(moved)) if moved else None
    return results, [Skipped(key, reasons[key]) for key in keys if key in reasons], notes


def _result(
    key: Key, ready: Ready, contender: Contender, measured: Measured, preparation: float, error: float | None
) -> Result:
    return Result(
        key=key,
        items=ready.items,
        clock=contender.clock.name,
        rounds=tuple(map(tuple, thin(measured.rounds))),
        bursts=tuple(values[0] for values in thin([[burst] for burst in measured.bursts])),
        calls=measured.calls,
        warm_calls=measured.warm_calls,
        preparation=preparation,
        detail=ready.detail,
        error=error,
    )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Unavailable) or (text and type(error).__module__.startswith("xcos_ext")):
        return text
    if isinstance(error, MemoryError):
        return "not enough memory"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _error(key: Key, ready: Ready, subject: Subject) -> float | None:
    """Largest difference of a case's scores from the eager fp32 model's; None where it has no scores.

    Raises:
        ValueError: scores that are not finite, or not as many as pairs.
    """
    if ready.scores is None:
        return None
    found = ready.scores()
    scores = (found.detach().float().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)).ravel()
    if scores.shape != (key.batch,) or not np.isfinite(scores).all():
        raise ValueError(f"scores: expected {key.batch} finite numbers, got {scores[:3]}")
    return float(np.abs(scores.astype(np.float64) - subject.reference(key.batch, key.device)).max())
