"""``xcos evaluate verification``: the figures of a model on a list of pairs."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xcos_ext.io.errors import XCosError

from .console import note, notes_for_warnings, print_json, progress, quiet_opencv
from .verify import check_model_path, chosen_device, load

if TYPE_CHECKING:
    from xcos_ext.evaluation import Evaluation
    from xcos_ext.evaluation.datasets import PairList
    from xcos_ext.model import XCosModel

__all__ = ["VerificationRequest", "opened_pairs", "run_verification"]

_PLOTS = (".png", ".pdf", ".svg")
_NAMED = 5  # failures named on the terminal; all are in the JSON
_FMRS = (1e-1, 1e-2, 1e-3)
_COUNTED = "rejected at every threshold: a genuine pair as a false non-match, an impostor pair as rightly rejected"


@dataclass(frozen=True)
class VerificationRequest:
    """The command line's options."""

    pairs: str
    root: str | None = None
    list_format: str | None = None
    aligned: bool = False
    model: str | None = None
    detector: str = "cascade"
    flip: bool = False
    attention: tuple[str, ...] = ("own",)
    teacher: str | None = None
    replicates: int = 1000
    device: str = "auto"
    plot: str | None = None
    as_json: bool = False


def opened_pairs(pairs: str, root: str | None, list_format: str | None) -> PairList:
    """A list of pairs that a command was given.

    Raises:
        XCosError: it cannot be read or used.
    """
    from xcos_ext.evaluation.datasets import open_pairs

    try:
        return open_pairs(pairs, root, format=list_format)
    except (OSError, ValueError) as error:
        raise XCosError(str(error)) from error


def run_verification(request: VerificationRequest) -> int:
    """Score, measure, print, draw.

    Raises:
        XCosError: anything wrong with the pairs, the pictures, the models or the output.
    """
    quiet_opencv()
    from xcos_ext.faces import create_detector, display_name
    from xcos_ext.io.optional import need

    # Cheap checks first: they are before the imports and the work that take seconds and minutes.
    if request.plot is not None:
        from xcos_ext.io.atomic import check_output

        check_output(request.plot, _PLOTS)
        need("matplotlib", "drawing")
    need("sklearn", "evaluation")
    model_path = check_model_path(request.model)
    teacher_path = None if request.teacher is None else check_model_path(request.teacher)
    pairs = opened_pairs(request.pairs, request.root, request.list_format)
    detector = None if request.aligned or pairs.aligned else create_detector(request.detector)
    from xcos_ext.evaluation import error_curves, evaluate, roc_figure
    from xcos_ext.model import load_recogniser

    device = chosen_device(request.device)
    model = load(model_path).to(device)
    with notes_for_warnings():
        teacher = None if teacher_path is None else load_recogniser(teacher_path).to(device)
    if teacher is not None and teacher.preprocessing.size != model.preprocessing.size:
        raise XCosError(
            f"{display_name(teacher_path or '')}: expects crops of {teacher.preprocessing.size}, the model of "
            f"{model.preprocessing.size}"
        )
    started = time.perf_counter()
    try:
        result = evaluate(
            model,
            pairs,
            attentions=request.attention,
            teacher=teacher,
            detector=detector,
            flip=request.flip,
            fmrs=_FMRS,
            replicates=request.replicates,
            track=lambda blocks: progress(blocks, len(blocks), "scoring", quiet=request.as_json),
        )
    except ValueError as error:
        raise XCosError(str(error)) from error
    seconds = time.perf_counter() - started
    if request.plot is not None:
        from xcos_ext.explain import save_figure

        impostors = int((~pairs.genuine).sum())
        curves = {_label(name): error_curves(v.scores, pairs.genuine) for name, v in result.variants.items()}
        title = f"{model.name}, {len(pairs):,} pairs ({impostors:,} impostor)"
        save_figure(roc_figure(curves, impostors, title=title), request.plot)
    if request.as_json:
        print_json(
            {
                "pairs": _described(pairs, request),
                "enrolment": {
                    "aligned": detector is None,
                    "detector": None if detector is None else display_name(request.detector),
                    "failed_pictures": [{"picture": key, "reason": why} for key, why in result.failures.items()],
                    "failed_pairs": [
                        {"a": pairs.keys[a], "b": pairs.keys[b], "genuine": bool(same)}
                        for a, b, same, failed in zip(
                            pairs.first, pairs.second, pairs.genuine, result.failed, strict=True
                        )
                        if failed
                    ],
                    "failed_pairs_count_as": _COUNTED,
                },
                "model": {
                    "name": model.name,
                    "file": display_name(model_path),
                    "fingerprint": model.fingerprint(),
                    "threshold": model.threshold,
                },
                "teacher": None if teacher_path is None else display_name(teacher_path),
                "flip": request.flip,
                "corr_target": result.corr_target,
                "bootstrap": None
                if result.resampling is None
                else {
                    "unit": result.resampling.unit,
                    "units": result.resampling.units,
                    "replicates": request.replicates,
                    "confidence": 0.95,
                },
                "variants": {name: variant.as_dict() for name, variant in result.variants.items()},
                "at_the_models_thresholds": _at_thresholds(model, pairs, result),
                "plot": None if request.plot is None else display_name(request.plot),
                "seconds": seconds,
            }
        )
        return 0
    _print(request, model, pairs, result)
    return 0


