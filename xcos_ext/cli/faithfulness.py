"""``xcos evaluate faithfulness``: are a model's explanations true?"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from xcos_ext.io.errors import XCosError

from .console import bar, note, notes_for_warnings, print_json, quiet_opencv
from .evaluate import opened_pairs
from .verify import check_model_path, chosen_device, load

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from xcos_ext.evaluation.datasets import PairList
    from xcos_ext.evaluation.faithfulness import Deletion, Faithfulness, Locality, Patch, RegionSwap, Settings
    from xcos_ext.evaluation.figures import Estimate
    from xcos_ext.explain.explainers import PairModel

__all__ = ["FaithfulnessRequest", "parse_folds", "run_faithfulness"]

_PLOTS = (".png", ".pdf", ".svg")
_REPORTS = (".json",)
_NAMED = 5  # failures named on the terminal; all are in the JSON


@dataclass(frozen=True, kw_only=True)
class FaithfulnessRequest:
    """The command line's options."""

    pairs: str
    root: str | None = None
    list_format: str | None = None
    folds: str | None = None
    aligned: bool = False
    model: str | None = None
    detector: str = "cascade"
    teacher: str | None = None
    only_teacher: bool = False
    explainers: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    count: int | None = None
    sizes: tuple[str, ...] = ("medium",)
    blend: str = "hard"
    match_colour: bool = False
    pixels: bool = False
    fills: tuple[str, ...] = ("zero",)
    gallery: int = 1000
    top: int = 1
    seed: int = 0
    replicates: int = 1000
    batch: int = 32
    device: str = "auto"
    plot: str | None = None
    out: str | None = None
    quiet: bool = False
    as_json: bool = False


def parse_folds(text: str) -> tuple[int, ...]:
    """``"7,8"`` -> (7, 8).

    Raises:
        XCosError: something that is not a list of integers.
    """
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise XCosError(f"--folds: expected numbers with commas between, such as 7,8, got {text!r}") from error


def run_faithfulness(request: FaithfulnessRequest) -> int:
    """Explain, measure, print, draw.

    Raises:
        XCosError: anything wrong with the pairs, the pictures, the models, the explainers or the output.
    """
    quiet_opencv()
    from xcos_ext.faces import create_detector
    from xcos_ext.io.optional import need

    # Cheap checks first: they are before the imports and the work that take seconds and minutes.
    if request.only_teacher and request.teacher is None:
        raise XCosError("--only-teacher: expected --teacher WEIGHTS with it, got none")
    if request.replicates and request.replicates < 20:
        raise XCosError(f"--bootstrap: expected 0 or at least 20, got {request.replicates}")
    for path, suffixes in ((request.plot, _PLOTS), (request.out, _REPORTS)):
        if path is not None:
            from xcos_ext.io.atomic import check_output

            check_output(path, suffixes)
    if request.plot is not None:
        need("matplotlib", "drawing")
    need("sklearn", "evaluation")
    need("scipy", "evaluation")
    wanted_folds = None if request.folds is None else parse_folds(request.folds)
    model_path = None if request.only_teacher else check_model_path(request.model)
    teacher_path = None if request.teacher is None else check_model_path(request.teacher)
    pairs = opened_pairs(request.pairs, request.root, request.list_format)
    detector = None if request.aligned or pairs.aligned else create_detector(request.detector)
    from xcos_ext.evaluation.faithfulness import Faces, Settings, faithfulness, fold_numbers
    from xcos_ext.explain.explainers import available

    for name in request.explainers:
        if name not in available():
            raise XCosError(f"--explainer: expected some of {', '.join(available())}, got {name!r}")
    folds = None
    if wanted_folds is not None:
        numbers = fold_numbers(pairs)
        unknown = [number for number in wanted_folds if number not in numbers]
        if unknown:
            raise XCosError(f"--folds: expected some of {', '.join(map(str, numbers))}, got {unknown[0]}")
        folds = [numbers[number] for number in wanted_folds]
    settings = Settings(
        count=request.count,
        sizes=tuple(dict.fromkeys(request.sizes)),
        blend="soft" if request.blend == "soft" else "hard",
        match_colour=request.match_colour,
        pixels=request.pixels,
        fills=tuple(dict.fromkeys(request.fills)),
        gallery=request.gallery,
        top=request.top,
        seed=request.seed,
        replicates=request.replicates,
        batch_size=request.batch,
    )
    device = chosen_device(request.device)
    started = time.perf_counter()
    results: list[Faithfulness] = []

    def document(complete: bool, *more: Faithfulness) -> dict[str, Any]:
        return {
            "pairs": _described(pairs, request, wanted_folds),
            "settings": _settings(settings),
            "complete": complete,
            "models": [result.as_dict() for result in (*results, *more)],
            "seconds": time.perf_counter() - started,
        }

    def save(data: dict[str, Any]) -> None:
        if request.out is not None:
            from xcos_ext.io.atomic import write_atomically

            text = json.dumps(data, indent=2, allow_nan=False) + "\n"

            def write(file: BinaryIO) -> None:
                file.write(text.encode())

            write_atomically(request.out, write)

    @contextlib.contextmanager
    def stage(title: str) -> Iterator[Any]:
        with bar(title, "maps", quiet=request.quiet or request.as_json) as tick:
            yield tick

    crops: dict[tuple[int, int], Faces] = {}
    for model in _models(model_path, teacher_path, device):
        size = model.preprocessing.size
        try:
            if size not in crops:
                crops[size] = Faces(pairs, size, detector=detector, folds=folds)
            result = faithfulness(
                model,
                crops[size],
                request.explainers or None,
                protocols=request.protocols or None,
                settings=settings,
                stage=stage,
                save=lambda found: save(document(False, found)),
            )
        except ValueError as error:
            raise XCosError(str(error)) from error
        results.append(result)
    data = document(True)
    save(data)
    if request.plot is not None:
        _draw(results, request.plot)
    if request.as_json:
        print_json(data)
        return 0
    _print(request, results, data)
    return 0


