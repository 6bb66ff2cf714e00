"""Commands, options that several of them share, and types of options."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from xcos_ext.io.errors import XCosError
from xcos_ext.io.text import display_name

Decorator = Callable[[Any], Any]

_EMPTY = "expected a path, got an empty text"


class Command(click.Command):
    """A command whose options are named as such where the library says which argument is wrong, and whose paths are
    not empty."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; an empty path is refused: a variable that was not set would name the working folder."""
        rest = super().parse_args(ctx, args)
        for param in () if ctx.resilient_parsing else self.params:
            value = ctx.params.get(param.name or "")
            if isinstance(param.type, click.Path) and "" in (value if isinstance(value, tuple) else (value,)):
                raise click.BadParameter(_EMPTY, ctx, param)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; ``device: expected ...`` becomes ``--device: expected ...``."""
        self._check_apart(ctx.params)
        try:
            return super().invoke(ctx)
        except (ValueError, XCosError) as error:
            # What is said of a file starts with its name, which may be that of an option.
            found = re.match(r"(?:[a-z]+\.[a-z]+: )?(\w+)(: expected .*)", str(error), re.DOTALL)
            for option in self.params:
                if found and option.opts[0].startswith("--") and found[1] in (option.name, option.opts[0][2:]):
                    error.args = (option.opts[0] + found[2],)
            raise

    def _check_apart(self, given: Mapping[str, Any]) -> None:
        """Refuse to write over what the command reads (:class:`Written` and ``click.Path`` options)."""
        from xcos_ext.io.atomic import OutputError, check_apart
        from xcos_ext.io.models import place_of

        values = [(param, given.get(param.name or "")) for param in self.params]
        outputs = {p.opts[0]: path for p, path in values if isinstance(p.type, Written) and path not in (None, "-")}
        inputs: list[tuple[str, Any]] = []
        for param, value in values if outputs else ():
            if isinstance(param.type, click.Path):
                title = param.human_readable_name if isinstance(param, click.Argument) else param.opts[0]
                if param.name == "model":
                    value = place_of(value, "model", "recogniser")[0]
                inputs += [(title, path) for path in (value if isinstance(value, tuple) else (value,)) if path]
        check_apart(outputs, inputs)
        galleries = {Path(os.path.realpath(path)) for p, path in values if isinstance(p.type, _Gallery) and path}
        for name, path in outputs.items():
            if not galleries.isdisjoint(Path(os.path.realpath(path)).parents):
                raise OutputError(f"{name}: expected a file outside GALLERY's folder, got {display_name(path)}")


class _Gallery(click.Path):
    """A gallery's folder, into which nothing else is written."""


command = functools.partial(click.command, cls=Command)


def device_name(value: str) -> str:
    """The name of a device, which need not be there."""
    from xcos_ext.devices import check_device_name

    try:
        check_device_name(value)
    except XCosError as error:
        raise click.BadParameter(str(error).removeprefix("device: ")) from error
    return value


