"""A run: makes the cases ready, has them timed in turns, and watches the machine meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from xcos_ext.deploy.timing import Contender, clock_for, measure_in_turns
from xcos_ext.faces import choice_in_words, display_name
from xcos_ext.io.errors import XCosError
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

    >>> from xcos_ext.model import load_model
    >>> settings = Settings(stages=("head",), runtimes=("eager", "graph"), batches=(2,), seconds=0.02)
    >>> with Workload(load_model()) as workload:
    ...     report = run(workload, settings)
    >>> [str(result.key) for result in report.results], report.results[0].latency.p50 < 1
    (['head, eager, cpu, fp32, batch 2'], True)
    >>> report.skipped[0].reason
    'CUDA graphs need a GPU (--device cuda)'

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
    devices = {device for _, device, _ in groups} - (set() if cuda else {"cuda"})
    caches = {device: ColdCache(device) for device in devices} if settings.cold else {}
    total, done = sum(map(len, groups.values())), 0
    progress(0, total)
    pictures = any(kind == "pictures" for kind, *_ in groups)
    with _opencv_threads() if pictures else nullcontext():
        for (kind, device, batch), keys in groups.items():

            def tick(share: float, done: int = done, count: int = len(keys)) -> None:
                progress(done + int(share * count), total)

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
    if workload.faces > 1:
        warnings.append(f"{display_name(workload.picture or '')}: {choice_in_words(workload.faces)}, to align it")
    model = workload.model
    facts = {
        "name": model.name,
        "fingerprint": model.fingerprint(),
        "architecture": model.architecture,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return Report(
        machine=cast(Any, machine()),
        conditions={"start": start, "end": conditions(cuda=cuda)},
        model=cast(Any, facts),
        settings={
            **asdict(settings),
            "detector": workload.detector_name,
            "flush_bytes": {device: cache.bytes for device, cache in caches.items()},
            "tf32": bool(torch.backends.cudnn.allow_tf32) if cuda else None,
        },
        results=results,
        skipped=skipped,
        groups=notes,
        warnings=warnings,
    )


@contextmanager
def _opencv_threads() -> Iterator[None]:
    """OpenCV on as many threads as torch; by itself it takes all cores."""
    try:
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
    ready: dict[Key, tuple[Ready, dict[str, Any]]] = {}
    reasons: dict[Key, str] = {}
    for key in keys:
        begin = time.perf_counter()
        try:
            made = make_ready(key, workload, seconds=_CHOOSING * seconds)
            made.call()
            preparation = time.perf_counter() - begin
            ready[key] = made, {"preparation": preparation, "error": _error(key, made, workload)}
        except Exception as error:
            reasons[key] = _reason(error)
    contenders = [
        Contender(made.call, clock_for("cuda" if made.on_device else "cpu"), flush) for made, _ in ready.values()
    ]
    watch = Watch()
    timed = measure_in_turns(contenders, seconds, tick=tick)
    notes = watch.read()
    results, moved = [], []
    for (key, (made, prepared)), contender, measured in zip(ready.items(), contenders, timed, strict=True):
        if measured.failure is not None:
            reasons[key] = _reason(measured.failure)
            continue
        rounds, bursts = thin(measured.rounds), thin([[burst] for burst in measured.bursts])
        results.append(
            Result(
                key, made.items, contender.clock.name, rounds=tuple(map(tuple, rounds)),
                bursts=tuple(values[0] for values in bursts), calls=sum(map(len, measured.rounds)),
                warm_calls=measured.warm_calls, detail=made.detail, **prepared,
            )
        )  # fmt: skip
        change = drift(measured.rounds)
        moved += [] if change is None else [math.log(change)]
    notes["drift"] = math.exp(sum(moved) / len(moved)) if moved else None
    return results, [Skipped(key, reasons[key]) for key in keys if key in reasons], notes


def _reason(error: Exception) -> str:
    """Why a case was left out; an error's class only where its message is not made to be read alone."""
    plain = isinstance(error, (Unavailable, XCosError, ValueError, OSError, RuntimeError, ImportError))
    return first_line(error) if plain else f"{type(error).__name__}: {first_line(error)}"


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