def _models(model_path: str | None, teacher_path: str | None, device: torch.device) -> Iterator[PairModel]:
    """The scores to explain, loaded when their turn comes."""
    from xcos_ext.explain.explainers import EmbeddingCosine, XCosPairs
    from xcos_ext.model import load_recogniser

    if model_path is not None:
        yield XCosPairs(load(model_path).to(device))
    if teacher_path is not None:
        with notes_for_warnings():
            recogniser = load_recogniser(teacher_path).to(device).eval()
        try:
            yield EmbeddingCosine(recogniser)
        except ValueError as error:
            raise XCosError(f"{teacher_path}: {error}") from error


def _settings(settings: Settings) -> dict[str, Any]:
    from xcos_ext.evaluation.figures import plain

    return dict(plain(settings))


def _described(pairs: PairList, request: FaithfulnessRequest, folds: Sequence[int] | None) -> dict[str, Any]:
    from xcos_ext.faces import display_name

    return {
        "file": display_name(request.pairs),
        "format": pairs.format,
        "folds": None if folds is None else list(folds),
        "aligned": request.aligned or pairs.aligned,
    }


def _draw(results: Sequence[Faithfulness], path: str) -> None:
    """One file a model: the second and later ones get a number before the suffix."""
    from pathlib import Path

    from xcos_ext.evaluation.faithfulness import faithfulness_figure
    from xcos_ext.explain import save_figure

    for number, result in enumerate(results):
        target = Path(path)
        if number:
            target = target.with_name(f"{target.stem}-{number + 1}{target.suffix}")
        try:
            figure = faithfulness_figure(result)
        except ValueError:
            note(f"{result.model}: nothing was measured that has curves, so nothing is drawn")
            continue
        save_figure(figure, target)


def _cell(estimate: Estimate, digits: int, *, interval: bool = True) -> str:
    text = f"{estimate.value:.{digits}f}"
    if interval and estimate.interval is not None:
        low, high = estimate.interval
        text += f"\n\\[{low:.{digits}f}, {high:.{digits}f}]"
    return text


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _swap_tables(found: RegionSwap) -> Iterator[Table]:
    from xcos_ext.evaluation.faithfulness import DIRECTIONS

    readings = {"absolute": "map of the changed pair", "difference": "changed minus unchanged", "centred": "centred"}
    how = f"{found.blend} paste" + (", colours matched" if found.match_colour else "")
    for draw in found.draws:
        rows = [row for row in found.rows if row.direction == draw.direction]
        for size in dict.fromkeys(row.size for row in rows):
            regions = list(dict.fromkeys(row.region for row in rows))
            table = _table(
                f"Region swap, {DIRECTIONS[draw.direction]}: AUC over the cells, 0.5 is chance ({size} regions, {how}, "
                f"{draw.pairs} pairs)",
                ["explainer", *regions, "same person"],
            )
            for reading, meaning in readings.items():
                table.add_row(f"[italic]{meaning}[/italic]")
                for name in dict.fromkeys(row.explainer for row in rows):
                    own = {
                        (row.paste, row.region): getattr(row, reading)
                        for row in rows
                        if row.explainer == name and row.size == size
                    }
                    cells = [_cell(own["swap", region], 2, interval=region == "mean") for region in regions]
                    control = own.get(("same-person", "mean"))
                    table.add_row(name, *cells, "-" if control is None else _cell(control, 2))
                table.add_section()
            yield table


