"""``xcos evaluate verification``: the figures of a model on a list of pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from xcos_ext.io.errors import XCosError

from . import options
from .console import note_some, print_json, progress, table, table_console
from .inputs import check_model_path, described, load, load_recogniser, opened_pairs

if TYPE_CHECKING:
    from xcos_ext.evaluation import Evaluation
    from xcos_ext.evaluation.datasets import PairList
    from xcos_ext.model import XCosModel

_FMRS = (1e-1, 1e-2, 1e-3)
_COUNTED = "rejected at every threshold: a genuine pair as a false non-match, an impostor pair as rightly rejected"


@click.command("verification")
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
    from xcos_ext.faces import create_detector, display_name
    from xcos_ext.io.optional import need

    need("sklearn", "evaluation")
    path = check_model_path(model)
    teacher_path = None if teacher is None else check_model_path(teacher)
    listed = opened_pairs(pairs, root, list_format)
    finder = None if aligned or listed.aligned else create_detector(detector)
    from xcos_ext.evaluation import evaluate

    loaded = load(path, device)
    recogniser = None if teacher_path is None else load_recogniser(teacher_path, device)
    if recogniser is not None and recogniser.preprocessing.size != loaded.preprocessing.size:
        raise XCosError(
            f"{display_name(teacher_path or '')}: expects crops of {recogniser.preprocessing.size}, the model of "
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
        track=lambda blocks: progress(blocks, "scoring", quiet=as_json),
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
        "folds": int(listed.folds.max() - listed.folds.min() + 1) if len(set(listed.folds.tolist())) > 1 else 1,
        "folds_are_the_lists_own": listed.own_folds,
    }
    thresholds = _at_thresholds(loaded, listed, result)
    if as_json:
        drawn, failed = zip(listed.first, listed.second, listed.genuine, strict=True), result.failed
        sample = result.resampling
        print_json(
            {
                "pairs": about,
                "enrolment": {
                    "aligned": finder is None,
                    "detector": None if finder is None else display_name(detector),
                    "failed_pictures": [{"picture": key, "reason": why} for key, why in result.failures.items()],
                    "failed_pairs": [
                        {"a": listed.keys[a], "b": listed.keys[b], "genuine": bool(same)}
                        for (a, b, same), lost in zip(drawn, failed, strict=True)
                        if lost
                    ],
                    "failed_pairs_count_as": _COUNTED,
                },
                "model": described(loaded, path) | {"threshold": loaded.threshold},
                "teacher": None if teacher_path is None else display_name(teacher_path),
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
        )
        return 0
    folds = f"{about['folds']} folds" + ("" if listed.own_folds else " (made, so people may be in several)")
    _print_table(
        f"{loaded.name}: {len(listed):,} pairs, {about['genuine']:,} genuine, {folds}", result, teacher is not None
    )
    for line in _remarks(listed, result, replicates, flip, thresholds):
        click.echo(line)
    if plot is not None:
        click.echo(f"ROC curves: {display_name(plot)}")
    if result.failures:
        genuine = int((result.failed & listed.genuine).sum())
        impostor = int((result.failed & ~listed.genuine).sum())
        click.echo(
            f"failed to enrol: {len(result.failures):,} of {len(listed.keys):,} pictures, so {genuine} genuine and "
            f"{impostor} impostor pairs count as {_COUNTED}"
        )
        note_some(result.failures.values(), "pictures")
    return 0


def _label(name: str) -> str:
    return "teacher, plain cosine" if name == "teacher" else name


def _draw(path: str, model: XCosModel, pairs: PairList, result: Evaluation) -> None:
    from xcos_ext.evaluation import error_curves, roc_figure
    from xcos_ext.explain import save_figure

    impostors = int((~pairs.genuine).sum())
    curves = {_label(name): error_curves(v.scores, pairs.genuine) for name, v in result.variants.items()}
    title = f"{model.name}, {len(pairs):,} pairs ({impostors:,} impostor)"
    save_figure(roc_figure(curves, impostors, title=title), path)


def _at_thresholds(model: XCosModel, pairs: PairList, result: Evaluation) -> dict[str, Any] | None:
    """What the thresholds that the model carries give here, with its own attention."""
    if "own" not in result.variants:
        return None
    scores, genuine = result.variants["own"].scores, pairs.genuine

    def at(threshold: float) -> dict[str, float]:
        accepted = scores >= threshold
        return {
            "threshold": threshold,
            "fmr": float(accepted[~genuine].mean()),
            "fnmr": float((~accepted)[genuine].mean()),
            "accuracy": float((accepted == genuine).mean()),
        }

    return {
        "decision": None if model.threshold is None else at(model.threshold),
        "calibrated": [
            {"calibrated_fmr": rate} | at(t) for rate, t in sorted(model.fmr_thresholds.items(), reverse=True)
        ],
    }


def _print_table(title: str, result: Evaluation, teacher: bool) -> None:
    columns = ("attention", "accuracy %", "AUC", "EER %", *(f"TAR % at FMR {rate:g}" for rate in _FMRS))
    shown = table(title, [*columns, *(["correlation with the teacher"] if teacher else [])])
    for name, variant in result.variants.items():
        report, intervals = variant.report, variant.intervals

        def cell(value: float | None, key: str, scale: int = 100, digits: int = 2, intervals: Any = intervals) -> str:
            if value is None:
                return "-"
            text = f"{scale * value:.{digits}f}"
            if key in intervals:
                low, high = intervals[key]
                text += f"\n\\[{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
            return text

        shown.add_row(
            _label(name),
            cell(None if report.accuracy is None else report.accuracy.mean, "accuracy"),
            cell(report.auc, "auc", 1, 5),
            cell(report.eer, "eer"),
            *(cell(p.tar if p.resolved else None, f"tar@{p.requested:g}") for p in report.operating_points),
            *(["-" if variant.correlation is None else f"{variant.correlation:.4f}"] if teacher else []),
        )
    table_console().print(shown)


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
