"""A run: makes the cases ready, has them timed in turns, and watches the machine meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from xcos_ext.deploy.timing import Clock, Contender, DeviceClock, Measured, measure_in_turns
from xcos_ext.io.text import first_line

from .cases import Key, Settings, plan
from .environment import ColdCache, Watch, busy_warning, conditions, machine
from .estimates import drift, thin
from .results import Report, Result, Skipped
from .runtimes import Ready, Unavailable, make_ready
from .workload import Workload

__all__ = ["run"]

#: A group whose last rounds are this much slower or faster than its first ones is reported.
_DRIFT = 0.05
#: Scores may differ from the eager fp32 model's by so much before a runtime is called wrong.
_WRONG = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}

#: Times the budget of a case that a runtime may spend on measuring its own choices.
_CHOOSING = 2.0


def run(
    workload: Workload, settings: Settings | None = None, *, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Measures a model on this machine.

    Cases of one device and batch size are timed in turns, round by round, so that a drift of the machine's speed meets
    all of them. What cannot be run is listed with the reason.

    Args:
        workload: the model with its inputs.
        settings: what to measure.
        progress: told (cases done, cases).

    Returns:
        The figures, with all that they belong to.
    """
    settings = settings or Settings()
    progress = progress or (lambda done, total: None)
    cuda = "cuda" in settings.devices and torch.cuda.is_available()
    start = conditions(cuda=cuda)
    warnings = [sentence for sentence in (busy_warning(start),) if sentence]
    results: list[Result] = []
    skipped: list[Skipped] = []
    notes: list[dict[str, Any]] = []
    groups = plan(settings)
    total, done = sum(map(len, groups.values())), 0
    caches = _cold_caches(settings) if settings.cold else {}
    progress(0, total)
    for (kind, device, batch), keys in groups.items():

        def tick(share: float, done: int = done, count: int = len(keys)) -> None:
            progress(done + int(share * count), total)

        with _opencv_threads(kind == "pictures"):
            measured, left_out, note = _group(keys, workload, settings.seconds, caches.get(device), tick)
        results += measured
        skipped += left_out
        done += len(keys)
        progress(done, total)
        if measured:
            title, found = f"{kind}, {device}, batch {batch}", _disturbances(note)
            notes.append({"name": title, **note, "disturbed": bool(found)})
            warnings += [f"{title}: {'; '.join(found)}"] if found else []
        workload.forget()
    warnings += [
        f"{result.key}: a score differs from the eager fp32 model's by {result.error:.2g}"
        for result in results
        if result.error is not None and result.error > _WRONG[result.key.dtype]
    ]
    warnings += [
        f"{device}: {cache.bytes >> 20} MiB is what memory allows for emptying the caches, which may hold more"
        for device, cache in caches.items()
        if not cache.whole
    ]
    model = workload.model
    return Report(
        machine=cast(Any, machine()),
        conditions={"start": start, "end": conditions(cuda=cuda)},
        model=cast(
            Any,
            {
                "name": model.name,
                "fingerprint": model.fingerprint(),
                "architecture": model.architecture,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            },
        ),
        settings={
            **settings.as_dict(),
            "detector": workload.detector_name,
            "flush_bytes": {device: cache.bytes for device, cache in caches.items()},
            "tf32": bool(torch.backends.cudnn.allow_tf32) if cuda else None,
        },
        results=results,
        skipped=skipped,
        groups=notes,
        warnings=warnings,
    )


def _cold_caches(settings: Settings) -> dict[str, ColdCache]:
    devices = {device for _, device, _ in plan(settings)}
    return {device: ColdCache(device) for device in devices if device == "cpu" or torch.cuda.is_available()}


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


def _disturbances(notes: dict[str, Any]) -> list[str]:
    moved, others = notes["drift"], Watch.warning(notes)
    found = []
    if moved is not None and abs(moved - 1) > _DRIFT:
        word = "slower" if moved > 1 else "faster"
        found.append(f"the last rounds were {100 * abs(moved - 1):.0f} % {word} than the first ones")
    return found + ([others] if others else [])


def _group(
    keys: Sequence[Key],
    workload: Workload,
    seconds: float,
    flush: Callable[[], None] | None,
    tick: Callable[[float], None],
) -> tuple[list[Result], list[Skipped], dict[str, Any]]:
    """Cases that are timed in turns: results, what was left out, and how the machine did."""
    ready: dict[Key, Ready] = {}
    prepared: dict[Key, tuple[float, float | None]] = {}
    reasons: dict[Key, str] = {}
    for key in keys:
        begin = time.perf_counter()
        try:
            made = make_ready(key, workload, seconds=_CHOOSING * seconds)
            made.call()
            prepared[key] = time.perf_counter() - begin, _error(key, made, workload)
            ready[key] = made
        except Exception as error:
            reasons[key] = _reason(error)
    contenders = [Contender(made.call, DeviceClock() if made.on_device else Clock(), flush) for made in ready.values()]
    watch = Watch()
    timed = measure_in_turns(contenders, seconds, tick=tick)
    notes = watch.read()
    results, moved = [], []
    for (key, made), contender, measured in zip(ready.items(), contenders, timed, strict=True):
        if measured.failure is not None:
            reasons[key] = _reason(measured.failure)
            continue
        results.append(_result(key, made, contender.clock.name, measured, *prepared[key]))
        change = drift(measured.rounds)
        moved += [] if change is None else [math.log(change)]
    notes["drift"] = math.exp(sum(moved) / len(moved)) if moved else None
    return results, [Skipped(key, reasons[key]) for key in keys if key in reasons], notes


def _result(
    key: Key, ready: Ready, clock: str, measured: Measured, preparation: float, error: float | None
) -> Result:  # fmt: skip
    return Result(
        key=key,
        items=ready.items,
        clock=clock,
        rounds=tuple(map(tuple, thin(measured.rounds))),
        bursts=tuple(values[0] for values in thin([[burst] for burst in measured.bursts])),
        calls=measured.calls,
        warm_calls=measured.warm_calls,
        preparation=preparation,
        detail=ready.detail,
        error=error,
    )


def _reason(error: Exception) -> str:
    ours = isinstance(error, Unavailable) or type(error).__module__.startswith("xcos_ext")
    return first_line(error) if ours else f"{type(error).__name__}: {first_line(error)}"


def _error(key: Key, ready: Ready, workload: Workload) -> float | None:
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
    return float(np.abs(scores.astype(np.float64) - workload.reference(key.batch, key.device)).max())