def _deletion_table(found: Deletion) -> Table:
    what = "verification accuracy" if found.protocol == "deletion" else "rank-1 identification rate"
    who = f"{found.pairs} pairs" if found.protocol == "deletion" else f"{found.pairs} probes, {found.gallery} enrolled"
    table = _table(
        f"Deletion and insertion: area under {what}, % ({who}; untouched {100 * found.clean:.1f} %)",
        ["explainer", "similar: deletion ↓", "insertion ↑", "dissimilar: deletion ↓", "insertion ↑"],
    )
    for fill in dict.fromkeys(row.fill for row in found.rows):
        table.add_row(f"[italic]fill: {fill}[/italic]")
        for name in dict.fromkeys(row.explainer for row in found.rows):
            areas = [
                found.find(name, kind=kind, mode=mode, fill=fill).curve.area
                for kind in ("similar", "dissimilar")
                for mode in ("deletion", "insertion")
            ]
            table.add_row(name, *(_cell(area, 1) for area in areas))
        table.add_section()
    return table


def _locality_table(found: Locality) -> Table:
    table = _table(
        f"Locality: share of a change of S that shows in the occluded cell ({found.pairs} pairs)",
        ["fill", "own cell ↑", "3x3 cells around ↑"],
    )
    for row in found.rows:
        table.add_row(row.fill, _cell(row.own, 3), _cell(row.neighbourhood, 3))
    table.add_row("all cells alike", f"{found.chance:.3f}", f"{found.chance_neighbourhood:.3f}")
    return table


def _patch_table(found: Patch) -> Table:
    kinds = list(dict.fromkeys(row.pairs for row in found.rows))
    table = _table(
        f"Patch replacement: area under the verdicts turned, % ↑ ({found.right} right of "
        f"{found.genuine + found.impostor} pairs)",
        ["explainer", *kinds],
    )
    for name in dict.fromkeys(row.explainer for row in found.rows):
        table.add_row(name, *(_cell(found.find(name, pairs=kind).flips.area, 1) for kind in kinds))
    return table


def _time_table(result: Faithfulness) -> Table:
    table = _table(
        f"Time for the maps of one pair, ms ({result.device})", ["explainer", "median", "quartiles", "pairs"]
    )
    for name, timing in result.timings.items():
        low, median, high = (f"{1000 * value:.3g}" for value in (timing.low, timing.median, timing.high))
        table.add_row(name, median, f"{low}, {high}", str(timing.pairs))
    return table


def _print(request: FaithfulnessRequest, results: Sequence[Faithfulness], data: dict[str, Any]) -> None:
    from rich.console import Console

    from xcos_ext.faces import display_name

    # Where nobody looks at a terminal, lines are not cut to its width.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 170, highlight=False)
    for result in results:
        print(result.model)
        if result.region_swap is not None:
            for table in _swap_tables(result.region_swap):
                console.print(table)
        for deletion in (result.deletion, result.identification):
            if deletion is not None:
                console.print(_deletion_table(deletion))
        if result.locality is not None:
            console.print(_locality_table(result.locality))
        if result.patch is not None:
            console.print(_patch_table(result.patch))
        console.print(_time_table(result))
        if result.threshold_from_pairs and result.threshold is not None:
            print(f"explained at the threshold {result.threshold:.4f}, the equal error rate's on these pairs")
        for name, why in result.skipped.items():
            note(f"{name} is left out: {why}")
        _print_left_out(result)
    if request.quiet:
        return
    if request.replicates:
        print(f"95 % intervals: bootstrap over people, {request.replicates:,} replicates; thresholds stay fixed")
    print(f"{data['seconds']:.1f} s")
    for title, path in (("curves", request.plot), ("all figures", request.out)):
        if path is not None:
            print(f"{title}: {display_name(path)}")


def _print_left_out(result: Faithfulness) -> None:
    """What could not be used."""
    if result.region_swap is not None:
        for draw in result.region_swap.draws:
            if draw.passed_over:
                print(f"{draw.direction}: {draw.passed_over} pairs passed over, for want of a picture or a donor")
            if draw.controls < draw.pairs:
                print(f"{draw.direction}: {draw.controls} of {draw.pairs} pairs have a picture for the control")
    for name, passed in (
        ("deletion", result.deletion and result.deletion.passed_over),
        ("identification", result.identification and result.identification.passed_over),
        ("locality", result.locality and result.locality.passed_over),
        ("patch replacement", result.patch and result.patch.passed_over),
    ):
        if passed:
            print(f"{name}: {passed} passed over, for want of a picture or a donor")
    if result.failures:
        print(f"{len(result.failures):,} pictures could not be used")
        for why in list(result.failures.values())[:_NAMED]:
            note(why)
        if len(result.failures) > _NAMED:
            note(f"... and {len(result.failures) - _NAMED} more pictures (--json lists them)")
