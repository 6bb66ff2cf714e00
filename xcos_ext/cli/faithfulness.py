"""``xcos evaluate faithfulness``: are a model's explanations true?"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import XCosError
from xcos_ext.io.text import counted, display_name

from . import options
from .console import bar, echo, figure, note, note_faces, note_some, print_json, print_tables, say_written, table
from .inputs import check_model_path, load, load_recogniser, opened_pairs, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from xcos_ext.evaluation.faithfulness import Deletion, Faithfulness, Locality, Patch, RegionSwap
    from xcos_ext.evaluation.figures import Estimate
    from xcos_ext.explain.explainers import PairModel


@options.command("faithfulness")
@options.pair_list
@options.aligned
@options.model
@options.detector
@click.option(
    "--teacher", metavar="WEIGHTS", type=click.Path(), help="A recogniser, whose plain cosine is explained too."
)
@click.option("--only-teacher", is_flag=True, help="Explain the teacher's cosine and nothing else.")
@click.option(
    "--explainer",
    "explainers",
    multiple=True,
    metavar="NAME",
    help="May be repeated. [default: xCos's own maps and other cheap ones; random and centre always]",
)
@options.choice(
    "--protocol",
    "protocols",
    values=["region-swap", "deletion", "identification", "locality", "patch"],
    default=(),
    help="May be repeated. [default: all]",
)
@options.number("--count", help="Pairs of each kind; people, for identification. [default: 60, or all there are]")
@options.choice(
    "--size",
    "sizes",
    values=["small", "medium", "large"],
    default=("medium",),
    help="Of swapped regions; may be repeated.",
)
@options.choice("--blend", values=["hard", "soft"], default="hard", help="Edges of what is pasted.")
@click.option("--match-colour", is_flag=True, help="Give what is pasted the colours of what it replaces.")
@click.option("--pixels", is_flag=True, help="Region swap: areas over pixels too (in the JSON).")
@options.choice(
    "--fill",
    "fills",
    values=["zero", "blur", "mean-face"],
    default=("zero",),
    help="In place of pixels that are taken away; may be repeated.",
)
@options.number("--gallery", default=1000, help="Identification: people enrolled, at most.")
@options.number("--top", default=1, metavar="K", help="Identification: explain against the K best.")
@options.number("--seed", default=0, least=0, help="Of all draws.")
@options.bootstrap
@options.number("--batch", "batch_size", default=32, most=options.MOST_AT_ONCE, help="Pairs at once.")
@options.device
@options.figure("--plot", "the curves")
@click.option(
    "--out",
    metavar="FILE",
    type=options.Written(".json"),
    help="Write all figures as JSON, anew after every protocol: .json.",
)
@options.quiet
@options.as_json
def run(
    pairs: str,
    root: str | None,
    list_format: str | None,
    folds: tuple[int, ...] | None,
    aligned: bool,
    model: str | None,
    detector: str,
    teacher: str | None,
    only_teacher: bool,
    explainers: tuple[str, ...],
    protocols: tuple[str, ...],
    device: str,
    plot: str | None,
    out: str | None,
    quiet: bool,
    as_json: bool,
    **chosen: Any,
) -> int:
    """Are explanations true? Region swaps with known truth, deletion and insertion, locality, decision patches.

    Every figure stands beside those of two controls that know nothing of the pair.
    """
    from xcos_ext.io.optional import need

    # Cheap checks first: they are before the work that takes seconds and minutes.
    if only_teacher and teacher is None:
        raise XCosError("--only-teacher: expected --teacher WEIGHTS with it, got none")
    if explainers:
        from xcos_ext.explain.explainers import available

        for name in explainers:
            if name not in available():
                raise XCosError(f"--explainer: expected some of {', '.join(available())}, got {name!r}")
    for package in ("sklearn", "scipy"):
        need(package, "evaluation")
    model_path = None if only_teacher else check_model_path(model)
    teacher_path = None if teacher is None else check_model_path(teacher)
    plots = [] if plot is None else [_numbered(plot, number) for number in range(2)]
    listed, finder = opened_pairs(pairs, root, list_format, folds, detector, aligned, *plots)
    from xcos_ext.evaluation.faithfulness import Faces, Settings, faithfulness
    from xcos_ext.evaluation.figures import plain

    # Of options that are repeated the same word may come twice.
    settings = Settings(**chosen | {name: tuple(dict.fromkeys(chosen[name])) for name in ("sizes", "fills")})
    started = time.perf_counter()
    about = {"file": display_name(pairs), "format": listed.format, "folds": folds, "aligned": finder is None}
    results: list[Faithfulness] = []

    def save(results: Sequence[Faithfulness], complete: bool) -> Any:
        models, seconds = [result.as_dict() for result in results], time.perf_counter() - started
        settled = {"pairs": plain(about), "settings": plain(settings)}
        data = settled | {"complete": complete, "models": models, "seconds": seconds}
        if out is not None:
            write_text(out, json.dumps(data, indent=2, allow_nan=False) + "\n")
        return data

    crops: dict[tuple[int, int], Faces] = {}
    for explained in _models(model_path, teacher_path, device):
        size = explained.preprocessing.size
        if size not in crops:
            crops[size] = Faces(listed, size, detector=finder)
        result = faithfulness(
            explained,
            crops[size],
            explainers or None,
            protocols=protocols or None,
            settings=settings,
            stage=lambda title: bar(title, "maps"),
            save=lambda found: save([*results, found], False),
        )
        results.append(result)
    data = save(results, True)
    note_faces({name: faces for result in results for name, faces in result.several.items()})
    if plot is not None:
        _draw(results, plot)
    if as_json:
        print_json(data)
        return 0
    for result in results:
        _print(result)
    if not quiet:
        if folds is not None:
            echo(f"only folds {', '.join(map(str, folds))}")
        if settings.replicates:
            echo(f"95 % intervals: bootstrap over people, {settings.replicates:,} replicates; thresholds stay fixed")
        echo(f"{data['seconds']:.1f} s")
        say_written(("curves", plot), ("all figures", out))
    return 0


def _models(model_path: str | None, teacher_path: str | None, device: str) -> Iterator[PairModel]:
    """The scores to explain, loaded when their turn comes."""
    from xcos_ext.explain.explainers import EmbeddingCosine, XCosPairs

    if model_path is not None:
        yield XCosPairs(load(model_path, device))
    if teacher_path is not None:
        recogniser = load_recogniser(teacher_path, device).eval()
        try:
            yield EmbeddingCosine(recogniser)
        except ValueError as error:
            raise XCosError(f"{display_name(teacher_path)}: {error}") from error


def _numbered(path: str, number: int) -> str:
    base, suffix = os.path.splitext(path)
    return f"{base}-{number + 1}{suffix}" if number else path


def _draw(results: Sequence[Faithfulness], path: str) -> None:
    """One file a model: the second and later ones get a number before the suffix."""
    from xcos_ext.evaluation.faithfulness import faithfulness_figure
    from xcos_ext.explain import save_figure

    for number, result in enumerate(results):
        try:
            drawn = faithfulness_figure(result)
        except ValueError:
            note(f"{result.model}: nothing was measured that has curves, so nothing is drawn")
        else:
            save_figure(drawn, _numbered(path, number))


def _cell(estimate: Estimate, digits: int) -> str:
    return figure(estimate.value, estimate.interval, digits)


def _swap_tables(found: RegionSwap) -> Iterator[Table]:
    from xcos_ext.evaluation.faithfulness import DIRECTIONS

    readings = {"absolute": "map of the changed pair", "difference": "changed minus unchanged", "centred": "centred"}
    how = f"{found.blend} paste" + (", colours matched" if found.match_colour else "")
    for draw in found.draws:
        rows = [row for row in found.rows if row.direction == draw.direction]
        for size in dict.fromkeys(row.size for row in rows):
            regions = list(dict.fromkeys(row.region for row in rows))
            shown = table(
                f"Region swap, {DIRECTIONS[draw.direction]}: AUC over the cells, 0.5 is chance ({size} regions, {how}, "
                f"{draw.pairs} pairs)",
                ["explainer", *regions, "same person"],
            )
            for reading, meaning in readings.items():
                shown.add_row(f"[italic]{meaning}[/italic]")
                for name in dict.fromkeys(row.explainer for row in rows):
                    own: dict[tuple[str, str], Estimate] = {
                        (row.paste, row.region): getattr(row, reading)
                        for row in rows
                        if row.explainer == name and row.size == size
                    }
                    swaps = {region: own["swap", region] for region in regions}
                    cells = [_cell(e, 2) if region == "mean" else f"{e.value:.2f}" for region, e in swaps.items()]
                    control = own.get(("same-person", "mean"))
                    shown.add_row(name, *cells, "-" if control is None else _cell(control, 2))
                shown.add_section()
            yield shown


def _deletion_tables(found: Deletion) -> Iterator[Table]:
    what, who = "verification accuracy", f"{found.pairs} pairs"
    if found.protocol == "identification":
        what, who = "rank-1 identification rate", f"{found.pairs} probes, {found.gallery} enrolled"
    shown = table(
        f"Deletion and insertion: area under {what}, % ({who}; untouched {100 * found.clean:.1f} %)",
        ["explainer", "similar: deletion ↓", "insertion ↑", "dissimilar: deletion ↓", "insertion ↑"],
    )
    for fill in dict.fromkeys(row.fill for row in found.rows):
        shown.add_row(f"[italic]fill: {fill}[/italic]")
        for name in dict.fromkeys(row.explainer for row in found.rows):
            orders = itertools.product(("similar", "dissimilar"), ("deletion", "insertion"))
            rows = [found.find(name, kind=kind, mode=mode, fill=fill) for kind, mode in orders]
            shown.add_row(name, *(_cell(row.curve.area, 1) for row in rows))
        shown.add_section()
    yield shown


def _locality_tables(found: Locality) -> Iterator[Table]:
    shown = table(
        f"Locality: share of a change of S that shows in the occluded cell ({found.pairs} pairs)",
        ["fill", "own cell ↑", "3x3 cells around ↑"],
    )
    for row in found.rows:
        shown.add_row(row.fill, _cell(row.own, 3), _cell(row.neighbourhood, 3))
    shown.add_row("all cells alike", f"{found.chance:.3f}", f"{found.chance_neighbourhood:.3f}")
    yield shown


def _patch_tables(found: Patch) -> Iterator[Table]:
    kinds = list(dict.fromkeys(row.pairs for row in found.rows))
    drawn = found.genuine + found.impostor
    shown = table(
        f"Patch replacement: area under the verdicts turned, % ↑ ({found.right} right of {drawn} pairs)",
        ["explainer", *kinds],
    )
    for name in dict.fromkeys(row.explainer for row in found.rows):
        shown.add_row(name, *(_cell(found.find(name, pairs=kind).flips.area, 1) for kind in kinds))
    yield shown


def _time_tables(result: Faithfulness) -> Iterator[Table]:
    shown = table(f"Time for the maps of one pair, ms ({result.device})", ["explainer", "median", "quartiles", "pairs"])
    for name, timing in result.timings.items():
        low, median, high = (f"{1000 * value:.3g}" for value in (timing.low, timing.median, timing.high))
        shown.add_row(name, median, f"{low}, {high}", str(timing.samples))
    yield shown


#: Part of the results -> its tables.
_TABLES: dict[str, Callable[[Any], Iterator[Table]]] = {
    "region_swap": _swap_tables,
    "deletion": _deletion_tables,
    "identification": _deletion_tables,
    "locality": _locality_tables,
    "patch": _patch_tables,
}


def _print(result: Faithfulness) -> None:
    """Tables, what was left out, and what could not be used."""
    echo(result.model)
    parts = {name: found for name in _TABLES if (found := getattr(result, name)) is not None}
    for name, found in parts.items():
        print_tables(*_TABLES[name](found))
    print_tables(*_time_tables(result))
    if result.threshold_from_pairs and result.threshold is not None:
        echo(f"explained at the threshold {result.threshold:.4f}, the equal error rate's on these pairs")
    for name, why in result.skipped.items():
        note(f"{name} is left out: {why}")
    draws = () if result.region_swap is None else result.region_swap.draws
    parts.pop("region_swap", None)
    for name, found in [*((draw.direction, draw) for draw in draws), *parts.items()]:
        if found.passed_over:
            echo(f"{name}: {found.passed_over} passed over, for want of a picture or a donor")
    for draw in draws:
        if draw.controls < draw.pairs:
            echo(f"{draw.direction}: {draw.controls} of {draw.pairs} pairs have a picture for the control")
    if result.failures:
        echo(f"{counted(len(result.failures), 'picture')} could not be used")
        note_some(result.failures.values(), "pictures")
