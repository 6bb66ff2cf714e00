"""What a training says: a CSV file always, a bar or a line now and then on stderr, TensorBoard when asked."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xcos_ext.io.atomic import write_atomically
from xcos_ext.io.errors import XCosError

from .parallel import mean_over_processes

__all__ = ["Log", "Means", "Progress", "tensorboard_writer"]

_SECONDS_BETWEEN_LINES = 30.0


class Log:
    """Rows of numbers by step in a CSV file, and as TensorBoard's events where asked. Columns are those of the first
    row; a row is on disk once it is written.

    Args:
        path: the file.
        step: keep rows up to this step, which a resumed training has done; later ones belong to a run that was killed.
        tag: of the events.
        events: where to; None: nowhere.
    """

    def __init__(self, path: Path, step: int, tag: str, events: Any = None) -> None:
        self.path, self.tag, self.events = path, tag, events
        self._columns: list[str] = []
        text = io.StringIO()
        if step > 0 and path.is_file():
            with path.open(newline="", encoding="utf-8") as stream:
                reader = csv.DictReader(stream)
                self._columns = list(reader.fieldnames or [])
                # A killed run may have left half a row at the end.
                kept = [row for row in reader if None not in row.values() and 0 < int(row["step"] or 0) <= step]
            if self._columns:
                writer = csv.DictWriter(text, self._columns)
                writer.writeheader()
                writer.writerows(kept)
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Append a row; names that the first row did not have are left out of the file."""
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            new = not self._columns
            self._columns = self._columns or ["step", *row]
            writer = csv.DictWriter(stream, self._columns, extrasaction="ignore")
            if new:
                writer.writeheader()
            values = {name: repr(value) if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow({"step": step, **values})
        if self.events is not None:
            for name, value in row.items():
                self.events.add_scalar(f"{self.tag}/{name}", value, step)


class Means:
    """Running sums of named values since the last row of the log, on the device: reading them would wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            tensor = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach()
            self.sums[name] = self.sums[name] + tensor if name in self.sums else tensor

    def read(self) -> dict[str, float]:
        """Means over steps and processes; starts anew."""
        names = list(self.sums)
        stacked = mean_over_processes(torch.stack([self.sums[name] for name in names]) / max(1, self.count))
        self.sums, self.count = {}, 0
        return dict(zip(names, stacked.tolist(), strict=True))

    def plain(self) -> dict[str, Any]:
        return {"count": self.count, "sums": {name: value.item() for name, value in self.sums.items()}}

    def restore(self, plain: Mapping[str, Any]) -> None:
        self.count = int(plain["count"])
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in plain["sums"].items()
        }


def tensorboard_writer(folder: Path, step: int) -> Any:
    """A ``SummaryWriter`` that drops events after ``step``.

    Raises:
        XCosError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise XCosError(
            "train.tensorboard: TensorBoard is not installed: pip install 'xcos_ext[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


class Progress:
    """Loss, rate and time left on stderr: a bar on a terminal, else a line every half minute.

    Args:
        steps: of the whole training.
        done: steps done before.
        show: False says nothing.
    """

    def __init__(self, steps: int, done: int, show: bool) -> None:
        self._steps, self._first = steps, done
        self._start = self._spoke = time.monotonic()
        self._show = show and sys.stderr is not None
        self._bar: Any = None
        if self._show and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("training"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[shown]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("training", total=steps, completed=done, shown="")
            self._bar.start()

    def update(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """A step is done; ``values`` are shown where there are new ones."""
        shown = {} if values is None else {"shown": "  ".join(f"{name} {v:.4g}" for name, v in values.items())}
        if self._bar is not None:
            self._bar.update(self._task, completed=step, **shown)
        elif shown and time.monotonic() - self._spoke > _SECONDS_BETWEEN_LINES:
            spent = time.monotonic() - self._start
            left = spent / max(1, step - self._first) * (self._steps - step)
            self.say(f"step {step} of {self._steps}  {shown['shown']}  {spent:.0f} s, about {left:.0f} s left")

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        self._spoke = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self._show:
            with contextlib.suppress(OSError, ValueError):
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
