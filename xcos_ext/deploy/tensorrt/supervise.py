"""Long work of TensorRT with progress, that Ctrl-C and a failing progress callback can end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .api import TensorRT

__all__ = ["Cancelled", "Steps", "supervise"]

T = TypeVar("T")

#: What progress is counted in.
PARTS = 100

_LOOK = 0.1  # seconds between looks at the progress


class Cancelled(Exception):
    """The work ended early because it was told to."""


class Steps:
    """How far TensorRT is, told by it phase by phase, and whether it should go on. Called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, done
        self._done = 0
        self.cancelled = threading.Event()

    @property
    def done(self) -> int:
        """Of :data:`PARTS`; never falls."""
        with self._lock:
            share, scale, parent = 0.0, 1.0, None
            for _ in range(len(self._phases)):
                inner = [name for name, phase in self._phases.items() if phase[0] == parent]
                if not inner:
                    break
                parent = inner[-1]
                steps, finished = self._phases[parent][1:]
                share += scale * min(finished, steps) / steps
                scale /= steps
            self._done = max(self._done, min(int(PARTS * share), PARTS - 1))
            return self._done

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins, within another or by itself."""
        with self._lock:
            self._phases[phase] = (parent, max(steps, 1), 0)

    def completed(self, phase: str, step: int) -> bool:
        """A step, counted from 0, is done; gives whether to go on."""
        with self._lock:
            if phase in self._phases:
                parent, steps, _ = self._phases[phase]
                self._phases[phase] = (parent, steps, step + 1)
        return not self.cancelled.is_set()

    def finished(self, phase: str) -> None:
        """A phase ends, maybe before all its steps."""
        with self._lock:
            self._phases.pop(phase, None)

    def monitor(self, trt: TensorRT) -> Any:
        """The object that TensorRT tells; None where this version has no such thing."""
        base: Any = getattr(trt, "IProgressMonitor", None)
        if base is None:
            return None
        steps = self

        class Monitor(base):
            def __init__(self) -> None:
                base.__init__(self)  # pybind11 does not accept super()

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                steps.started(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                return steps.completed(phase_name, step)

            def phase_finish(self, phase_name: str) -> None:
                steps.finished(phase_name)

        return Monitor()


class _Worker(threading.Thread, Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(name="xcos-tensorrt-build", daemon=True)
        self._work = work
        self.result: T | None = None
        self.error: BaseException | None = None
        #: Not join(): interrupted, that takes a running thread for a finished one (CPython up to 3.12).
        self.finished = threading.Event()

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # handed to the caller's thread
            self.error = error
        finally:
            self.finished.set()


def supervise(work: Callable[[Steps], T], progress: Callable[[int, int], None] | None) -> T:
    """Do work in a thread of its own, so that this one can react: TensorRT does not return for minutes.

    Ctrl-C, or an exception of ``progress``, asks the work to stop, waits for it, and is then raised; a second Ctrl-C
    does not wait.

    Args:
        work: is given the steps to keep up to date; raises :class:`Cancelled` where it stopped as asked.
        progress: called in this thread with (done, total).

    Returns:
        What the work returned.
    """
    steps = Steps()
    worker = _Worker(lambda: work(steps))
    try:
        worker.start()
        shown = -1
        while not worker.finished.wait(_LOOK):
            if progress is not None and (done := steps.done) != shown:
                progress(done, PARTS)
                shown = done
    except BaseException as error:
        steps.cancelled.set()
        if worker.ident is not None or isinstance(error, KeyboardInterrupt):  # else there is no thread
            worker.finished.wait()
        raise
    if worker.error is not None:
        raise worker.error
    if progress is not None:
        progress(PARTS, PARTS)
    return worker.result  # type: ignore[return-value]
