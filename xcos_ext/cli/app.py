"""The ``xcos`` command: its subcommands, each imported when it is called, and what happens when one fails."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import click

from xcos_ext import __version__
from xcos_ext.io.errors import XCosError
from xcos_ext.io.text import ENCODABLE

from .console import INTERRUPTED, TROUBLE, note


@click.pass_context
def _help(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


class LazyGroup(click.Group):
    """Commands that are imported when they are called or asked for their help; alone it prints its own help.

    Args:
        name: of the group.
        table: of each command where it is, as ``module.function`` of this folder, and what it does in a few words;
            or a group.
    """

    def __init__(self, name: str, table: Mapping[str, tuple[str, str] | click.Group], **how: Any) -> None:
        super().__init__(name, callback=_help, invoke_without_command=True, **how)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is no such one."""
        found = self._table.get(cmd_name)
        if found is None or isinstance(found, click.Group):
            return found
        module, _, function = found[0].partition(".")
        command: click.Command = getattr(importlib.import_module(f".{module}", __package__), function)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """As click does; of a word that is none, the command that it is nearest to is named."""
        near = difflib.get_close_matches(args[0].lower(), self._table, 1)
        if args[0] not in self._table and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        shown = [
            click.Command(name, help=found.help if isinstance(found, click.Group) else found[1])
            for name, found in self._table.items()
        ]
        click.Group(commands=shown).format_commands(ctx, formatter)


class GuardedGroup(LazyGroup):
    """Failures are one line on stderr and exit status 2; 130 after Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click does, but Ctrl-C prints nothing."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None

    def main(self, *args: Any, standalone_mode: bool = True, **how: Any) -> Any:
        """Run and, as click does, end the process; ``standalone_mode=False`` returns the status instead."""
        _reopen_closed_streams()
        _accept_all_characters()
        os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # read when OpenCV is imported
        if not standalone_mode:
            return self._guarded(*args, **how)
        with _ended_as_by_ctrl_c(signal.SIGTERM):
            status = self._guarded(*args, **how)
        sys.exit(status)

    def _guarded(self, *args: Any, **how: Any) -> int:
        try:
            _check_working_folder()
            result = super().main(*args, standalone_mode=False, **how)  # type: ignore[call-overload]
            if sys.stdout is not None:
                sys.stdout.flush()  # now, while failing still changes the exit status
            return result if isinstance(result, int) else 0
        except (KeyboardInterrupt, click.Abort):
            return INTERRUPTED
        except click.ClickException as error:
            path = getattr(getattr(error, "ctx", None), "command_path", "xcos")
            hint = f" (see {path} --help)" if isinstance(error, click.UsageError) else ""
            note(f"{error.format_message().rstrip('.')}{hint}")
        except (SystemExit, BrokenPipeError):  # click's or ours: the reader has gone, and has seen what it wanted
            _settle(sys.stdout)
        except Exception as error:  # the promise is one line, whatever it is
            if os.environ.get("XCOS_DEBUG", "") not in ("", "0"):
                import traceback

                traceback.print_exc()
            note(_describe(error))
            _settle(sys.stdout)
        return TROUBLE


@contextlib.contextmanager
def _ended_as_by_ctrl_c(number: int) -> Iterator[None]:
    """A signal that would end the process does so once what was begun is undone, as after Ctrl-C: no temporary file
    stays. A second one ends it at once. The parent sees a process that the signal ended, as without this."""
    came = False

    def interrupt(*_: Any) -> None:
        nonlocal came
        came = True
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    if signal.getsignal(number) is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)
        if came:
            signal.raise_signal(number)


def _check_working_folder() -> None:
    """Say where the working folder was deleted: libraries that are loaded later would fail for it, each in its way."""
    try:
        os.getcwd()
    except OSError as error:
        raise XCosError(f"the working folder cannot be used ({error.strerror}): change to one that is there") from error


def _reopen_closed_streams() -> None:
    """Give closed standard streams a place, or the next file opened would take theirs and receive their output, and
    what is said on stderr would go to stdout."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
                if getattr(sys, name) is None:
                    setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))


def _accept_all_characters() -> None:
    """Have the standard streams replace what their encoding lacks, unless PYTHONIOENCODING says how."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors=ENCODABLE)


def _settle(stream: Any) -> None:
    """Flush a stream; where that fails, let Python's flush at exit go nowhere instead of failing again."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _describe(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (XCosError, ValueError, OSError)):  # they name the argument or the file that is wrong
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


xcos = GuardedGroup(
    "xcos",
    {
        "bench": ("bench.run", "Latency and throughput here, or what changed between two runs."),
        "dedupe": ("dedupe.run", "Find faces of GALLERY that look like the same person."),
        "demo": ("demo.run", "Scoring, gradients and search on generated maps, timed."),
        "enroll": ("enroll.run", "Enrol photographs in GALLERY: files, folders, zip archives."),
        "evaluate": LazyGroup(
            "evaluate",
            {
                "faithfulness": ("faithfulness.run", "Are explanations true? Measured with controls."),
                "verification": ("verification.run", "Accuracy, AUC, EER and TAR on a list of pairs."),
            },
            help="Measure a model on a data set.",
        ),
        "explain": ("explain.run", "Why does the model say what it says about the faces of A and B?"),
        "export": LazyGroup(
            "export",
            {
                "onnx": ("export.to_onnx", "An ONNX graph of standard operators."),
                "tensorrt": ("export.to_tensorrt", "A TensorRT engine of a graph, for this GPU."),
            },
            help="Write a model for other runtimes.",
        ),
        "gallery": LazyGroup(
            "gallery",
            {
                "compact": ("gallery.compact", "Delete removed faces from the disk, with all old versions."),
                "info": ("gallery.info", "Faces, persons, sizes, and the model that it belongs to."),
                "remove": ("gallery.remove", "Remove faces: all that are named, or none."),
                "verify": ("gallery.verify", "Compare everything with its checksums."),
            },
            help="Look after a gallery.",
        ),
        "info": ("info.run", "What was built, what is installed, and what it runs on."),
        "models": LazyGroup(
            "models",
            {
                "fetch": ("models.fetch_models", "Fetch the files of names now."),
                "list": ("models.list_models", "What --model and --detector know by name."),
                "path": ("models.path_of_model", "Where the file of a name is, or would be."),
            },
            help="Recognisers and detectors by name.",
        ),
        "plug": ("plug.run", "Make an explainable model of a recogniser, without training."),
        "report": ("report.run", "Compare the pairs of a list and write them on one page."),
        "search": ("search.run", "Who in GALLERY looks like the faces of PROBES?"),
        "train": ("train.run", "Train a head or a model as a TOML file says."),
        "verify": ("verify.run", "Are the faces of pictures A and B the same person's?"),
    },
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    help="""Explainable face similarity: a score, and the map of what it is made of.

    Messages go to stderr. Exit status: 0 success, 2 trouble, 130 Ctrl-C; verify and explain: 0 the same person, 1
    different people, 2 trouble. XCOS_DEBUG=1 shows tracebacks.
    """,
)
click.version_option(__version__, message="xcos %(version)s", help="Show the version and exit.")(xcos)