def finite(value: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        number = float(value)
    except ValueError as error:
        raise click.BadParameter(f"expected a number, got {value!r}") from error
    if not math.isfinite(number):
        raise click.BadParameter(f"expected a finite number, got {value}")
    return number


class Whole(click.IntRange):
    """An integer, small enough for what counts with 64 bits."""

    name = "integer"  # in messages

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does."""
        number = super().convert(value, param, ctx)
        if abs(number) >= 1 << 63:
            self.fail(f"expected an integer of at most 64 bits, got {value}", param, ctx)
        return number


class Real(click.FloatRange):
    """A number in a range; NaN, which is in none, and infinities are refused."""

    name = "number"  # in messages

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value}", param, ctx)
        return number


def integers(value: str) -> tuple[int, ...]:
    """``"7,8"`` -> (7, 8), each once."""
    try:
        return tuple(dict.fromkeys(map(int, value.split(","))))
    except ValueError as error:
        raise click.BadParameter(f"expected numbers with commas between, such as 7,8, got {value!r}") from error


def replicates(value: str) -> int:
    """How often the bootstrap draws."""
    try:
        count = int(value)
    except ValueError as error:
        raise click.BadParameter(f"expected a whole number, got {value!r}") from error
    if count != 0 and count < 20:
        raise click.BadParameter(f"expected 0 or at least 20, got {count}")
    return count


def three(value: str) -> tuple[float, ...]:
    """One number for all three channels, or three with commas between."""
    numbers = tuple(finite(part) for part in value.split(","))
    if len(numbers) not in (1, 3):
        raise click.BadParameter(f"expected a number or three (R,G,B), got {value!r}")
    return numbers * (3 // len(numbers))


class Written(click.ParamType):
    """A file to write, checked before anything is read or computed for it.

    Args:
        suffixes: that it may end in.
        drawn: whether matplotlib is needed for it.
        dash: whether ``-`` may stand for stdout.
    """

    name = "file"

    def __init__(self, *suffixes: str, drawn: bool = False, dash: bool = False) -> None:
        self._suffixes, self._drawn, self._dash = suffixes, drawn, dash

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path as it is."""
        from xcos_ext.io.atomic import check_output
        from xcos_ext.io.optional import need

        if not value:
            self.fail(_EMPTY, param, ctx)
        try:
            if not (self._dash and value == "-"):
                check_output(value, self._suffixes)
        except XCosError as error:  # click would say of a ValueError only that the value is not valid
            raise click.ClickException(str(error)) from error
        if self._drawn:
            need("matplotlib", "drawing")
        return value


DEVICES = "cpu|cuda|cuda:N|auto"
MOST_THREADS = 1024
MOST_AT_ONCE = 65_536  # pictures, pairs or templates


def several(*options: Decorator) -> Decorator:
    """One decorator of several, as if each stood in a line."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def choice(*names: str, values: Sequence[str], help: str, default: str | tuple[str, ...] | None = None) -> Decorator:
    """An option for one of some words; one that may be repeated where the default is a tuple."""
    return click.option(
        *names, type=click.Choice(values), multiple=isinstance(default, tuple), default=default, help=help
    )


def number(
    *names: str, help: str, default: int | None = None, least: int = 1, most: int | None = None, metavar: str = "N"
) -> Decorator:
    """An option for an integer."""
    return click.option(*names, type=Whole(least, most), default=default, metavar=metavar, help=help)


def figure(name: str, what: str, default: str | None = None) -> Decorator:
    """An option for a file that is drawn."""
    kind = Written(".png", ".pdf", ".svg", drawn=True)
    return click.option(name, metavar="FILE", type=kind, default=default, help=f"Draw {what}: .png, .pdf or .svg.")


def _model(also: str = "") -> Decorator:
    return click.option(
        "--model",
        envvar="XCOS_MODEL",
        metavar="NAME|FILE",
        type=click.Path(),
        help=f"A name of xcos models list, or weights: an xCos model, or a recogniser to be plugged in (.pt, .pth, "
        f".safetensors){also}. [env: XCOS_MODEL; default: the shipped model, slim]",
    )


model = _model()
detector = click.option(
    "--detector",
    default="small",
    show_default=True,
    metavar="small|yunet|FILE.onnx",
    type=click.Path(),
    help="What finds faces: the package's own network, or a YuNet network, by name or file.",
)
aligned = click.option(
    "--aligned", is_flag=True, help="The pictures are aligned crops already (112 x 112): detect nothing."
)
device = click.option(
    "--device",
    type=device_name,
    default="auto",
    show_default=True,
    metavar=DEVICES,
    help="Where networks and operators run; auto: CUDA if it works.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
quiet = click.option("--quiet", "-q", is_flag=True, help="No progress bar, no summary.")
threshold = click.option(
    "--threshold", type=finite, metavar="T", help="The same person if score >= T; by default the model's."
)
max_pixels = number("--max-pixels", help="Refuse larger pictures. [default: 100 million]")
threads = number("--threads", default=2, most=MOST_THREADS, help="Threads that read.")
bootstrap = click.option(
    "--bootstrap",
    "replicates",
    type=replicates,
    default="1000",
    metavar="N",
    help="Replicates for the confidence intervals; 0 for none.",
)
gallery = click.argument("gallery", type=_Gallery(), metavar="GALLERY")

_faces = several(
    detector,
    aligned,
    choice(
        "--face",
        "policy",
        values=["prominent", "largest", "centre", "only"],
        default="prominent",
        help="Which of several faces: large and near the middle, the largest, the most central; or refuse.",
    ),
    click.option("--strict", is_flag=True, help="Refuse aligned crops that do not look like a face."),
    device,
)

#: Of a command that takes one face of each picture.
faces = several(model, _faces)

#: Of a command that compares two pictures.
pair = several(
    *(click.argument(name, type=click.Path()) for name in "ab"),
    _model("; or a graph of kind pair (.onnx)"),
    _faces,
    threshold,
    max_pixels,
)

#: Of a command that reads a list of pairs.
pair_list = several(
    click.option(
        "--pairs",
        required=True,
        metavar="FILE",
        type=click.Path(),
        help="LFW's pairs.txt, CFP's folder Split/FF or Split/FP, an insightface .bin, or CSV with a, b, "
        "genuine[, fold].",
    ),
    click.option("--root", metavar="DIR|ZIP", type=click.Path(), help="The pictures; a .bin file holds its own."),
    choice(
        "--format",
        "list_format",
        values=["lfw", "cfp", "bin", "csv"],
        help="Of the pairs; by default told from the file.",
    ),
    click.option(
        "--folds",
        type=integers,
        metavar="N,N",
        help="Only pairs of these folds, e.g. 7,8: a CSV file's numbers, else from 1.",
    ),
)
