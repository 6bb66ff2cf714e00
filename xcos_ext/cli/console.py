"""What every subcommand shares: exit statuses, one-line messages, output that may go wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click

from xcos_ext.io.errors import XCosError
from xcos_ext.io.text import printable

__all__ = ["TROUBLE", "CommandGroup", "bar", "note", "notes_for_warnings", "print_json", "progress", "quiet_opencv"]

#: Exit statuses: 0 success (verify: the same person), 1 only from verify (different people), 2 anything wrong.
SAME, DIFFERENT, TROUBLE, INTERRUPTED = 0, 1, 2, 130


def one_line(text: str) -> str:
    """Text without line breaks or control characters, so that a message stays one line and a terminal stays sane."""
    return printable(" ".join(text.split()))


def note(message: str) -> None:
    """Say something on stderr that is not part of the result."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"xcos: {one_line(message)}", err=True)


def debugging() -> bool:
    """Whether XCOS_DEBUG asks for tracebacks."""
    return os.environ.get("XCOS_DEBUG", "") not in ("", "0")


def print_json(data: Any) -> None:
    """Print strict JSON (no NaN, no infinities) on stdout.

    Raises:
        XCosError: a value that is not finite.
    """
    try:
        text = json.dumps(data, indent=2, allow_nan=False)
    except ValueError as error:
        raise XCosError("the result has a value that is not finite, which JSON cannot hold") from error
    click.echo(text)


@contextlib.contextmanager
def notes_for_warnings() -> Iterator[None]:
    """Turn Python warnings into one-line notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            yield
        finally:
            for message in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
                note(message)


def on_terminal() -> bool:
    """Whether stderr is a terminal, where progress can be shown."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress(items: Iterable[Any], total: int, title: str, *, quiet: bool = False) -> Iterator[Any]:
    """The items, with a progress bar on stderr where that is a terminal."""
    if quiet or not on_terminal():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=title, total=total, console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def bar(title: str, unit: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with rate and time left on stderr, where that is a terminal; gives ``tick(done, total)``."""
    if quiet or not on_terminal():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f} {unit}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=1)
        yield lambda done, total: shown.update(task, completed=done, total=max(total, 1))


def quiet_opencv() -> None:
    """Keep OpenCV's own log lines off stderr; must be called before it is imported."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")


def _reopen_closed_streams() -> None:
    """Give closed standard streams a place, or the next file opened would take theirs and receive their output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)


def _silence(stream: Any) -> None:
    """After a failed write: let Python's flush at exit go nowhere instead of failing again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


def _describe(error: BaseException) -> str:
    if isinstance(error, XCosError):
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class CommandGroup(click.Group):
    """A click group whose failures are one line on stderr and exit status 2; 130 after Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click does, but Ctrl-C prints nothing."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run and, as click does, end the process; ``standalone_mode=False`` returns the status instead."""
        _reopen_closed_streams()
        status = self._guarded(args, prog_name, complete_var, **extra)
        if not standalone_mode:
            return status
        sys.exit(status)

    def _guarded(
        self, args: Sequence[str] | None, prog_name: str | None, complete_var: str | None, **extra: Any
    ) -> int:
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            if sys.stdout is not None:
                sys.stdout.flush()  # now, while failing still changes the exit status
            return result if isinstance(result, int) else 0
        except (KeyboardInterrupt, click.Abort):
            return INTERRUPTED
        except SystemExit:  # click ends the process itself, with 1, when the reader of a pipe has gone
            _silence(sys.stdout)
        except click.ClickException as error:
            path = getattr(getattr(error, "ctx", None), "command_path", None) or prog_name or "xcos"
            hint = f" (see {path} --help)" if isinstance(error, click.UsageError) else ""
            note(f"{error.format_message().rstrip('.')}{hint}")
        except BrokenPipeError:  # the reader has gone, and has seen what it wanted
            _silence(sys.stdout)
        except Exception as error:  # the promise is one line, whatever it is
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                _silence(sys.stdout)
                return TROUBLE
            if debugging():
                import traceback

                traceback.print_exc()
            note(_describe(error))
            if isinstance(error, OSError):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    sys.stdout.flush()
                    return TROUBLE
                _silence(sys.stdout)
        return TROUBLE