def _label(name: str) -> str:
    return "teacher, plain cosine" if name == "teacher" else name


def _described(pairs: PairList, request: VerificationRequest) -> dict[str, Any]:
    from xcos_ext.faces import display_name

    return {
        "file": display_name(request.pairs),
        "format": pairs.format,
        "count": len(pairs),
        "genuine": int(pairs.genuine.sum()),
        "pictures": len(pairs.keys),
        "people": None if pairs.people is None else len(set(pairs.people)),
        "folds": int(pairs.folds.max() - pairs.folds.min() + 1) if len(set(pairs.folds.tolist())) > 1 else 1,
        "folds_are_the_lists_own": pairs.own_folds,
    }


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


def _print(request: VerificationRequest, model: XCosModel, pairs: PairList, result: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    about = _described(pairs, request)
    folds = f"{about['folds']} folds" + ("" if pairs.own_folds else " (made, so people may be in several)")
    table = Table(
        title=f"{model.name}: {about['count']:,} pairs, {about['genuine']:,} genuine, {folds}", title_justify="left"
    )
    table.add_column("attention")
    columns = ("accuracy %", "AUC", "EER %", *(f"TAR % at FMR {rate:g}" for rate in _FMRS))
    for column in (*columns, *(["correlation with the teacher"] if request.teacher else [])):
        table.add_column(column, justify="right")
    for name, variant in result.variants.items():
        report, intervals = variant.report, variant.intervals

        def cell(value: float | None, key: str, percent: bool, intervals: Any = intervals) -> str:
            if value is None:
                return "-"
            scale, digits = (100, 2) if percent else (1, 5)
            text = f"{scale * value:.{digits}f}"
            if key in intervals:
                low, high = intervals[key]
                text += f"\n[{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
            return text.replace("[", "\\[")

        row = [
            _label(name),
            cell(None if report.accuracy is None else report.accuracy.mean, "accuracy", True),
            cell(report.auc, "auc", False),
            cell(report.eer, "eer", True),
            *(
                cell(point.tar if point.resolved else None, f"tar@{point.requested:g}", True)
                for point in report.operating_points
            ),
        ]
        if request.teacher:
            row.append("-" if variant.correlation is None else f"{variant.correlation:.4f}")
        table.add_row(*row)
    # Where nobody looks at a terminal, lines are not cut to its width.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    lines = []
    if result.resampling is not None:
        lines.append(
            f"95 % intervals: bootstrap over {result.resampling.units:,} {result.resampling.unit}, "
            f"{request.replicates:,} replicates"
        )
    impostors = int((~pairs.genuine).sum())
    if impostors * min(_FMRS) < 1:
        lines.append(f"-: {impostors:,} impostor pairs cannot tell so low a rate")
    if request.flip:
        lines.append("features are means of each picture's and its mirror picture's, mirrored back")
    if result.corr_target is not None:
        whose = "the teacher's" if result.corr_target == "teacher" else "the model's own embedding's"
        lines.append(f"corr: correlation of each cell with {whose} cosine, estimated on the other folds")
    at = _at_thresholds(model, pairs, result)
    for found in [] if at is None else [at["decision"], *at["calibrated"]]:
        if found is not None:
            kind = f"calibrated for FMR {found['calibrated_fmr']:g}" if "calibrated_fmr" in found else "for decisions"
            lines.append(
                f"the model's threshold {kind}, {found['threshold']:.4f}: accuracy {100 * found['accuracy']:.2f} %, "
                f"FMR {100 * found['fmr']:.2f} %, FNMR {100 * found['fnmr']:.2f} %"
            )
    if request.plot is not None:
        from xcos_ext.faces import display_name

        lines.append(f"ROC curves: {display_name(request.plot)}")
    for line in lines:
        print(line)
    if result.failures:
        genuine = int((result.failed & pairs.genuine).sum())
        impostor = int((result.failed & ~pairs.genuine).sum())
        print(
            f"failed to enrol: {len(result.failures):,} of {len(pairs.keys):,} pictures, so {genuine} genuine and "
            f"{impostor} impostor pairs count as {_COUNTED}"
        )
        for why in list(result.failures.values())[:_NAMED]:
            note(why)
        if len(result.failures) > _NAMED:
            note(f"... and {len(result.failures) - _NAMED} more pictures (--json lists them)")
