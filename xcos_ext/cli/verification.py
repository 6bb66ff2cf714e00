"""``xcos evaluate verification``: the figures of a model on a list of pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import XCosError
from xcos_ext.io.text import counted, display_name

from . import options
from .console import echo, figure, note_faces, note_some, print_json, print_tables, progress, say_written, table
from .inputs import check_model_path, described, load, load_recogniser, opened_pairs

if TYPE_CHECKING:
    from xcos_ext.evaluation import Evaluation
    from xcos_ext.evaluation.datasets import PairList
    from xcos_ext.model import XCosModel

_FMRS = (1e-1, 1e-2, 1e-3)
_COUNTED = "rejected at every threshold: a genuine pair as a false non-match, an impostor pair as rightly rejected"


@options.command("verification")
@options.pair_list
@options.aligned
@options.model
@options.detector
@click.option("--flip", is_flag=True, help="Average in the features of the mirrored pictures.")
@options.choice(
    "--attention",
    values=["own", "uniform", "norm", "corr", "symmetric"],
    default=("own",),
    help="How the cells are weighed; may be repeated.",
)
@click.option(
    "--teacher", metavar="WEIGHTS", type=click.Path(), help="A recogniser: its plain cosine is measured and correlated."
)
@options.bootstrap
@options.device
@options.figure("--plot", "the ROC curves")
@options.as_json
def run(
    pairs: str,
    root: str | None,
    list_format: str | None,
    folds: tuple[int, ...] | None,
    aligned: bool,
    model: str | None,
    detector: str,
    flip: bool,
    attention: tuple[str, ...],
    teacher: str | None,
    replicates: int,
    device: str,
    plot: str | None,
    as_json: bool,
) -> int:
    """Accuracy, AUC, EER and TAR at false match rates on a list of pairs, with confidence intervals."""
    from xcos_ext.io.optional import need

    need("sklearn", "evaluation")
    path = check_model_path(model)
    teacher_path = None if teacher is None else check_model_path(teacher)
    listed, finder = opened_pairs(pairs, root, list_format, folds, detector, aligned, plot)
    impostors = int((~listed.genuine).sum())
    if plot is not None and impostors < 2:
        raise XCosError(f"--plot: expected a list with at least two impostor pairs for ROC curves, got {impostors}")
    from xcos_ext.evaluation import evaluate

    loaded = load(path, device)
    recogniser = None if teacher_path is None else load_recogniser(teacher_path, device)
    if recogniser is not None and recogniser.preprocessing.size != loaded.preprocessing.size:
        raise XCosError(
            f"{display_name(teacher or '')}: expects crops of {recogniser.preprocessing.size}, the model of "
            f"{loaded.preprocessing.size}"
        )
    started = time.perf_counter()
    result = evaluate(
        loaded,
        listed,
        attentions=attention,
        teacher=recogniser,
        detector=finder,
        flip=flip,
        fmrs=_FMRS,
        replicates=replicates,
        track=lambda blocks: progress(blocks, "scoring"),
    )
    seconds = time.perf_counter() - started
    if plot is not None:
        _draw(plot, loaded, listed, result)
    about = {
        "file": display_name(pairs),
        "format": listed.format,
        "count": len(listed),
        "genuine": int(listed.genuine.sum()),
        "pictures": len(listed.keys),
        "people": None if listed.people is None else len(set(listed.people)),
        "folds": len(set(listed.folds.tolist())),
        "only_folds": folds,
        "folds_are_the_lists_own": listed.own_folds,
    }
    thresholds = _at_thresholds(loaded, listed, result)
    sample = result.resampling
    noted = note_faces(result.several)
    if not as_json:
        _print(loaded.name, listed, about, result)
        for line in _remarks(listed, result, replicates, flip, thresholds):
            echo(line)
        say_written(("ROC curves", plot))
        note_some(result.failures.values(), "pictures")
        return 0
    failed = [
        {"a": listed.keys[listed.first[i]], "b": listed.keys[listed.second[i]], "genuine": bool(listed.genuine[i])}
        for i in result.failed.nonzero()[0]
    ]
    data = {
        "pairs": about,
        "enrolment": {
            "aligned": finder is None,
            "detector": None if finder is None else display_name(detector),
            "failed_pictures": [{"picture": key, "reason": why} for key, why in result.failures.items()],
            "failed_pairs": failed,
            "failed_pairs_count_as": _COUNTED,
            "several_faces": noted["several_faces"],
        },
        "model": described(loaded, path) | {"threshold": loaded.threshold},
        "teacher": None if teacher is None else display_name(teacher),
        "flip": flip,
        "corr_target": result.corr_target,
        "bootstrap": None
        if sample is None
        else {"unit": sample.unit, "units": sample.units, "replicates": replicates, "confidence": 0.95},
        "variants": {name: variant.as_dict() for name, variant in result.variants.items()},
        "at_the_models_thresholds": thresholds,
        "plot": None if plot is None else display_name(plot),
        "seconds": seconds,
    }
    print_json(data)
    return 0


def _label(name: str) -> str:
    return "teacher, plain cosine" if name == "teacher" else name


def _draw(path: str, model: XCosModel, pairs: PairList, result: Evaluation) -> None:
    from xcos_ext.evaluation import error_curves, roc_figure
    from xcos_ext.explain import save_figure

    impostors = int((~pairs.genuine).sum())
    curves = {_label(name): error_curves(v.scores, pairs.genuine) for name, v in result.variants.items()}
    title = f"{model.name}, {counted(len(pairs), 'pair')} ({impostors:,} impostor)"
    save_figure(roc_figure(curves, impostors, title=title), path)


def _at_thresholds(model: XCosModel, pairs: PairList, result: Evaluation) -> dict[str, Any] | None:
    """What the thresholds that the model carries give here, with its own attention."""
    if "own" not in result.variants:
        return None
    scores, genuine = result.variants["own"].scores, pairs.genuine

    def at(threshold: float) -> dict[str, float]:
        accepted = scores >= threshold
        rates = {"fmr": accepted[~genuine], "fnmr": ~accepted[genuine], "accuracy": accepted == genuine}
        return {"threshold": threshold} | {name: float(of.mean()) for name, of in rates.items()}

    return {
        "decision": None if model.threshold is None else at(model.threshold),
        "calibrated": [
            {"calibrated_fmr": rate} | at(t) for rate, t in sorted(model.fmr_thresholds.items(), reverse=True)
        ],
    }


def _print(name: str, pairs: PairList, about: dict[str, Any], result: Evaluation) -> None:
    only = about["only_folds"]
    count = counted(about["folds"], "fold") if only is None else f"only folds {', '.join(map(str, only))}"
    folds = count + ("" if pairs.own_folds else " (made, so people may be in several)")
    teacher = ["correlation with the teacher"] if "teacher" in result.variants else []
    shown = table(
        f"{name}: {counted(len(pairs), 'pair')}, {about['genuine']:,} genuine, {folds}",
        ["attention", "accuracy %", "AUC", "EER %", *(f"TAR % at FMR {rate:g}" for rate in _FMRS), *teacher],
    )
    for name, variant in result.variants.items():
        report, intervals = variant.report, variant.intervals
        points = {f"tar@{p.requested:g}": p.tar if p.resolved else None for p in report.operating_points}
        figures = {"accuracy": report.accuracy and report.accuracy.mean, "auc": report.auc, "eer": report.eer} | points
        cells = [
            figure(value, intervals.get(key), *((5, 1) if key == "auc" else (2, 100))) for key, value in figures.items()
        ]
        shown.add_row(_label(name), *cells, *(figure(variant.correlation, None, 4) for _ in teacher))
    print_tables(shown)


def _remarks(
    pairs: PairList, result: Evaluation, replicates: int, flip: bool, thresholds: dict[str, Any] | None
) -> Iterator[str]:
    """What is said below the table."""
    if result.resampling is not None:
        sample = f"{result.resampling.units:,} {result.resampling.unit}"
        yield f"95 % intervals: bootstrap over {sample}, {replicates:,} replicates"
    impostors = int((~pairs.genuine).sum())
    if impostors * min(_FMRS) < 1:
        yield f"-: {impostors:,} impostor pairs cannot tell so low a rate"
    if flip:
        yield "features are means of each picture's and its mirror picture's, mirrored back"
    if result.corr_target is not None:
        whose = "the teacher's" if result.corr_target == "teacher" else "the model's own embedding's"
        yield f"corr: correlation of each cell with {whose} cosine, estimated on the other folds"
    for found in [] if thresholds is None else [thresholds["decision"], *thresholds["calibrated"]]:
        if found is not None:
            kind = f"calibrated for FMR {found['calibrated_fmr']:g}" if "calibrated_fmr" in found else "for decisions"
            yield (
                f"the model's threshold {kind}, {found['threshold']:.4f}: accuracy {100 * found['accuracy']:.2f} %, "
                f"FMR {100 * found['fmr']:.2f} %, FNMR {100 * found['fnmr']:.2f} %"
            )
    if result.failures:
        genuine = int((result.failed & pairs.genuine).sum())
        impostor = int(result.failed.sum()) - genuine
        yield (
            f"failed to enrol: {len(result.failures):,} of {len(pairs.keys):,} pictures, so {genuine} genuine and "
            f"{impostor} impostor pairs count as {_COUNTED}"
        )
