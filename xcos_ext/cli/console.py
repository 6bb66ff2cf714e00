"""What commands say: exit statuses, one-line messages, rows, tables and progress on a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.atomic import OutputError
from xcos_ext.io.errors import XCosError
from xcos_ext.io.text import display_name, printable, shorten

if TYPE_CHECKING:
    from rich.table import Table

#: Exit statuses: 0 success (verify: the same person), 1 only from verify (different people), 2 anything wrong.
SAME, DIFFERENT, TROUBLE, INTERRUPTED = 0, 1, 2, 130
_UNBROKEN = 10_000  # columns of what is no terminal
_LONGEST = 4000  # characters of a message: a damaged file may call things by names of any length
_UNLIKE = "it does not look like a face, so its scores say nothing about a person"


def one_line(text: str) -> str:
    """Text without line breaks or control characters, so that a message stays one line and a terminal stays sane."""
    return printable(" ".join(text.split()))


def echo(text: str, err: bool = False) -> None:
    """Print a line on stdout, or on stderr, as that is: click itself would write UTF-8 where it is ASCII.

    Names in it may be anybody's (a file's, a model's, a person's): what is not printable is shown as an escape.
    """
    try:
        click.echo(printable(text), file=sys.stderr if err else sys.stdout)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{'stderr' if err else 'stdout'}: cannot be written: {error.strerror or error}") from error


def note(message: str) -> None:
    """Say something on stderr that is not part of the result."""
    with contextlib.suppress(OSError, ValueError):
        echo(f"xcos: {shorten(one_line(message), _LONGEST)}", err=True)


def echo_some(lines: Collection[str], what: str, most: int = 20, say: Callable[[str], None] = echo) -> None:
    """Print the first of many lines, and how many more there are."""
    for line in islice(lines, most):
        say(line)
    if len(lines) > most:
        say(f"... and {len(lines) - most:,} more {what}")


def note_some(messages: Collection[str], what: str) -> None:
    """The same of messages."""
    echo_some(messages, f"{what} (--json lists them)", 5, note)


def note_faces(found: Mapping[str, int], policy: str | None = None) -> dict[str, list[str]]:
    """Say of which pictures one face of several was taken, and which do not look like a face at all.

    Args:
        found: pictures and how many faces each shows; 0: an aligned crop that looks like none.
        policy: of the choice, where the command has ``--face`` and ``--strict``.

    Returns:
        The pictures' names, for JSON.
    """
    several = {name: faces for name, faces in found.items() if faces > 1}
    unlike = [name for name, faces in found.items() if not faces]
    if several:
        from xcos_ext.faces import choice_in_words

        hint = " (see --face)" if policy else ""
        chosen = [f"{name}: {choice_in_words(faces, policy or 'prominent')}{hint}" for name, faces in several.items()]
        note_some(chosen, "pictures with several faces")
    hint = " (--strict refuses it)" if policy else ""
    note_some([f"{name}: {_UNLIKE}{hint}" for name in unlike], "pictures that do not look like a face")
    return {"several_faces": list(several), "not_like_a_face": unlike}


def print_json(data: Any) -> None:
    """Print strict JSON (no NaN, no infinities) on stdout.

    Raises:
        XCosError: a value that is not finite.
    """
    try:
        text = json.dumps(data, indent=2, allow_nan=False)
    except ValueError as error:
        raise XCosError("the result has a value that is not finite, which JSON cannot hold") from error
    click.echo(text, file=sys.stdout)  # many lines, of ASCII


def print_rows(*rows: Sequence[str], width: int = 10, gap: int = 1) -> None:
    """Print names and values, or more columns, a line each; the first column is at least so wide."""
    rows = tuple([printable(cell) for cell in row] for row in rows)
    widths = [max(map(len, column)) + gap for column in zip(*rows, strict=True)]
    widths[0] = max(widths[0], width + gap)
    for row in rows:
        echo("".join(map(str.ljust, row, widths)).rstrip())


def table(title: str, columns: Sequence[str]) -> Table:
    """A table to be filled; numbers are to the right, the first column is to the left."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(printable(title), "table.title"))  # no markup in a model's name
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left")
    return made


def print_tables(*tables: Table) -> None:
    """Print tables whole: cells are broken between words only; where a terminal is too narrow even so, every row is a
    block of lines."""
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    # Where nobody looks at a terminal, lines are not broken at its width.
    console = Console(file=sys.stdout, width=None if terminal else _UNBROKEN, highlight=False)
    for shown in tables:
        for column in shown.columns:
            column.overflow = "fold"
            column.min_width = max(console.measure(cell).minimum for cell in (column.header, *column.cells))
        # A title breaks at the width of its table, which may be narrower than the terminal.
        title, shown.title = shown.title, None
        if title:
            console.print(title)
        if console.measure(shown, options=console.options.update(width=_UNBROKEN)).minimum <= console.width:
            console.print(shown, "")
        else:
            for row in zip(*(column.cells for column in shown.columns), strict=True):
                block = Table.grid(padding=(0, 2))
                for column, cell in zip(shown.columns, row, strict=True):
                    if str(cell):
                        block.add_row(column.header, cell)
                console.print(block, "")


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


def figure(value: float | None, interval: Sequence[float] | None, digits: int, scale: float = 1) -> str:
    """A number in a table, its interval below it."""
    if value is None:
        return "-"
    shown = [f"{scale * number:.{digits}f}" for number in (value, *(interval or ()))]
    return shown[0] if interval is None else f"{shown[0]}\n\\[{shown[1]}, {shown[2]}]"


def say_written(*files: tuple[str, str | None]) -> None:
    """Say what was written where: titles and paths, None where there is no such file."""
    for title, path in files:
        if path is not None:
            echo(f"{title}: {display_name(path)}")


def progress(items: Sequence[Any], title: str) -> Iterator[Any]:
    """The items, with a progress bar."""
    with bar(title, "") as tick:
        for done, item in enumerate(items, 1):
            yield item
            tick(done, len(items))


@contextlib.contextmanager
def bar(title: str, unit: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar with rate and time left on stderr, where that is a terminal and no --quiet or --json was given.

    Gives ``tick(done, total)``; ``tick(done, total, title)`` has a bar for each title.
    """
    given = click.get_current_context().params
    quiet = quiet or given.get("quiet") or given.get("as_json", False)
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total, title=title: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None or not unit else f"{speed:,.0f} {unit}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        Rate(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:

        def tick(done: int, total: int, title: str = title) -> None:
            if title not in tasks:
                tasks[title] = shown.add_task(title, total=max(total, 1))
            shown.update(tasks[title], completed=done, total=max(total, 1))

        yield tick
